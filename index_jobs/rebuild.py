"""Encode, build, publish: from a gallery and a checkpoint to a published index, after every retraining.

- Nothing is done twice: an unchanged gallery, checkpoint and kind give back the current version at once, and a killed
  run goes on from its last whole shard.
- What can be wrong is found early: gallery, lock, output, checkpoint and kind are checked before the first picture.
- The checkpoint is copied first and loaded from the copy, so the model in the version is the one that encoded it.
- This module imports nothing heavy: `--help` and a wrong flag answer at once, worker processes start fast.
"""

import datetime
import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.errors import ArtifactError, CheckpointError, DataError, DcarError, LockedError, ModelError
from index_jobs.arguments import parser
from index_jobs.artifact import open_current
from index_jobs.files import canonical, sha256_of
from index_jobs.manifest import CHECKPOINT, FAILED, ITEMS, VECTORS, Manifest

if TYPE_CHECKING:
    from dcar_core import Encoder
    from index_jobs.encode import Encoded
    from index_jobs.gallery import Gallery
    from index_jobs.tuning import Queries

logger = logging.getLogger(__name__)

WORK = "work"


@dataclass(frozen=True)
class RebuildSummary:
    """What a rebuild did. `encoded` pictures by this run, `resumed` by an earlier one that did not get to its end."""

    index: str
    version: int
    reused: bool
    count: int
    failed: int
    encoded: int
    resumed: int
    seconds: float
    images_per_second: float
    fingerprint: str
    dim: int
    kind: str
    reason: str
    measured: dict[str, Any]


def rebuild(
    gallery: str | Path,
    checkpoint: Path,
    out: Path,
    *,
    kind: str = "auto",
    memory: int | None = None,
    target_recall: float = 0.99,
    workers: int | None = None,
    batch_size: int = 64,
    keep: int = 3,
    max_failed: float = 0.05,
    progress: bool = True,
    force: bool = False,
    keep_shards: bool = False,
    shard_rows: int = 1024,
    device: str = "auto",
) -> RebuildSummary:
    """Publish an index of a gallery, made with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL; see `index_jobs.gallery`.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory; made when it is missing.
        kind: "auto", a name of `index_jobs.kinds`, or a FAISS index_factory string.
        memory: bytes that the index may take, None for half of the machine's or container's.
        target_recall: at 10 against exact search; what search parameters are tuned for.
        workers: decoding processes; 0 for threads of this process, None to choose.
        batch_size: pictures in one forward pass.
        keep: versions to keep, the new one included.
        max_failed: the share of pictures that may be unreadable, 0 to 1.
        progress: a bar on stderr.
        force: encode and publish although nothing has changed.
        keep_shards: leave the vector shards in `out/work` after publishing.
        shard_rows: pictures in a shard, the most that a killed run loses.
        device: where to encode: "auto", "cpu", "cuda", ..

    Raises:
        DataError: the gallery cannot be used, too many pictures are broken, or the kind is unknown.
        CheckpointError, ModelError: the model cannot be loaded.
        LockedError: another job is writing to `out`.
        ArtifactError: a shard is corrupted, or what was written does not read back.
        DcarError: the output cannot be written; what was published before is unchanged.
    """
    start = time.perf_counter()
    try:
        from index_jobs import gallery as galleries

        scanned = galleries.scan(gallery)
        signature = _checkpoint_signature(checkpoint)
        wanted = _Wanted(scanned, kind, memory, target_recall, max_failed)
        if not force and (same := wanted.published(out, checkpoint_signature=signature)):
            return _summary(out, same, start)
        return _rebuild(
            wanted, checkpoint, signature, out, start, workers=workers, batch_size=batch_size, keep=keep,
            progress=progress, force=force, keep_shards=keep_shards, shard_rows=shard_rows, device=device,
        )  # fmt: skip
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise DcarError(
            f"the index {out} cannot be written: {error.strerror or error}{place}; what was published before is "
            f"unchanged, and the same command goes on where it stopped"
        ) from error


@dataclass(frozen=True)
class _Wanted:
    gallery: "Gallery"
    kind: str
    memory: int | None
    target_recall: float
    max_failed: float

    def published(self, out: Path, **same: str) -> Manifest | None:
        """The current version's manifest if it is what is wanted."""
        try:
            manifest = open_current(out).manifest
        except ArtifactError:
            return None
        fits = (
            manifest.gallery_signature == self.gallery.content_signature
            and manifest.source == self.gallery.source
            and manifest.requested_kind == self.kind
            and manifest.requested_memory == self.memory
            and manifest.target_recall == self.target_recall
            and not manifest.additions
            and not manifest.removed
            and manifest.failed <= self.max_failed * len(self.gallery)
            and all(getattr(manifest, name) == value for name, value in same.items())
        )
        return manifest if fits else None


