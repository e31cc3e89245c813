"""Collections created over HTTP: index directories below a folder of collections.

FOLDER/.lock                    held while a collection is put into the folder
FOLDER/<hash>/collection.json   the name of a collection; that of its folder is a hash
                                of it
FOLDER/<hash>/checkpoint/       the model that its items are encoded with
FOLDER/<hash>/...               the index, once the first items are published; until
                                then `empty_version`
"""

import hashlib
import json
import logging
import secrets
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

from dcar_core.model.checkpoint import copy_checkpoint
from dcar_core.util.files import fsync_path, fsync_tree, write_json
from dcar_core.util.processes import hold_lock
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.job_queue import JobQueue
from index_jobs.index.manifest import CHECKPOINT, Manifest
from index_jobs.spec import IndexSpec

logger = logging.getLogger(__name__)

_DESCRIPTION = "collection.json"
_NEW = ".new-"
_OLD = ".old-"
_LOCK = ".lock"
_DROP_S = 2.0


def empty_version(index: Path, fingerprint: str, dim: int) -> IndexVersion:
    """Return version 0 of a created collection, without rows; its model has this
    fingerprint and vectors (dim,).
    """
    manifest = Manifest(spec=IndexSpec(fingerprint=fingerprint), dim=dim, kind="Flat")
    return IndexVersion(index, manifest, [])


def list_collections(folder: Path) -> dict[str, Path]:
    """Return the index directories of the created collections by name. One without a
    readable name is logged.
    """
    collections = {}
    for path in sorted(folder.glob(f"[0-9a-f]*/{_DESCRIPTION}")):
        try:
            collections[json.loads(path.read_bytes())["name"]] = path.parent
        except FileNotFoundError:  # dropped meanwhile
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            _report(path, str(error))
    return collections


@cache
def _report(path: Path, reason: str) -> None:
    """Log a damaged description once: it is read every few seconds."""
    logger.error(
        "the collection in %s is not served: %s cannot be read: %s",
        path.parent,
        path.name,
        reason,
    )


def create_collection(folder: Path, name: str, checkpoint: Path) -> None:
    """Create a collection without items, with a copy of a checkpoint, unless there is
    one of this name.
    """
    target = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
    staging = folder / f"{_NEW}{secrets.token_hex(8)}"
    with hold_lock(
        folder / _LOCK,
        f"another collection is being created in {folder}",
        wait_s=-1,
    ):
        if (target / _DESCRIPTION).exists():  # another request has created it
            return
        try:
            copy_checkpoint(checkpoint, staging / CHECKPOINT)
            write_json(staging / _DESCRIPTION, {"name": name})
            fsync_tree(staging)
            with suppress(FileNotFoundError):
                # a drop that waits for another one makes the folder again, for its lock
                _put_aside(target)
            staging.rename(target)
            fsync_path(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def drop_collection(index: Path) -> None:
    """Remove a created collection with its versions and images. Raise LockedError if
    its jobs are being applied.
    """
    # for as long as another drop, or a change of metadata, takes at most
    with JobQueue(index).lock(_DROP_S):
        _put_aside(index)  # a killed removal leaves no half of it
    for leftover in index.parent.glob(f"{_OLD}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _put_aside(index: Path) -> None:
    index.rename(index.with_name(f"{_OLD}{secrets.token_hex(8)}"))
