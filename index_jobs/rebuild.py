"""Publish an index: `rebuild`, and its command, `dcar index build` and `python -m
index_jobs.rebuild`.

Nothing heavy is imported here, so `--help` is instant and worker processes start fast.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dcar_core.util.console import run_command, show_progress
from dcar_core.util.options import command, option, with_options
from index_jobs.spec import BuildOptions, IndexSpec

if TYPE_CHECKING:
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.build import RebuildSummary


@with_options(BuildOptions)
@with_options(IndexSpec)
def build_command(
    *,
    galleries: list[str] = option(
        help=(
            "Images to index: a folder (with tars and metadata.jsonl, if any), an"
            " uncompressed .tar, or a .jsonl, .csv or .parquet list with a column"
            " file_name, image, path or url. A path, or a URL: s3://, gs://, https://."
            " May be repeated: ids and names in further galleries begin with NAME/, or"
            " with the location's own name."
        ),
        flags=("--gallery",),
        metavar="[NAME=]LOCATION",
    ),
    checkpoint: Path = option(
        help="Checkpoint of `dcar train` or `dcar zero-shot`.", metavar="DIR"
    ),
    out: Path = option(
        help="Index directory, created if missing, or its URL: s3://, gs://, az://.",
        metavar="DIR",
    ),
    as_json: bool = option(
        False,
        "Print the summary as JSON or as text. `python -m index_jobs.rebuild` prints"
        " JSON by default, `dcar index build` text.",
        flags=("--json/--text",),
        show_default=False,
    ),
    quiet: bool = option(False, "Print warnings and errors only, no progress."),
    **options: Any,
) -> None:
    """Encode a gallery with a checkpoint, build an index, verify it and publish it as
    the current version.

    Running services load the new version by themselves. An interrupted build resumes
    when the same command is run again; an unchanged gallery and checkpoint finish at
    once. The summary goes to stdout, progress to stderr. Exit codes:
    docs/reference/exit-codes.md.
    """
    show_progress(quiet=quiet)
    summary = rebuild(galleries, checkpoint, out, progress=not quiet, **options)
    typer.echo(json.dumps(asdict(summary), indent=2) if as_json else summary.to_text())


def rebuild(
    gallery: "str | Path | Sequence[str] | Gallery",
    checkpoint: Path,
    out: Path,
    **options: Any,
) -> "RebuildSummary":
    """Publish an index of a gallery, encoded with a checkpoint; see
    `index_jobs.jobs.build.rebuild`.
    """
    from index_jobs.jobs import build

    return build.rebuild(gallery, checkpoint, out, **options)


def add_build_command(group: typer.Typer) -> None:
    example = "dcar index build --gallery photos --checkpoint checkpoint --out index"
    command(group, "build", example)(build_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m index_jobs.rebuild`, whose summary is JSON, and return its exit
    status.
    """
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"default_map": {"as_json": True}},
    )
    add_build_command(app)
    return run_command(lambda: app(argv, prog_name="python -m index_jobs.rebuild"))


if __name__ == "__main__":
    sys.exit(main())
