"""Options of a rebuild, with their defaults."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RebuildOptions:
    """Options of a rebuild; `dcar index build --help` describes them. Raise ValueError if a number is out of range."""

    kind: str = "auto"
    milvus: str | None = None
    text_fields: Sequence[str] | None = None
    group_field: str = ""
    memory: int | None = None  # bytes
    target_recall: float = 0.99
    workers: int | None = None
    batch_size: int = 64
    keep: int = 3
    max_failed: float = 0.05
    max_vanished: float = 0.2
    validation: Path | None = None
    margin: float = 0.02
    force: bool = False
    notify: Sequence[str] = ()
    keep_shards: bool = True
    shard_rows: int = 1024
    device: str = "auto"
    exact: bool = False
    pixel_cache: Path | None = None
    ray: str | None = None
    runtime: str = "torch"
    progress: bool = True
    on_encoded: Callable[[int], None] | None = None  # called with a number of images once they have vectors

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_rows < 1:
            raise ValueError(
                f"batch_size and shard_rows must be at least 1, not {self.batch_size} and {self.shard_rows}"
            )
        for name in ("max_failed", "max_vanished"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
