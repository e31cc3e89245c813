"""The manifest of a version: `manifest.json`, with a checksum of every file and of itself."""

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import hash_json
from index_jobs.spec import IndexSpec
from index_jobs.store.lexical.fusion import DEFAULT_WEIGHT

FORMAT = 3
CURRENT, VERSIONS = "CURRENT", "versions"
MANIFEST, ITEMS, REMOVED, CHANGED = "manifest.json", "items.arrow", "removed.npy", "changed.npy"
CHECKPOINT, FAILED, DUPLICATES, LEXICAL = "checkpoint", "failed.jsonl", "duplicates.jsonl", "lexical"
OVER_HTTP, BY_WATCH = "over HTTP", "by a watch"  # origins of changes
PUBLISHED_CHANNEL = "dcar:published"  # of Redis, where services hear of new versions


def utc_now() -> str:
    """Return the time in UTC to the second, ISO 8601: the `created` of a manifest."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def counted(number: int, noun: str) -> str:
    """Return "1 item" or "1,200 items"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class FileInfo:
    """Length in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Items added to a version after it was built, in a folder with vectors and items of their own."""

    folder: str
    count: int  # rows, removed ones included
    kind: str
    sources: list[str]  # the galleries as they were given
    roots: list[str] = field(default_factory=list)  # folders or URLs that hold their images


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and origin of a version. The defaults are those of a collection without items."""

    spec: IndexSpec  # what was asked for
    dim: int
    version: int = 0
    count: int = 0  # items that can be found
    kind: str = ""  # of the built index, as its engine names it
    reason: str = ""  # why this kind was chosen
    gpu: bool = False  # searched on a GPU if there is one
    root: str = ""  # base of relative image locations
    roots: list[str] = field(default_factory=list)  # folders or URLs that hold images at absolute locations
    checkpoint: str = ""  # the directory that the model was copied from
    created: str = ""  # UTC, ISO 8601
    failed: int = 0  # images that could not be read
    measured: dict[str, Any] = field(default_factory=dict)  # recall_at_10, parameters, latencies in ms, bytes, ...
    files: dict[str, FileInfo] = field(default_factory=dict)  # by path relative to the version
    additions: list[Addition] = field(default_factory=list)
    removed: int = 0  # rows that are never found
    changed: int = 0  # items whose metadata changed after the build, each as often as it did
    change: str = ""  # how this version differs from the one before, in words; "" in versions older than this field
    origin: str = ""  # of changes that are a history of their own: OVER_HTTP or BY_WATCH; "" of other versions
    rebuild: str = ""  # why a rebuild is recommended, "" while it is not
    cutoff: dict[str, Any] = field(default_factory=dict)  # meaning of min_score "auto"; empty: not calibrated
    runtime: str = ""  # runtime that encoded the images; "" in versions older than this field
    replaced: int | None = None  # the previous version; None for the first, or in versions older than this field
    number_texts: dict[str, str] = field(default_factory=dict)  # fields of texts such as "10,50", with an example
    hybrid_weight: float | None = None  # of the words, chosen by validation texts; None: not chosen
    metric: str = "inner_product"
    format: int = FORMAT

    @property
    def is_as_built(self) -> bool:
        """True if nothing was added, removed or changed after the build."""
        return not self.additions and not self.removed and not self.changed

    @property
    def has_lexical(self) -> bool:
        """False for versions that are older than the lexical index."""
        return any(name.startswith(f"{LEXICAL}/") for name in self.files)

    @property
    def folders(self) -> list[str]:
        """Folders and URLs that hold the images."""
        added = [root for addition in self.additions for root in addition.roots]
        return list(dict.fromkeys(root for root in (self.root, *self.roots, *added) if root))

    @property
    def words_weight(self) -> float:
        """The weight of the words in hybrid searches that name none."""
        return DEFAULT_WEIGHT if self.hybrid_weight is None else self.hybrid_weight

    @property
    def has_term_lists(self) -> bool:
        """False for versions whose hybrid searches take longer; see `index_jobs.store.lexical.lexical_index`."""
        return f"{LEXICAL}/terms.npy" in self.files

    def to_dict(self) -> dict[str, Any]:
        """Return the values with a checksum over all of them, which reveals a changed manifest."""
        values = asdict(self)
        return values | {"checksum": hash_json(values)}

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest of this format, or of the former one. Raise ArtifactError if it is damaged."""
        try:
            values = json.loads(path.read_bytes())
            checksum = values.pop("checksum", None)
            if values.get("format") not in (FORMAT, FORMAT - 1):
                raise ArtifactError(f"{path} is of format {values.get('format')}, not {FORMAT}; rebuild the index")
            if checksum != hash_json(values):
                raise ArtifactError(f"{path} is corrupted: its checksum differs")
            values = _upgraded(values)
            spec = IndexSpec(**values.pop("spec"))
            files = {name: FileInfo(**info) for name, info in values.pop("files").items()}
            additions = [Addition(**addition) for addition in values.pop("additions")]
            return cls(spec=spec, files=files, additions=additions, **values)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a manifest in the present format. In format 2, the fields of the spec stood by themselves.

    Which runtime and which share of failures were asked for is unknown; the defaults of `dcar index build` are assumed.
    """
    if values["format"] == FORMAT:
        if "over_http" in values:  # in place of `origin`
            values["origin"] = OVER_HTTP if values.pop("over_http") else ""
        return values
    values = {name: value for name, value in values.items() if name not in ("format", "checkpoint_signature")}
    milvus = values.pop("milvus", "")
    spec = {
        "gallery": values.pop("source"),
        "fingerprint": values.pop("fingerprint"),
        "gallery_signature": values.pop("gallery_signature"),
        "pairs_signature": values.get("cutoff", {}).pop("pairs_signature", ""),
        "kind": values.pop("requested_kind"),
        "engine": f"milvus={milvus}" if milvus else IndexSpec.engine,
        "memory": values.pop("requested_memory"),
        "target_recall": values.pop("target_recall"),
        "text_fields": values.pop("text_fields", None),
        "group_field": values.pop("group_field", ""),
        "exact": values.pop("exact", False),
        "runtime": "auto",
    }
    return values | {"spec": spec}
