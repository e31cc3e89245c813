"""The `dcar` command: train, evaluate, index, serve and search; one module for each group of subcommands.

In: command line arguments. Out: text on stdout, errors in one line on stderr, and an exit status by kind of error.
Nothing imports it; it may import everything, and does so lazily, so that `--help` answers at once.
"""

from importlib.metadata import version
from typing import Annotated

import typer
from typer import Option

from app.cli import datasets, feedback, indexing, quickstart, serving, tools, training
from app.cli.adapter import add_plugins
from dcar_core.util.console import run_command

app = typer.Typer(
    name="dcar",
    help="Image-text retrieval that knows fine-grained differences.\n\n"
    "Adapt CLIP to your catalogue (train), turn its images into an index (index build), and search it from the "
    "command line (search) or as a service (serve). `dcar demo` shows all of it on a bundled example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"dcar {version('dcar')}")
        raise typer.Exit


@app.callback()
def _every_command(
    show: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.add_typer(training.commands)
app.add_typer(datasets.commands, name="data")
app.add_typer(indexing.commands, name="index")
app.add_typer(feedback.commands, name="feedback")
app.add_typer(feedback.judging)
app.add_typer(serving.commands)
app.add_typer(quickstart.commands)
app.add_typer(tools.commands)


def _run() -> None:
    add_plugins(app)
    app()


def main() -> None:
    raise SystemExit(run_command(_run))
