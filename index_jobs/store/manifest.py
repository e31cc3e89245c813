"""What a version of an index says of itself: `manifest.json`, with a checksum of every file and of itself."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import canonical_json

FORMAT = 2
CURRENT, VERSIONS = "CURRENT", "versions"
DUPLICATES = "duplicates.jsonl"
MANIFEST, VECTORS, ITEMS, CHECKPOINT, FAILED = (
    "manifest.json",
    "index.faiss",
    "items.arrow",
    "checkpoint",
    "failed.jsonl",
)
REMOVED = "removed.npy"


@dataclass(frozen=True)
class FileInfo:
    """Length in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What was added to a version after it was built: a folder beside it with vectors and items of its own."""

    folder: str
    count: int  # of rows, removed ones included
    kind: str
    sources: list[str]  # the galleries as they were given


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a version is and how it came to be."""

    version: int
    fingerprint: str  # of the encoder
    count: int  # of items that can be found
    dim: int
    kind: str  # FAISS index_factory string
    reason: str  # why this kind
    milvus: str = ""  # URI of the Milvus that holds the vectors, "" where index.faiss does
    gpu: bool  # searched on a GPU where there is one
    requested_kind: str  # as it was asked for, such as "auto"
    requested_memory: int | None  # bytes that the index may take, as asked for
    target_recall: float  # at 10, against exact search
    source: str  # the gallery as it was given
    root: str  # what relative locations of pictures start from
    checkpoint: str  # where the model was copied from
    checkpoint_signature: str  # hash over that directory's files
    gallery_signature: str
    created: str  # UTC, ISO 8601
    failed: int  # pictures that could not be read
    measured: dict[str, Any]  # recall_at_10, parameters, latencies in ms, bytes, ..
    files: dict[str, FileInfo]  # by path relative to the version
    additions: list[Addition] = field(default_factory=list)
    removed: int = 0  # rows that are never found
    rebuild: str = ""  # why a rebuild from a gallery is worth it by now
    cutoff: dict[str, Any] = field(default_factory=dict)  # of "auto" min_score, see cutoff.py; empty: not calibrated
    runtime: str = ""  # what ran the encoder; "" in versions that are older than this field
    replaced: int | None = None  # the version that was current before; None: the first, or older than this field
    exact: bool = False  # pictures to pixels bit for bit as open_clip does it
    metric: str = "inner_product"
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """With a checksum over all other values, so that a changed manifest is noticed."""
        values = asdict(self)
        return values | {"checksum": hashlib.sha256(canonical_json(values)).hexdigest()}

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest.json.

        Raises:
            ArtifactError: missing, changed, or of another format.
        """
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
