"""Collections that were created over HTTP: one folder each, whose name is a hash of the collection's.

FOLDER/<hash>/collection.json   the collection's name
FOLDER/<hash>/checkpoint/       the model that its items are encoded with
FOLDER/<hash>/...               an index directory, once the first items are published; until then `EmptyArtifact`
"""

import hashlib
import json
import logging
import secrets
import shutil
from functools import cache
from pathlib import Path

import numpy as np

from dcar_core.model.checkpoint import copy_checkpoint
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.files import fsync_path, fsync_tree, write_json
from index_jobs.spec import IndexSpec
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import CHECKPOINT, Manifest
from index_jobs.store.segments import Segments
from index_jobs.store.writes.write_queue import WriteQueue

logger = logging.getLogger(__name__)

_DESCRIPTION = "collection.json"
_NEW, _OLD = ".new-", ".old-"


class EmptyArtifact(Artifact):
    """A created collection before its first items: version 0, without rows."""

    def __init__(self, index: Path, fingerprint: str, dim: int) -> None:
        """Describe the collection in directory `index`, whose model has this fingerprint and vectors (dim,)."""
        self.path, self._items = index, {}
        self.manifest = Manifest(spec=IndexSpec(fingerprint=fingerprint), dim=dim, kind="Flat")
        Segments.__init__(self, [], np.empty(0, np.int64))

    def vectors(self, rows: Rows) -> Floats:
        """Return no vectors, float32 (0, E)."""
        return np.empty((0, self.manifest.dim), np.float32)

    def find_gallery_fault(self, folder: str = "") -> str | None:
        """Return None: no image can be gone."""
        return None


def list_collections(folder: Path) -> dict[str, Path]:
    """Return the index directories of the created collections by name. One without a readable name is logged."""
    found = {}
    for path in sorted(folder.glob(f"[0-9a-f]*/{_DESCRIPTION}")):
        try:
            found[json.loads(path.read_bytes())["name"]] = path.parent
        except FileNotFoundError:  # dropped meanwhile
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            _report(path, str(error))
    return found


@cache
def _report(path: Path, reason: str) -> None:
    """Log a damaged description once: it is read every few seconds."""
    logger.error("the collection in %s is not served: %s cannot be read: %s", path.parent, path.name, reason)


def create_collection(folder: Path, name: str, checkpoint: Path) -> None:
    """Create a collection without items, unless there is one of this name.

    Args:
        checkpoint: is copied.
    """
    target = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
    staging = folder / f"{_NEW}{secrets.token_hex(8)}"
    try:
        copy_checkpoint(checkpoint, staging / CHECKPOINT)
        write_json(staging / _DESCRIPTION, {"name": name})
        fsync_tree(staging)
        staging.rename(target)
        fsync_path(folder)
    except OSError:
        if not target.exists():  # otherwise another request has created it
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def drop_collection(index: Path) -> None:
    """Remove a created collection with its versions and images. Raise LockedError if its jobs are being applied."""
    with WriteQueue(index).lock():
        index.rename(index.with_name(f"{_OLD}{secrets.token_hex(8)}"))  # a killed removal leaves no half of it
    for leftover in index.parent.glob(f"{_OLD}*"):
        shutil.rmtree(leftover, ignore_errors=True)