def _rebuild(
    wanted: _Wanted,
    checkpoint: Path,
    signature: str,
    out: Path,
    start: float,
    *,
    workers: int | None,
    batch_size: int,
    keep: int,
    progress: bool,
    force: bool,
    keep_shards: bool,
    shard_rows: int,
    device: str,
) -> RebuildSummary:
    from dcar_core import Encoder
    from dcar_core.checkpoint import copy_checkpoint
    from index_jobs import build, gpu, kinds, publish
    from index_jobs.encode import encode, write_failed
    from index_jobs.items import write_items
    from index_jobs.vectors import write_faiss

    gallery = wanted.gallery
    with publish.writing(out) as staging:
        copy_checkpoint(checkpoint, staging / CHECKPOINT)
        encoder = Encoder.load(staging / CHECKPOINT, device=device)
        if not force and (same := wanted.published(out, fingerprint=encoder.fingerprint)):
            return _summary(out, same, start)
        room: dict[str, Any] = {
            "memory": wanted.memory,
            "gpu_memory": gpu.memory() if _wants_gpu(wanted.kind, device) else 0,
        }
        # An unknown kind is an error now, not after encoding.
        kinds.choose(wanted.kind, len(gallery), encoder.dim, **room)
        encoded = encode(
            gallery, encoder, out / WORK, workers=workers, batch_size=batch_size, shard_rows=shard_rows,
            max_failed=wanted.max_failed, progress=progress,
        )  # fmt: skip
        rows = encoded.rows()
        choices = kinds.choose(wanted.kind, len(rows), encoder.dim, **room)
        logger.info("%d vectors: %s (%s)", len(rows), choices[0].factory, choices[0].reason)
        built = build.build(
            encoded.blocks, len(rows), encoder.dim, choices, _caption_queries(gallery, encoder),
            target=wanted.target_recall,
        )  # fmt: skip
        write_faiss(built.index, staging / VECTORS)
        write_items(staging / ITEMS, gallery.table, rows)
        write_failed(staging / FAILED, gallery, encoded.failed)
        manifest = Manifest(
            version=0,
            fingerprint=encoder.fingerprint,
            count=len(rows),
            dim=encoder.dim,
            kind=built.choice.factory,
            reason=built.choice.reason,
            gpu=built.choice.gpu,
            requested_kind=wanted.kind,
            requested_memory=wanted.memory,
            target_recall=wanted.target_recall,
            source=gallery.source,
            root=gallery.root,
            checkpoint=str(checkpoint.absolute()),
            checkpoint_signature=signature,
            gallery_signature=gallery.content_signature,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            failed=len(encoded.failed),
            measured=built.measured | {"bytes": (staging / VECTORS).stat().st_size},
            files={},
        )
        manifest = publish.publish(out, staging, manifest, keep=keep)
        if not keep_shards:
            publish.discard(out, out / WORK)
    return _summary(out, manifest, start, encoded)


def _wants_gpu(kind: str, device: str) -> bool:
    return kind.startswith("gpu-") or (kind == "auto" and device.startswith("cuda"))


def _caption_queries(gallery: "Gallery", encoder: "Encoder") -> "Queries | None":
    """Captions as held-out queries, evenly spread, when half of the pictures have one."""
    import numpy as np

    from index_jobs.tuning import MAX_QUERIES, Queries

    step = max(1, -(-len(gallery) // MAX_QUERIES))
    picked = gallery.table["caption"].take(list(range(0, len(gallery), step))).to_pylist()
    captions = [caption for caption in picked if caption]
    if 2 * len(captions) < len(picked):
        return None
    return Queries(encoder.encode_text(captions), "captions", np.full(len(captions), -1))


def _checkpoint_signature(checkpoint: Path) -> str:
    """A hash over the directory's files, so that an unchanged checkpoint is known without loading a model.

    The configuration holds a hash of the backbone, so it stands for that as well.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no checkpoint directory; `dcar train --out DIR` writes one")
    files = {path.name: sha256_of(path) for path in checkpoint.iterdir() if path.is_file()}
    return hashlib.sha256(canonical(files)).hexdigest()


def _summary(out: Path, manifest: Manifest, start: float, encoded: "Encoded | None" = None) -> RebuildSummary:
    return RebuildSummary(
        index=str(out),
        version=manifest.version,
        reused=encoded is None,
        count=manifest.count,
        failed=manifest.failed,
        encoded=encoded.encoded if encoded else 0,
        resumed=encoded.resumed if encoded else 0,
        seconds=round(time.perf_counter() - start, 3),
        images_per_second=round(encoded.encoded / encoded.seconds, 1) if encoded and encoded.encoded else 0.0,
        fingerprint=manifest.fingerprint,
        dim=manifest.dim,
        kind=manifest.kind,
        reason=manifest.reason,
        measured=manifest.measured,
    )


def exit_code(error: DcarError) -> int:
    """The exit code for an error, as `--help` lists them."""
    if isinstance(error, DataError):
        return 3
    if isinstance(error, CheckpointError | ModelError):
        return 4
    return 5 if isinstance(error, LockedError) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = vars(parser().parse_args(argv))
    quiet = arguments.pop("quiet")
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("index_jobs").setLevel(level)
    try:
        summary = rebuild(**arguments, progress=not quiet)
    except DcarError as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
        return 130
    sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
