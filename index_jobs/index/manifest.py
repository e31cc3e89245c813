"""The manifest of a version, which names its files by their hashes, and CURRENT, which
names a version.
"""

import datetime
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import hash_json
from index_jobs.spec import IndexSpec

FORMAT = 5
CURRENT = "CURRENT"
VERSIONS = "versions"
BLOBS = "blobs"
ITEMS = "items.arrow"
REMOVED = "removed.npy"
CHANGED = "changed.npy"
CHECKPOINT = "checkpoint"
FAILED = "failed.jsonl"
LEXICAL = "lexical"
_HASH = re.compile("[0-9a-f]{64}")
# origins of changes
OVER_HTTP = "over HTTP"
BY_WATCH = "by a watch"
# why a watch takes no more changes, written again while it lasts
WAITING = "watch-waits.txt"


def manifest_key(version: int) -> str:
    """Return the path of a manifest in an index."""
    return f"{VERSIONS}/{version}.json"


def quantity(number: int, noun: str) -> str:
    """Return "1 item" or "1,200 items"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Current:
    """What CURRENT says: the served version, and the sha256 of its manifest."""

    version: int
    sha256: str

    def to_bytes(self) -> bytes:
        return f"{self.version} {self.sha256}\n".encode()

    @classmethod
    def parse(cls, data: bytes | None, index: str) -> "Current":
        """Raise ArtifactError if it is missing, or names no version. index: its name,
        for messages.
        """
        if not data:
            build = f"`dcar index build --gallery PATH --checkpoint DIR --out {index}`"
            raise ArtifactError(
                f"{index} holds no published index; make one with {build}, or `dcar"
                " index rollback`"
            )
        if match := re.match(rb"(\d{1,18}) ([0-9a-f]{64})\b", data):
            return cls(int(match[1]), match[2].decode())
        text = data[:40].decode(errors="replace").strip()
        raise ArtifactError(
            f"CURRENT of {index} names no version: {text!r}; roll back, or build it"
            " again"
        )


@dataclass(frozen=True)
class FileInfo:
    """Length in bytes and sha256 of one file."""

    size: int
    sha256: str

    @property
    def key(self) -> str:
        """Its path in an index."""
        return f"{BLOBS}/{self.sha256}"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Items added to a version after it was built, in a folder with vectors and items
    of their own.
    """

    folder: str
    count: int  # rows, removed ones included
    kind: str
    sources: list[str]  # the galleries as they were given
    # folders or URLs that hold their images
    roots: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and origin of a version. The defaults are those of a collection without
    items.
    """

    spec: IndexSpec  # what was asked for
    dim: int
    version: int = 0
    count: int = 0  # items that can be found
    kind: str = ""  # of the built index, as its engine names it
    reason: str = ""  # why this kind was chosen
    root: str = ""  # base of relative image locations; "": the index directory
    # folders or URLs that hold images at absolute locations
    roots: list[str] = field(default_factory=list)
    checkpoint: str = ""  # the directory that the model was copied from
    created: str = ""  # UTC, ISO 8601
    failed: int = 0  # images that could not be read
    # recall_at_10, parameters, latencies in ms, bytes, ...
    measured: dict[str, Any] = field(default_factory=dict)
    # by name, such as lexical/meta.json
    files: dict[str, FileInfo] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    removed: int = 0  # rows that are never found
    # items whose metadata changed after the build, each as often as it did
    changed: int = 0
    change: str = ""  # how this version differs from the one before, in words
    # of changes that are a history of their own: OVER_HTTP or BY_WATCH; "" of other
    # versions
    origin: str = ""
    rebuild: str = ""  # why a rebuild is recommended, "" while it is not
    # meaning of min_score "auto"; empty: not calibrated
    cutoff: dict[str, Any] = field(default_factory=dict)
    # the same for queries by an image
    image_cutoff: dict[str, Any] = field(default_factory=dict)
    runtime: str = ""  # runtime that encoded the images
    replaced: int | None = None  # the previous version; None for the first
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """All rows, removed ones included."""
        return self.count + self.removed

    @property
    def created_s(self) -> float | None:
        """`created` in Unix seconds; None without items."""
        if self.created:
            return datetime.datetime.fromisoformat(self.created).timestamp()
        return None

    @property
    def is_as_built(self) -> bool:
        """True if nothing was added, removed or changed after the build."""
        return not self.additions and not self.removed and not self.changed

    def paths(self, index: Path, prefix: str = "") -> dict[str, Path]:
        """Return the files whose names begin with a prefix, by the rest of their
        names.
        """
        named = {
            name: info for name, info in self.files.items() if name.startswith(prefix)
        }
        return {
            name.removeprefix(prefix): index / info.key for name, info in named.items()
        }

    def path(self, index: Path, name: str) -> Path:
        """Return a file by its name. Raise ArtifactError if the version has none."""
        if name not in self.files:
            raise ArtifactError(
                f"version {self.version} of {index} has no file {name}; roll back, or"
                " rebuild the index"
            )
        return index / self.files[name].key

    def to_bytes(self) -> bytes:
        """Return JSON with a checksum over all values, which reveals a changed
        manifest.
        """
        values = asdict(self)
        return (
            json.dumps(
                values | {"checksum": hash_json(values)},
                indent=2,
                ensure_ascii=False,
            ).encode()
            + b"\n"
        )

    @classmethod
    def parse(cls, data: bytes, name: str) -> "Manifest":
        """Read a manifest of this format. Raise ArtifactError, with its name, if it is
        damaged.
        """
        try:
            values = json.loads(data)
            checksum = values.pop("checksum", None)
            if values.get("format") != FORMAT:
                raise ArtifactError(
                    f"{name} is of format {values.get('format')}, not {FORMAT}; rebuild"
                    " the index"
                )
            if checksum != hash_json(values):
                raise ArtifactError(f"{name} is corrupted: its checksum differs")
            spec = IndexSpec(**values.pop("spec"))
            files = {
                file: FileInfo(**info) for file, info in values.pop("files").items()
            }
            for file, info in files.items():
                path = PurePosixPath(file)
                is_hash = _HASH.fullmatch(info.sha256)
                if path.is_absolute() or ".." in path.parts or not is_hash:
                    raise ArtifactError(
                        f"{name} is corrupted: it names the file {file!r}"
                    )
            additions = [Addition(**addition) for addition in values.pop("additions")]
            return cls(spec=spec, files=files, additions=additions, **values)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ArtifactError(f"{name} cannot be read: {error}") from error
