"""Weeks of searches, clicks and retraining by simulated users, beside the same weeks
without retraining.

    python benchmarks/loop.py --weeks 10 --seeds 3
    python benchmarks/loop.py --weeks 3 --alone

- The gallery is bundled, and the model is the bundled one that never saw its style.
  Users search by names and tags of emoji. A right answer is an emoji that has all of
  the words' names and tags. Test queries are never searched by users.
- A user looks at position k with a chance of 1 / k, and clicks what they look at with a
  chance of 0.8 if it is right, else of 0.1. Half of the searches have a filter, which
  leaves out a third of the items.
- Of the searches, 1 % are of twenty hostile clients. They search what shows one wrong
  item, click it, and say that it stood at the last position; and they send clicks on
  searches that they made up.
- Searches and clicks go through the service's log. Each week, `dcar feedback export`
  and `dcar retrain`, with its gate, do what they do for everybody; then hit@5 of the
  test queries is measured: a right answer among the first five.
- The same weeks run without hostile clients, with the same draws for everybody else.
  Then a candidate learns from pairs of other items. The last line is JSON: hit@5 by
  week in percent, mean of the seeds, with the loop "on" and "off". `--alone` adds weeks
  that learn from "clicks" alone, or from "captions" of skipped items alone.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.feedback.export import Report, export
from app.feedback.log import EventRow, FeedbackLog
from app.search.query import Query
from dcar_core import Encoder
from dcar_core.model.checkpoint import save_zero_shot
from dcar_core.model.config import BackboneSource
from dcar_core.util.arrays import Rows
from dcar_core.util.errors import DataError, GateError
from index_jobs.index.versions import open_current
from index_jobs.jobs.retrain import ItemPairs, retrain
from index_jobs.rebuild import rebuild

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji"
# results of a page, and those that count
SHOWN = 10
K = 5
# results before a filter; a filter leaves out the rows that have one rest modulo
# FILTERS
DEPTH = 40
FILTERS = 3
EXAMINED = 1 / np.arange(1, SHOWN + 1)
# chances of a click on what is looked at
RIGHT = 0.8
NOISE = 0.1
HOSTILE_CLIENTS = 20
BATCH = 500  # searches whose clicks are sent at once


@dataclass(frozen=True)
class Queries:
    """Texts, and the rows of the index that answer each."""

    texts: list[str]
    answers: list[frozenset[int]]

    def take(self, places: Sequence[int]) -> "Queries":
        return Queries(
            [self.texts[place] for place in places],
            [self.answers[place] for place in places],
        )

    def are_right(self, rows: Rows) -> Rows:
        """Return for results (N, k) whether each is an answer."""
        pairs = zip(rows.tolist(), self.answers, strict=True)
        return np.array([[row in right for row in found] for found, right in pairs])


def make_queries(
    gallery: Path,
    index: Path,
    limit: int,
    seed: int,
) -> tuple[Queries, Queries]:
    """Return queries for users, and two fifths as many for the test; no text is in
    both.
    """
    rng = np.random.default_rng(seed)
    opened = open_current(index)
    row_of = {item: row for row, item in enumerate(opened.column("id").to_pylist())}
    rows = dict[int, list[str]]()
    having = dict[str, set[int]]()
    for line in (gallery / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if (row := row_of.get(item.get("id"))) is not None:
            rows[row] = [item["category"], *item["attributes"]]
            for name in rows[row]:
                having.setdefault(name, set()).add(row)
    asked = dict[str, frozenset[int]]()
    for name, *tags in rows.values():
        chosen = [(name,), *([(name, str(rng.choice(tags)))] if tags else [])]
        chosen += (
            [tuple(map(str, rng.choice(tags, 2, replace=False)))]
            if len(tags) > 1
            else []
        )
        for parts in chosen:
            asked[" ".join(parts).lower()] = frozenset(
                set.intersection(*(having[part] for part in parts))
            )
    everything = Queries([*asked], [*asked.values()])
    order = rng.permutation(len(asked))[: limit + limit * 2 // 5]
    cut = len(order) * 5 // 7
    return everything.take(order[:cut].tolist()), everything.take(order[cut:].tolist())


class Loop:
    """An index in a copy of its own, its users, and what they do in a week."""

    def __init__(
        self,
        start: Path,
        folder: Path,
        users: Queries,
        test: Queries,
        encoder: Encoder,
        kind: str = "all",
    ) -> None:
        self.kind = kind  # of pairs to learn from: all, clicks or captions
        self.index = Path(shutil.copytree(start, folder / "index"))
        self.folder = folder
        self.users = users
        self.test = test
        self._encoder = encoder
        bare = Encoder(replace(encoder.state, text_adapter=None), None, encoder.runtime)
        self._features = bare.encode_text([*users.texts, *test.texts])
        self.report: Report | None = None
        shown, _ = self.search()
        # by the hostile
        self.wanted = int(
            np.bincount(shown[:, :SHOWN][~users.are_right(shown[:, :SHOWN])]).argmax()
        )

    def search(self) -> tuple[Rows, Rows]:
        """Return what the served version and its model show for the queries of users,
        and for those of the test.
        """
        opened = open_current(self.index)
        encoder = Encoder.load(
            opened.checkpoint,
            device="cpu",
            backbone=self._encoder.model.backbone,
        )
        opened.require(encoder.fingerprint)
        rows = opened.search(encoder.state.adapt_texts(self._features), DEPTH)[1]
        return rows[: len(self.users.texts)], rows[len(self.users.texts) :]

    def hit(self) -> float:
        """Return hit@5 of the test queries, in percent."""
        return round(
            100 * float(self.test.are_right(self.search()[1][:, :K]).any(1).mean()), 2
        )

    def run_week(self, searches: int, hostile: float, seed: int, week: int) -> str:
        """Search, click, export and retrain; return what came of it."""
        shown, _ = self.search()
        asyncio.run(
            self._log(
                shown,
                searches,
                hostile,
                *np.random.default_rng((seed, week)).spawn(2),
            )
        )
        pairs = self.folder / "pairs"
        shutil.rmtree(pairs, ignore_errors=True)
        self.report = export(
            self.index / "feedback",
            open_current(self.index),
            self.index.name,
            pairs,
        )
        if self.kind != "all":
            lines = (pairs / "pairs.jsonl").read_text().splitlines(keepends=True)
            chosen = [
                line
                for line in lines
                if ("relevance" in json.loads(line)) == (self.kind == "clicks")
            ]
            (pairs / "pairs.jsonl").write_text("".join(chosen))
        try:
            return (
                retrain(self.index, [pairs], device="cpu").to_text().partition("\n")[0]
            )
        except (GateError, DataError) as error:
            return str(error)

    async def _log(
        self,
        shown: Rows,
        searches: int,
        hostile: float,
        rng: np.random.Generator,
        attack: np.random.Generator,
    ) -> None:
        """Send a week's searches and clicks to the log of a service.

        rng: what the honest draw; attack: what the hostile draw.
        """
        opened = open_current(self.index)
        settings = Settings(index=self.index, feedback=True, feedback_texts=True)
        log = FeedbackLog(self.index / "feedback", settings, Metrics())
        log.start()
        queries = rng.integers(len(self.users.texts), size=searches)
        filters = np.where(
            rng.random(searches) < 0.5,
            rng.integers(FILTERS, size=searches),
            -1,
        )
        is_hostile = attack.random(searches) < hostile
        is_aim = (shown[:, :SHOWN] == self.wanted).any(1)
        is_aim &= [self.wanted not in answers for answers in self.users.answers]
        if is_aim.any():
            queries[is_hostile] = attack.choice(
                np.flatnonzero(is_aim), is_hostile.sum()
            )
            filters[is_hostile] = -1
        wanted = opened.item(self.wanted).id
        results = dict[tuple[int, int], Any]()
        right = dict[tuple[int, int], Rows]()
        for key in {*zip(queries.tolist(), filters.tolist(), strict=True)}:
            rows = [
                row
                for row in shown[key[0]].tolist()
                if row >= 0 and row % FILTERS != key[1]
            ][:SHOWN]
            hits = [{"id": opened.item(row).id} for row in rows]
            results[key] = {
                "index_version": opened.manifest.version,
                "nothing_fits": False,
                "results": hits,
            }
            right[key] = np.array([row in self.users.answers[key[0]] for row in rows])
        for start in range(0, searches, BATCH):
            events = list[EventRow]()
            for number in range(start, min(searches, start + BATCH)):
                key = int(queries[number]), int(filters[number])
                text = self.users.texts[key[0]]
                page = results[key]
                now = int(time.time() * 1000)
                name = log.note("", None, Query(query=text), page, has_image=False)
                count = len(page["results"])
                client = f"u{rng.integers(max(1, searches // 4))}"
                clicked = rng.random(SHOWN)[:count]
                clicked = clicked < EXAMINED[:count] * np.where(
                    right[key],
                    RIGHT,
                    NOISE,
                )
                if is_hostile[number]:
                    client = f"h{attack.integers(HOSTILE_CLIENTS)}"
                    clicked = np.array(
                        [result["id"] == wanted for result in page["results"]]
                    )
                    made_up = (
                        f"{attack.integers(2**62):029d}",
                        now,
                        client,
                        "click",
                        wanted,
                        None,
                    )
                    events.append(EventRow(*made_up))
                for place in np.flatnonzero(clicked).tolist():
                    events.append(
                        EventRow(
                            name,
                            now,
                            client,
                            "click",
                            page["results"][place]["id"],
                            None,
                        )
                    )
            await log.accept("", events)
        await log.close()


def refuse_useless(loop: Loop) -> str:
    """Retrain on the last pairs, those to learn from with texts of other items; return
    what the gate said.
    """
    rows = [
        json.loads(line)
        for line in (loop.folder / "pairs" / "pairs.jsonl").read_text().splitlines()
    ]
    texts = [row["caption"] for row in rows]
    learned = (
        ItemPairs(texts, np.arange(len(rows)), np.ones(len(rows), np.float32))
        .divide()[0]
        .rows.tolist()
    )
    for place, other in zip(
        learned,
        np.random.default_rng(0).permutation(learned).tolist(),
        strict=True,
    ):
        rows[place]["caption"] = texts[other]
    path = loop.folder / "useless.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        return (
            "PUBLISHED, which it should not be:"
            f" {retrain(loop.index, [path], device='cpu').reason}"
        )
    except (GateError, DataError) as error:
        return str(error)


def main() -> None:
    """Run the loop, and print what it shows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weeks", type=int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--searches",
        type=int,
        default=20_000,
        help="in a week; default: %(default)s",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=2_500,
        help="texts of the users; default: %(default)s",
    )
    parser.add_argument(
        "--hostile",
        type=float,
        default=0.01,
        help="share of searches; default: %(default)s",
    )
    parser.add_argument(
        "--gallery",
        type=Path,
        default=EMOJI / "openmoji",
        help="default: openmoji",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=EMOJI / "base",
        help="default: the bundled one",
    )
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="learn from clicks alone, and from captions alone, too",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_zero_shot(BackboneSource(str(args.model)), work / "model")
        rebuild(
            args.gallery,
            work / "model",
            work / "start",
            device="cpu",
            progress=False,
        )
        encoder = Encoder.load(work / "model", device="cpu")
        runs = {"honest": (0.0, "all")} | (
            {"on": (args.hostile, "all")} if args.hostile else {}
        )
        runs |= {kind: (0.0, kind) for kind in ("clicks", "captions") if args.alone}
        hits = {name: np.zeros((args.seeds, args.weeks)) for name in runs}
        off = np.zeros((args.seeds, 1))
        loops = dict[str, Loop]()
        for seed in range(args.seeds):
            users, test = make_queries(args.gallery, work / "start", args.queries, seed)
            for name, (share, kind) in runs.items():
                made = loops[name] = Loop(
                    work / "start",
                    work / f"{name}-{seed}",
                    users,
                    test,
                    encoder,
                    kind,
                )
                off[seed] = made.hit()
                for week in range(args.weeks):
                    started = time.perf_counter()
                    outcome = made.run_week(args.searches, share, seed, week)
                    hits[name][seed, week] = made.hit()
                    print(
                        f"seed {seed}, {name}, {share:.0%} hostile, week {week + 1}:"
                        f" hit@{K} {hits[name][seed, week]} (off: {off[seed, 0]}),"
                        f" {outcome} [{time.perf_counter() - started:.0f} s]",
                        file=sys.stderr,
                        flush=True,
                    )
        loop = loops.get("on", loops["honest"])
        moved = hits.setdefault("on", hits["honest"]) - hits["honest"]
        counts = (
            f"{len(users.texts):,} queries of users, {len(test.texts):,} of the test"
        )
        print(f"{counts}, {args.weeks} weeks, {args.seeds} seeds")
        low = moved.min()
        high = moved.max()
        mean = moved.mean()
        print(
            f"hostile clients move hit@{K} by {low:+.2f} to {high:+.2f} points a week,"
            f" {mean:+.2f} on average"
        )
        print(
            "a candidate that learned from pairs of other items:"
            f" {refuse_useless(loop)}"
        )
        means = {"on": hits["on"], "off": np.repeat(off, args.weeks, 1), **hits}
        print(
            json.dumps(
                {
                    name: values.mean(0).round(2).tolist()
                    for name, values in means.items()
                }
            )
        )


if __name__ == "__main__":
    main()
