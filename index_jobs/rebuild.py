"""Publish an index from a gallery and a checkpoint: `rebuild` and `python -m index_jobs.rebuild`.

Nothing heavy is imported here, so `--help` is instant and worker processes start fast.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dcar_core.util.console import run_command
from index_jobs.jobs.cli import EPILOG, build_command

if TYPE_CHECKING:
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.summary import RebuildSummary


def rebuild(
    gallery: "str | Path | Sequence[str] | Gallery", checkpoint: Path, out: Path, **options: Any
) -> "RebuildSummary":
    """Publish an index of a gallery, encoded with a checkpoint; see `index_jobs.jobs.build.rebuild`."""
    from index_jobs.jobs import build

    return build.rebuild(gallery, checkpoint, out, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m index_jobs.rebuild` and return its exit status."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"default_map": {"as_json": True}},
    )
    app.command(epilog=EPILOG)(build_command)
    return run_command(lambda: app(argv, prog_name="python -m index_jobs.rebuild"))


if __name__ == "__main__":
    sys.exit(main())
