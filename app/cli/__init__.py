"""The `dcar` command: train, evaluate, index, serve and search; one module for each group of subcommands.

In: command line arguments. Out: text on stdout, errors in one line on stderr, and an exit status that says which kind.
Nothing imports it; it may import everything, and does so lazily, so that `--help` answers at once.
"""

import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from app.cli import benchmarking, datasets, indexing, keys, serving, training
from dcar_core.util.console import prepare_streams
from dcar_core.util.errors import DcarError
from dcar_core.util.files import DISK_ERRORS

_INTERRUPTED = 130

app = typer.Typer(
    name="dcar",
    help="Image-text retrieval that knows fine-grained differences.\n\n"
    "Adapt CLIP to your catalogue (train), turn its pictures into an index (index build), and search it from the "
    "command line (search) or as a service (serve). `dcar demo` shows all of it on a bundled example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dcar {version('dcar')}")
        raise typer.Exit


@app.callback()
def _every_command(
    show: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and end.")] = False,
) -> None:
    pass


app.add_typer(training.commands)
app.add_typer(datasets.commands, name="data")
app.add_typer(indexing.commands, name="index")
app.add_typer(serving.commands)
app.add_typer(benchmarking.commands)
app.add_typer(keys.commands)


def main() -> None:
    """Entry point: a DcarError, or a file that cannot be used, is a message for the user, not a traceback."""
    prepare_streams()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo("dcar: interrupted; of a job or a training, the same command goes on where it stopped", err=True)
        raise
    except DcarError as error:
        typer.echo(f"dcar: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # what the system says of a file that the user named; without one it is our bug
        if error.errno in DISK_ERRORS:
            place = error.filename2 or error.filename
            told = f"dcar: {f'{place}: ' if place else ''}{error.strerror}; what was whole before is unchanged"
            typer.echo(f"{told}, and of a job or a training, the same command goes on", err=True)
            raise SystemExit(1) from None
        if error.filename is None or not error.strerror:
            raise
        typer.echo(f"dcar: {error.filename}: {error.strerror}", err=True)
        raise SystemExit(1) from None
