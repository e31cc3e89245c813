"""The folder of vectors that builds keep for the next one.

`out/work` holds the vectors of the served version, and those of one rejected or interrupted build. The next build by
the same encoder takes what it can use from both, also if the gallery has changed in between.
"""

import contextlib
import hashlib
from pathlib import Path

from dcar_core.util.files import canonical_json
from index_jobs.encoding.shards import ShardStore
from index_jobs.store import publish
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import Manifest

WORK = "work"


def clean_work(out: Path, store: ShardStore, served: Artifact | None, *, keep_reusable: bool = False) -> None:
    """Remove vectors other than this job's and the served version's.

    Args:
        keep_reusable: keep the largest other folder that this job can take vectors from.
    """
    kept = {store.path}
    if served is not None:
        kept |= {marker.parent for marker in (out / WORK).glob(f"*/{_marker(served.manifest)}")}
    if keep_reusable:
        others = (folder for folder in store.other_folders() if folder not in kept)
        kept.add(max(others, key=_count_bytes, default=store.path))
    publish.clean_work(out, out / WORK, lambda path: path in kept)


def keep_vectors(out: Path, own: Path, manifest: Manifest) -> None:
    """Keep the folder with the published version's vectors, and remove all others."""
    for leftover in own.glob(".*.tmp"):  # of a killed job
        leftover.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # without the marker, the next build encodes again
        (own / _marker(manifest)).touch()
    publish.clean_work(out, out / WORK, lambda path: path == own)


def discard_vectors(out: Path) -> None:
    """Remove all vectors."""
    publish.remove_directory(out, out / WORK)


def _marker(manifest: Manifest) -> str:
    """Return the name of the file that marks a version's vectors; versions that differ only in their kind share it."""
    inputs = [manifest.fingerprint, manifest.spec.gallery_signature, manifest.runtime]
    return f"of-{hashlib.sha256(canonical_json(inputs)).hexdigest()[:16]}"


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
