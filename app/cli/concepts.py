"""`dcar concepts`: teach, list and forget names. It needs no model, since an index has
the vectors of its items.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from app.cli.options import INDEX, group
from dcar_core.util.errors import DataError
from dcar_core.util.options import command, option
from index_jobs.index.manifest import quantity

if TYPE_CHECKING:
    from app.search.concepts import Concepts, TaughtConcept

NAME = option(help="Letters, digits, - and _.")
commands = group("concepts", help="Teach names by examples; @NAME uses one in a query.")


@command(
    commands,
    "teach",
    "dcar concepts teach index rex 1.jpg 7.jpg 9.jpg --kind dog",
)
def teach(
    index: Path = INDEX,
    name: str = NAME,
    ids: list[str] = option(
        help="Ids of the examples, as in search results.", metavar="ID..."
    ),
    *,
    not_ids: list[str] | None = option(
        None,
        "Id of a similar item that is none.",
        flags=("--not-id",),
    ),
    kind: str = option("", "Word that replaces it in the text of a query."),
) -> None:
    """Let @NAME stand for items like these in queries, in place of what it stood
    for.
    """
    _show(_concepts(index).teach(name, ids, kind, not_ids or ()))


@command(commands, "list", "dcar concepts list index")
def list_concepts(index: Path = INDEX) -> None:
    """List the taught names with their examples and members."""
    for concept in _concepts(index).describe():
        _show(concept)


@command(commands, "forget", "dcar concepts forget index rex")
def forget(index: Path = INDEX, name: str = NAME) -> None:
    """Forget a name; its examples stay in the index."""
    if not _concepts(index).forget(name):
        raise DataError(
            f"no name {name!r} was taught; `dcar concepts list {index}` lists them"
        )
    typer.echo(f"{name} is forgotten")


def _show(concept: "TaughtConcept") -> None:
    counts = (
        f"{quantity(concept['examples'], 'example')},"
        f" {quantity(concept['members'], 'member')}"
    )
    typer.echo(f"{concept['name']}: {counts}, cut-off {concept['cutoff']:.3f}")


def _concepts(index: Path) -> "Concepts":
    from app.search.concepts import Concepts
    from index_jobs.index.versions import open_current

    version = open_current(index)
    return Concepts(version, version.vectors)
