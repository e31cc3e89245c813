"""Encode, build, compare, publish: from a gallery and a checkpoint to a published index, after every retraining.

- Nothing is done twice: an unchanged gallery, checkpoint and kind give back the current version at once, a killed run
  goes on from its last whole shard, and another kind or other captions need no encoding.
- What is served is replaced only by what ranks as well; see `gate`. Running services are told.
- This module imports nothing heavy: `--help` and a wrong flag answer at once, worker processes start fast.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcar_core.util.console import prepare_streams
from dcar_core.util.errors import CheckpointError, DcarError
from dcar_core.util.files import canonical_json, sha256_of
from index_jobs.jobs.command_line import parser
from index_jobs.jobs.job import Job
from index_jobs.options import Options, RebuildSummary, RejectedError
from index_jobs.store.publish import reporting


def rebuild(gallery: str | Path, checkpoint: Path, out: Path, **options: Any) -> RebuildSummary:
    """Publish an index of a gallery, made with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL; see `index_jobs.gallery.scan`.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory; made when it is missing.
        options: the fields of `Options`.

    Raises:
        DataError: the gallery cannot be used, too many pictures are broken, or the kind is unknown.
        CheckpointError, ModelError: the model cannot be loaded; or that of the served version, to compare with, while
            force is not set.
        LockedError: another job is writing to `out`.
        RejectedError: the rebuilt index ranks worse than the one that is served, which goes on being served.
        ArtifactError: a shard is corrupted, or what was written does not read back.
        DcarError: the output cannot be written; what was published before is unchanged.
    """
    start = time.perf_counter()
    chosen = Options(**options)
    with reporting(out):
        from index_jobs.gallery.scan import scan

        scanned = scan(gallery)
        job = Job(scanned, checkpoint, _checkpoint_signature(checkpoint), out, chosen, start)
        if not chosen.force and (same := job.published(checkpoint_signature=job.signature)):
            return job.summary(same)
        return job.run()


def _checkpoint_signature(checkpoint: Path) -> str:
    """A hash over the directory's files, so that an unchanged checkpoint is known without loading a model.

    The configuration holds a hash of the backbone, so it stands for that as well.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no checkpoint directory; `dcar train --out DIR` writes one")
    files = {path.name: sha256_of(path) for path in checkpoint.iterdir() if path.is_file()}
    return hashlib.sha256(canonical_json(files)).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = vars(parser().parse_args(argv))
    quiet = arguments.pop("quiet")
    level = logging.WARNING if quiet else logging.INFO
    prepare_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("index_jobs").setLevel(level)
    try:
        summary = rebuild(**arguments, progress=not quiet)
    except DcarError as error:
        if isinstance(error, RejectedError):
            _print(error.summary)
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
        return 130
    _print(summary)
    return 0


def _print(summary: RebuildSummary) -> None:
    """A job that is done has not failed for want of somebody who hears of it."""
    try:
        sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
        sys.stdout.flush()
    except (DcarError, OSError) as error:
        sys.stderr.write(f"the summary is lost: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
