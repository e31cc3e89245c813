"""`dcar feedback export` and `forget`: training pairs and judged lists from the log;
`dcar judge` measures by them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from app.cli import options
from app.cli.options import app, group
from dcar_core.util.options import command, option

if TYPE_CHECKING:
    from app.search import Index

commands = group("feedback", help="Learn from clicks.")


@command(commands, "export", "dcar feedback export --index index --out pairs")
def export(
    *,
    index: Path = options.INDEX,
    out: Path = options.OUT,
    log: Path | None = option(
        None, "Directory that DCAR_FEEDBACK names. Default: INDEX/feedback."
    ),
    collection: str | None = option(
        None, "Collection. Default: the name of the index directory."
    ),
    min_clients: int = option(2, "Clients that a pair needs.", min=1),
    judge: list[str] | None = option(
        None, "Count only this client's judgements; may be repeated."
    ),
) -> None:
    """Write training pairs (OUT/pairs.jsonl) and a judged list (OUT/judgements.csv).

    Position bias is corrected by inverse propensity, which a position-based click model
    estimates from items that a query showed at several positions. OUT/report.json
    counts what was left out.
    """
    from app.feedback.export import export as run
    from index_jobs.index.versions import open_current

    folder = log or index / "feedback"
    name = collection or index.resolve().name
    report = run(folder, open_current(index), name, out, min_clients, judge or ())
    typer.echo(str(report))
    if report.pairs:
        train = (
            "dcar train --data"
            f" {out}{f' --images {report.images}' if report.images else ''} ..."
        )
        typer.echo(
            f"{out}: dcar retrain --index {index} --pairs {out}, or with local images"
            f" {train}"
        )


@command(commands, "forget", "dcar feedback forget 5f0c2a --log index/feedback")
def forget(
    client: str = option(help="The client_id of the events."),
    *,
    log: Path = option(help="Directory of the log."),
) -> None:
    """Remove a client's events and the searches that it alone acted on; a service may
    be running.
    """
    from app.feedback.log import forget as remove

    events, searches = remove(log, client)
    typer.echo(f"{log}: {events:,} events and {searches:,} searches removed")


@command(
    app,
    "judge",
    "dcar judge judgements.csv --index index --against 1",
    "dcar judge judgements.csv --index index --run run.csv",
    "dcar judge --index index-new --against http://127.0.0.1:8000 --margin 0.02",
)
def judge(
    judgements: list[Path] | None = option(
        None,
        "Tables of query, item_id, grade (0 to 3 or empty). Default: captions that only"
        " one image has.",
    ),
    *,
    index: Path = options.INDEX,
    version: int | None = option(
        None,
        "Version of the index. Default: the current one.",
        min=1,
    ),
    against: str | None = option(
        None,
        "Compare with a version, another index, or a running service at a URL;"
        " DCAR_JUDGE_KEY is its API key.",
    ),
    margin: float | None = option(
        None,
        "Fail if nDCG@10 is lower by more than this share.",
        min=0,
        max=1,
    ),
    hybrid: bool = option(False, "Look up the words of the queries as well."),
    run: Path | None = option(None, "Write the results with their grades as CSV."),
    device: str = options.DEVICE,
) -> None:
    """Measure an index by judged queries, or compare two: nDCG@10, MRR@10 and
    recall@10, over all queries.

    Brackets hold 95 % intervals over the queries, paired in a comparison. Results
    without a judgement count as 0.
    """
    from app.feedback.judge import DEPTH, Run, compare, describe, runs_csv
    from dcar_core.data.judgements import read_judgements
    from dcar_core.util.errors import GateError
    from dcar_core.util.files import require_writable, write_bytes
    from index_jobs.jobs.running_service import ask_service, known_pairs

    if run is not None:
        require_writable(run.parent)
    opened, name = _open(index, version, device)
    if judgements:
        judged = read_judgements(judgements)
    else:
        judged = known_pairs(opened.served.index)
    runs = [Run.of(opened, name, judged, hybrid=hybrid)]
    if against is not None and against.startswith(("http://", "https://")):
        name, results = ask_service(
            against,
            judged,
            k=DEPTH,
            **({"hybrid": True} if hybrid else {}),
        )
        runs.append(Run(name, judged, results))
    elif against is not None:
        number = int(against) if against.isdecimal() else None
        runs.append(
            Run.of(
                *_open(index if number else Path(against), number, device),
                judged,
                hybrid=hybrid,
            )
        )
    if run is not None:
        write_bytes(run, runs_csv(runs).encode())
    comparison = compare(runs)
    typer.echo(describe(runs, comparison))
    change = comparison.difference["nDCG@10"].value
    if margin is not None and change < -100 * margin:
        raise GateError(
            f"{runs[0].name} ranks worse than {runs[-1].name}: nDCG@10 changed by"
            f" {change:+.1f} points"
        )


def _open(path: Path, version: int | None, device: str) -> tuple["Index", str]:
    from app.search import Index

    opened = Index.open(path, device=device, version=version)
    return opened, f"{path} version {opened.served.version}"
