"""Publish an index from a gallery and a checkpoint: `rebuild` and `python -m index_jobs.rebuild`.

Nothing heavy is imported here, so `--help` is instant and worker processes start fast.
"""

import sys
from collections.abc import Sequence

import typer

from dcar_core.util.command import run_command
from index_jobs.jobs.command_line import EPILOG, build_command
from index_jobs.jobs.rebuild_entry import rebuild

__all__ = ["main", "rebuild"]


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
