"""The manifest of a version: `manifest.json`, with a checksum of every file and of itself."""

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import canonical_json
from index_jobs.store.lexical.fusion import DEFAULT_WEIGHT
from index_jobs.store.lexical.term_lists import TERMS

FORMAT = 2
CURRENT, VERSIONS = "CURRENT", "versions"
MANIFEST, VECTORS, ITEMS, REMOVED = "manifest.json", "index.faiss", "items.arrow", "removed.npy"
CHECKPOINT, FAILED, DUPLICATES, LEXICAL = "checkpoint", "failed.jsonl", "duplicates.jsonl", "lexical"
PUBLISHED_CHANNEL = "dcar:published"  # of Redis, where services hear of new versions

_checked = set[tuple[int, int, int, int]]()  # device, inode, size and time of change of files


def check_file_once(path: Path, check: Callable[[], None]) -> None:
    """Check the contents of a file that this process has not checked yet; versions share files by hard links.

    `check` raises ValueError for damaged contents. Raise ArtifactError instead, with a remedy.
    """
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key in _checked:
        return
    try:
        check()
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}; roll back, or rebuild the index") from error
    _checked.add(key)


def utc_now() -> str:
    """Return the time in UTC to the second, ISO 8601: the `created` of a manifest."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
    """Contents and origin of a version."""

    version: int
    fingerprint: str  # of the encoder
    count: int  # items that can be found
    dim: int
    kind: str  # FAISS index_factory string
    reason: str  # why this kind was chosen
    milvus: str = ""  # URI of the Milvus that stores the vectors, "" for index.faiss
    gpu: bool  # searched on a GPU if there is one
    requested_kind: str  # as requested, such as "auto"
    requested_memory: int | None  # bytes that the index may take, as requested
    target_recall: float  # at 10, against exact search
    source: str  # the gallery as it was given
    root: str  # base of relative image locations
    roots: list[str] = field(default_factory=list)  # folders or URLs that hold images at absolute locations
    checkpoint: str  # the directory that the model was copied from
    checkpoint_signature: str  # hash over that directory's files
    gallery_signature: str
    created: str  # UTC, ISO 8601
    failed: int  # images that could not be read
    measured: dict[str, Any]  # recall_at_10, parameters, latencies in ms, bytes, ...
    files: dict[str, FileInfo]  # by path relative to the version
    additions: list[Addition] = field(default_factory=list)
    removed: int = 0  # rows that are never found
    rebuild: str = ""  # why a rebuild is recommended, "" while it is not
    cutoff: dict[str, Any] = field(default_factory=dict)  # meaning of min_score "auto"; empty: not calibrated
    runtime: str = ""  # runtime that encoded the images; "" in versions older than this field
    replaced: int | None = None  # the previous version; None for the first, or in versions older than this field
    exact: bool = False  # images decoded bit for bit as open_clip does
    text_fields: list[str] | None = None  # metadata fields in the lexical index; None for every field with text
    group_field: str = ""  # metadata field that names the product of an item; "" if each item is its own
    number_texts: dict[str, str] = field(default_factory=dict)  # fields of texts such as "10,50", with an example
    hybrid_weight: float | None = None  # of the words, chosen by validation texts; None: not chosen
    metric: str = "inner_product"
    format: int = FORMAT

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
        """False for versions whose hybrid searches take longer; see `index_jobs.store.lexical.term_lists`."""
        return f"{LEXICAL}/{TERMS}" in self.files

    def to_dict(self) -> dict[str, Any]:
        """Return the values with a checksum over all of them, which reveals a changed manifest."""
        values = asdict(self)
        return values | {"checksum": hashlib.sha256(canonical_json(values)).hexdigest()}

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        try:
            values = json.loads(path.read_bytes())
            checksum = values.pop("checksum", None)
            if values.get("format") != FORMAT:
                raise ArtifactError(f"{path} is of format {values.get('format')}, not {FORMAT}; rebuild the index")
            if checksum != hashlib.sha256(canonical_json(values)).hexdigest():
                raise ArtifactError(f"{path} is corrupted: its checksum differs")
            files = {name: FileInfo(**info) for name, info in values.pop("files").items()}
            additions = [Addition(**addition) for addition in values.pop("additions")]
            return cls(files=files, additions=additions, **values)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
