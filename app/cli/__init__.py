"""The `dcar` command: train, evaluate, index, serve and search; one module for each
group of subcommands.

In: command line arguments. Out: text on stdout, errors in one line on stderr, and an
exit status by kind of error. Nothing imports it; it may import everything, and does so
lazily, so that `--help` answers at once.
"""

from importlib.metadata import entry_points

from app.cli import concepts, data, feedback, indexing, serving, training
from app.cli.options import app, group
from dcar_core.util.console import run_command
from dcar_core.util.errors import DcarError
from dcar_core.util.options import command

__all__ = [
    "add_plugins",
    "app",
    "concepts",
    "data",
    "feedback",
    "indexing",
    "main",
    "serving",
    "training",
]


def add_plugins() -> None:
    """Add the commands of plug-ins: entry points with names such as `data.caption`."""
    for entry in entry_points(group="dcar.commands"):
        *names, name = entry.name.split(".")
        parent = app
        for part in names:
            parent = group(part, parent)
        try:
            command(parent, name)(entry.load())
        except Exception as error:
            raise DcarError(
                f"the plug-in {entry.value} cannot be loaded ({error}); update or"
                " uninstall it"
            ) from error


def _run() -> None:
    add_plugins()
    app()


def main() -> None:
    raise SystemExit(run_command(_run))
