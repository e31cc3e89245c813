"""What a rebuild is asked for, and what it reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcar_core.util.errors import GateError


@dataclass(frozen=True)
class RebuildSummary:
    """What a rebuild did. `encoded` pictures by this run, `resumed` from vectors that an earlier one left.

    version: the new one, or the one that goes on being served. gate: how both compare; see `gate.Verdict`. notified:
    what came of telling each service. unread: those of the failed whose bytes could not be had. hint: what to do next,
    "" for nothing.
    """

    index: str
    version: int
    published: bool
    reused: bool
    count: int
    failed: int
    unread: int
    duplicates: int
    encoded: int
    resumed: int
    seconds: float
    images_per_second: float
    fingerprint: str
    dim: int
    kind: str
    reason: str
    measured: dict[str, Any]
    gate: dict[str, Any] | None
    notified: dict[str, str]
    hint: str


class RejectedError(GateError):
    """The rebuilt index is worse than the one that is served; `summary` tells by how much."""

    def __init__(self, summary: RebuildSummary, reason: str, *, kept: bool) -> None:
        """kept: whether its vectors are, until another job needs their room."""
        super().__init__(
            f"not published, since the rebuilt index ranks worse than version {summary.version}: {reason}; "
            + ("its vectors are kept, so that --force publishes it without encoding again" if kept else
               "--force publishes it all the same; its vectors were not to be kept, so that it is encoded again")
        )  # fmt: skip
        self.summary = summary


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to rebuild.

    kind: "auto", a name of `index_jobs.building.kinds`, or a FAISS index_factory string.
    milvus: URI of a Milvus that is to hold the vectors, or a file for Milvus Lite; None for a FAISS file.
    memory: bytes that the index may take, None for half of the machine's or container's.
    target_recall: at 10 against exact search; what search parameters are tuned for.
    workers: decoding processes; 0 for threads of this process, None to choose.
    batch_size: pictures in one forward pass.
    keep: versions to keep, the new one included.
    max_failed: the share of pictures that may be unreadable, 0 to 1.
    validation: a data set whose val pairs compare the new index with the served one and give the cut-off that
        `min_score: "auto"` means; None for the gallery's captions, and no cut-off.
    margin: how much worse its recall may be.
    force: publish although nothing has changed, or although the new index is worse or cannot be compared with the one
        that is served. Pictures that could not be read are tried again.
    notify: URLs of services to tell; see `notify.notify`.
    keep_shards: leave the vectors in `out/work`, also of an index that was not published, so that another kind needs no
        encoding.
    shard_rows: pictures in a shard, the most that a killed run loses.
    device: where to encode: "auto" (every GPU, or the CPU), "cpu", "cuda:1", "cuda:0,cuda:1", ..
    exact: pictures to pixels bit for bit as open_clip does it, instead of decoding JPEGs at reduced scale.
    pixel_cache: a directory where decoded pictures are kept, so that the next rebuild need not decode them.
    ray: the address of a Ray cluster to encode on, "auto" or "local"; see `index_jobs.encoding.ray_cluster`.
    runtime: what runs the encoder: "torch", "auto", or another name; see docs/how-to/choose-a-runtime.md.
    progress: a bar on stderr.
    """

    kind: str = "auto"
    milvus: str | None = None
    memory: int | None = None
    target_recall: float = 0.99
    workers: int | None = None
    batch_size: int = 64
    keep: int = 3
    max_failed: float = 0.05
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
