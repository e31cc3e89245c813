"""`dcar feedback export` and `dcar feedback forget`: training pairs and judged lists from the feedback log."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from app.cli.options import IndexDir, Out, example

commands = typer.Typer(help="Learn from clicks.")
Log = Annotated[Path | None, Option("--log", help="Directory that DCAR_FEEDBACK names. Default: INDEX/feedback.")]


@commands.command("export", epilog=example("dcar feedback export --index index --out pairs"))
def export_command(
    index: IndexDir,
    out: Out,
    log: Log = None,
    collection: Annotated[str | None, Option(help="Collection. Default: the name of the index directory.")] = None,
    min_clients: Annotated[int, Option(min=1, help="Clients that a pair needs.")] = 2,
    client_cap: Annotated[int, Option(min=1, help="Most searches of one client that count.")] = 100,
    item_cap: Annotated[int, Option(min=1, help="Most queries of one item.")] = 100,
    judge: Annotated[list[str] | None, Option(help="A client whose judgements count alone; may be repeated.")] = None,
) -> None:
    """Write training pairs (OUT/pairs.jsonl) and judged lists (judgements.csv, qrels.txt).

    Position bias is corrected by inverse propensity, which a position-based click model (EM) estimates from items that
    a query showed at several positions. OUT/report.json counts what was left out.
    """
    from app.feedback.export import Options, export
    from index_jobs.store.versions import open_current

    options = Options(min_clients, client_cap, item_cap, frozenset(judge or ()))
    name = collection or index.resolve().name
    report = export(log or index / "feedback", open_current(index), name, out, options)
    typer.echo(str(report))
    images = f" --images {report.images}" if report.images else ""
    typer.echo(f"{out}: dcar train --data {out}{images} ...")


@commands.command("forget", epilog=example("dcar feedback forget 5f0c2a --log index/feedback"))
def forget_command(
    client: Annotated[str, Argument(help="The client_id of the events.")],
    log: Annotated[Path, Option("--log", help="Directory of the log.")],
) -> None:
    """Remove a client's events from the log, and the searches that only it acted on; a service may be running."""
    from app.feedback.store import forget, read_log

    read_log(log)  # refuses another directory
    typer.echo(f"{log}: {forget(log, client):,} events removed")
