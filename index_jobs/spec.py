"""What was asked for in a build: `IndexSpec`, which a version's manifest stores, and `BuildOptions`, how the job runs.

A new option that changes what is published is a field of `IndexSpec` and an option in `jobs.cli`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """Everything that decides the contents of a version. A build whose spec is that of the served version is done.

    The first four fields are of the inputs; a build fills them in. Raise ValueError if a number is out of range.
    """

    gallery: str = ""  # its location, or several with commas between them
    gallery_signature: str = ""  # of the names, files and metadata of the images
    fingerprint: str = ""  # of the encoder
    pairs_signature: str = ""  # of the validation pairs; "" without
    kind: str = "auto"  # of index, as the engine names it
    engine: str = "faiss"  # NAME or NAME=URI; see `engines.registry`
    memory: int | None = None  # bytes that the index may take
    target_recall: float = 0.99  # at 10, against exact search
    text_fields: tuple[str, ...] | None = None  # metadata fields in the lexical index; None for every field with text
    group_field: str = ""  # metadata field that names the product of an item; "" if each item is its own
    max_failed: float = 0.05  # share of images that may be unreadable
    exact: bool = False  # images decoded bit for bit as open_clip does
    runtime: str = "torch"  # that encodes the images

    def __post_init__(self) -> None:
        _require_share("max_failed", self.max_failed)
        if self.text_fields is not None:
            object.__setattr__(self, "text_fields", tuple(self.text_fields))

    @property
    def is_local(self) -> bool:
        """True if the vectors are in files of the index."""
        return "=" not in self.engine


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a build runs. Apart from the spec, nothing here changes what is published.

    `dcar index build --help` describes the options. Raise ValueError if a number is out of range.
    """

    spec: IndexSpec = field(default_factory=IndexSpec)
    workers: int | None = None
    batch_size: int = 64
    keep: int = 3
    max_vanished: float = 0.2
    validation: Path | None = None
    margin: float = 0.02
    force: bool = False
    notify: Sequence[str] = ()
    keep_shards: bool = True
    shard_rows: int = 1024
    device: str = "auto"
    pixel_cache: Path | None = None
    ray: str | None = None
    progress: bool = True
    on_encoded: Callable[[int], None] | None = None  # called with a number of images once they have vectors

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_rows < 1:
            raise ValueError(
                f"batch_size and shard_rows must be at least 1, not {self.batch_size} and {self.shard_rows}"
            )
        _require_share("max_vanished", self.max_vanished)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "BuildOptions":
        """Return the options of flat names, those of the spec included."""
        names = {each.name for each in fields(IndexSpec)}
        spec = IndexSpec(**{name: value for name, value in options.items() if name in names})
        return cls(spec=spec, **{name: value for name, value in options.items() if name not in names})


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share from 0 to 1, not {value}")
