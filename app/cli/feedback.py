"""`dcar feedback export` and `forget`: training pairs and judged lists from the log; `dcar judge` measures by them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from app.cli.options import Device, IndexDir, Out, example

if TYPE_CHECKING:
    from app.search import Index

commands, judging = typer.Typer(help="Learn from clicks."), typer.Typer()
Log = Annotated[Path | None, Option("--log", help="Directory that DCAR_FEEDBACK names. Default: INDEX/feedback.")]


@commands.command("export", epilog=example("dcar feedback export --index index --out pairs"))
def export_command(
    index: IndexDir,
    out: Out,
    log: Log = None,
    collection: Annotated[str | None, Option(help="Collection. Default: the name of the index directory.")] = None,
    min_clients: Annotated[int, Option(min=1, help="Clients that a pair needs.")] = 2,
    client_cap: Annotated[int, Option(min=1, help="Maximum searches that count per client.")] = 100,
    item_cap: Annotated[int, Option(min=1, help="Maximum queries that count per item.")] = 100,
    judge: Annotated[list[str] | None, Option(help="Count only this client's judgements; may be repeated.")] = None,
) -> None:
    """Write training pairs (OUT/pairs.jsonl) and judged lists (judgements.csv, qrels.txt).

    Position bias is corrected by inverse propensity, which a position-based click model estimates from items that
    a query showed at several positions. OUT/report.json counts what was left out.
    """
    from app.feedback.export import Options, export
    from index_jobs.index.versions import open_current

    options = Options(min_clients, client_cap, item_cap, frozenset(judge or ()))
    report = export(log or index / "feedback", open_current(index), collection or index.resolve().name, out, options)
    typer.echo(str(report))
    train = f"dcar train --data {out}{f' --images {report.images}' if report.images else ''} ..."
    if report.pairs:
        typer.echo(f"{out}: {f'dcar retrain --index {index} --pairs {out}' if report.without_image else train}")


@commands.command("forget", epilog=example("dcar feedback forget 5f0c2a --log index/feedback"))
def forget_command(
    client: Annotated[str, Argument(help="The client_id of the events.")],
    log: Annotated[Path, Option("--log", help="Directory of the log.")],
) -> None:
    """Remove a client's events and the searches that it made or alone acted on; a service may be running."""
    from app.feedback.store import forget

    events, searches = forget(log, client)
    typer.echo(f"{log}: {events:,} events and {searches:,} searches removed")


@judging.command(
    "judge",
    epilog=example(
        "dcar judge judgements.csv --index index --against 1",
        "dcar judge qrels.txt --queries queries.tsv --index index --run run.txt",
    ),
)
def judge_command(
    judgements: Annotated[
        list[Path], Argument(help="Tables of query, item_id, grade (0 to 3 or empty), or TREC qrels.")
    ],
    *,
    index: IndexDir,
    version: Annotated[int | None, Option(min=1, help="Version of the index. Default: the current one.")] = None,
    against: Annotated[str | None, Option(help="Compare with a version, or another index.")] = None,
    queries: Annotated[Path | None, Option(help="Queries of qrels: lines of id, tab, text.")] = None,
    hybrid: Annotated[bool, Option("--hybrid", help="Look up the words of the queries as well.")] = False,
    run: Annotated[Path | None, Option(help="Write the results: as a TREC run, or all with grades as .csv.")] = None,
    qrels: Annotated[Path | None, Option(help="Write the judgements as TREC qrels.")] = None,
    device: Device = "auto",
) -> None:
    """Measure an index by judged queries, or compare two: nDCG@10, MRR@10 and recall@10, overall and by class.

    Brackets hold 95 % intervals over the queries, paired in a comparison. Results without a judgement count as 0.
    """
    from app.feedback import judge
    from dcar_core.data.judgements import read_judgements
    from dcar_core.util.files import require_writable, write_bytes

    for path in filter(None, (run, qrels)):
        require_writable(path.parent)
    judged = read_judgements(judgements, queries)
    opened = [_open(index, version, device)]
    if against is not None:
        number = int(against) if against.isdecimal() else None
        opened.append(_open(index if number else Path(against), number, device))
    runs = [judge.Run.of(each, name, judged, hybrid=hybrid) for each, name in opened]
    texts = {run: judge.write_run(runs, as_csv=run is not None and run.suffix == ".csv"), qrels: judged.to_qrels()}
    for target, text in texts.items():
        if target is not None:
            write_bytes(target, text.encode())
    typer.echo(judge.describe(runs))


def _open(path: Path, version: int | None, device: str) -> tuple["Index", str]:
    """Return a version of an index, and its name."""
    from app.search import Index

    opened = Index.open(path, device=device, version=version)
    return opened, f"{path} version {opened.snapshot.version}"
