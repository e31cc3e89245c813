"""Choice of the encoders of a gallery: the requested devices and runtime, or the runtime that made existing shards.

- Vectors of two runtimes differ in their last digits, so their shards are kept apart.
- "auto" may take another runtime after an installation. Where a job has begun, "auto" continues with its runtime, so
  that nothing is encoded twice. A named runtime is always used.
"""

import logging
from pathlib import Path

from dcar_core import Encoder
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS
from dcar_core.util.errors import DcarError
from index_jobs.encoding.devices import load_replicas
from index_jobs.encoding.encoding_state import shard_store
from index_jobs.gallery.scan import Gallery
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)


def choose_replicas(gallery: Gallery, checkpoint: Path, work: Path, options: BuildOptions) -> list[Encoder]:
    """Load replicas as `load_replicas` does; "auto" continues with the runtime of this gallery's shards."""
    replicas = load_replicas(checkpoint, options.device, exact=options.spec.exact, runtime=options.spec.runtime)
    fastest = replicas[0].runtime.name
    begun = runtime_in_use(gallery, replicas[0], fastest, work, options) if options.spec.runtime == AUTO else fastest
    if begun == fastest:
        return replicas
    try:
        others = {id(replica): replica.with_runtime(begun) for replica in replicas}
    except DcarError as error:
        logger.warning("the vectors of %s cannot be continued and are made again with %s: %s", begun, fastest, error)
        return replicas
    logger.info("continuing with %s, which made the existing vectors, although %s is faster here", begun, fastest)
    return [others[id(replica)] for replica in replicas]


def runtime_in_use(gallery: Gallery, encoder: Encoder, fastest: str, work: Path, options: BuildOptions) -> str:
    """Return the runtime that has shards of this gallery; `fastest` if none has, or if it is among several."""
    for name in (fastest, *RUNTIME_KINDS):
        if shard_store(gallery, encoder, name, work, options).stored_rows():
            return name
    return fastest
