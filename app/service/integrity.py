"""A check of a served version's files against the checksums of its manifest, in the background.

Opening compares only their lengths, since hashing a large index takes minutes. A flipped bit would give wrong results
and no error.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dcar_core.util.errors import ArtifactError
from index_jobs.store.artifact import Artifact

_BLOCK = 1 << 20
_IDLE = 3.0  # seconds of sleep per second of reading and hashing


class _EndedError(Exception):
    pass


def find_damage(artifact: Artifact, is_served: Callable[[], bool]) -> str | None:
    """Return which file differs from its checksum or cannot be read; None if all are whole.

    Run it in a thread of its own, whose priority it lowers. It ends early once `is_served` returns False.
    """
    if sys.platform == "linux":  # where a priority may be that of one thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    try:
        artifact.verify(hash_of=partial(_hash_slowly, is_served=is_served))
    except _EndedError:
        return None
    except ArtifactError as error:
        return str(error) if is_served() else None  # an old version may have been deleted meanwhile
    return None


def _hash_slowly(path: Path, *, is_served: Callable[[], bool]) -> str:
    """Return the sha256 of a file, in a quarter of the time of one core and of the disk."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while is_served():
            started = time.perf_counter()
            block = file.read(_BLOCK)
            if not block:
                return digest.hexdigest()
            digest.update(block)
            time.sleep(_IDLE * (time.perf_counter() - started))
    raise _EndedError
