"""Which encoders make a gallery's vectors: on the devices and the runtime asked for, or on the one that has begun.

- Vectors of two runtimes differ in their last digits, so shards are kept apart by runtime.
- "auto" measures what is fastest, and may find another one on another day. Where a job has begun, "auto" goes on with
  the runtime that began it, so that nothing is encoded twice. A runtime that was named is used, and encodes anew.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS
from dcar_core.util.errors import DcarError
from index_jobs.encoding.devices import ImageEncoder, load_replicas
from index_jobs.encoding.encoding_state import shard_store
from index_jobs.gallery.scan import Gallery
from index_jobs.options import RebuildOptions

if TYPE_CHECKING:
    from dcar_core import Encoder

logger = logging.getLogger(__name__)


def choose_replicas(
    gallery: Gallery,
    checkpoint: Path,
    work: Path,
    *,
    device: str = "auto",
    exact: bool = False,
    runtime: str = "torch",
    batch_size: int = RebuildOptions.batch_size,
    shard_rows: int = RebuildOptions.shard_rows,
) -> "list[Encoder]":
    """As `load_replicas`, with the runtime that has begun this gallery's shards where the choice is free.

    Raises:
        CheckpointError, ModelError: the model or the runtime cannot be loaded, or a device is not there.
    """
    lanes = load_replicas(checkpoint, device, exact=exact, runtime=runtime)
    fastest = lanes[0].runtime.name
    if (
        runtime != AUTO
        or (begun := runtime_in_use(gallery, lanes[0], fastest, work, batch_size, shard_rows)) == fastest
    ):
        return lanes
    try:
        others = {id(lane): lane.with_runtime(begun) for lane in lanes}
    except DcarError as error:
        logger.warning("vectors of %s are there, but are made anew with %s: %s", begun, fastest, error)
        return lanes
    logger.info("going on with %s, which began, although %s is faster here", begun, fastest)
    return [others[id(lane)] for lane in lanes]


def runtime_in_use(
    gallery: Gallery, encoder: ImageEncoder, fastest: str, work: Path, batch_size: int, shard_rows: int
) -> str:
    """The runtime whose shards of this gallery are there; `fastest` where none are, or some of several."""
    for name in (fastest, *RUNTIME_KINDS):
        if shard_store(gallery, encoder, name, work, batch_size, shard_rows).rows_there():
            return name
    return fastest
