"""Weeks of searches, clicks and retraining by simulated users, beside the same weeks without retraining.

    python benchmarks/loop.py --weeks 10
    python benchmarks/loop.py --weeks 1 --hostile 0 --items 100000

- The gallery is bundled, and the model is the bundled one that never saw its style. Users search by names and tags of
  emoji. A right answer is an emoji that has all of the words' names and tags. Test queries are never searched by users.
- A user looks at position k with a chance of 1 / k, and clicks what they look at with a chance of 0.8 if it is right,
  else of 0.1. Half of the searches have a filter, which leaves out a third of the items. Of the searches, 1 % are of
  twenty hostile clients, who click one result at random.
- Searches and clicks go through the service's log. Each week, `dcar feedback export` and `dcar retrain`, with its gate,
  do what they do for everybody; then hit@5 of the test queries is measured: a right answer among the first five.
- Then the same weeks without hostile clients, a candidate that learned from pairs of other items, and the propensities
  against the truth. The last line is JSON: hit@5 by week in percent, with the loop "on" and "off".
- `--items` times `dcar retrain` on the last pairs and the gallery of the start, with random items up to this number.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from index_material import Clusters
from load import unique_texts
from service import ROOT, made_index

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.feedback import store
from app.feedback.export import Options, Report, export
from app.feedback.log import FeedbackLog
from app.feedback.store import EventRow
from app.search.query import Match, Query, SearchResults
from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_zero_shot
from dcar_core.util.arrays import Rows
from dcar_core.util.errors import DataError, GateError
from index_jobs.jobs.retrain import ItemPairs, retrain
from index_jobs.rebuild import rebuild
from index_jobs.store.artifact import Artifact
from index_jobs.store.versions import open_current

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji"
SHOWN, K = 10, 5  # results of a page, and those that count
DEPTH, FILTERS = 40, 3  # results before a filter; a filter leaves out the rows that have one rest modulo FILTERS
EXAMINED = 1 / np.arange(1, SHOWN + 1)
RIGHT, NOISE = 0.8, 0.1  # chances of a click on what is looked at
HOSTILE_CLIENTS = 20
BATCH = 500  # searches whose clicks are sent at once


@dataclass(frozen=True)
class Queries:
    """Texts, and the rows of the index that answer each."""

    texts: list[str]
    answers: list[frozenset[int]]

    def take(self, places: Sequence[int]) -> "Queries":
        return Queries([self.texts[place] for place in places], [self.answers[place] for place in places])

    def are_right(self, rows: Rows) -> Rows:
        """Return for results (N, k) whether each is an answer."""
        return np.array(
            [[row in right for row in found] for found, right in zip(rows.tolist(), self.answers, strict=True)]
        )


def make_queries(gallery: Path, index: Path, limit: int, seed: int) -> tuple[Queries, Queries]:
    """Return queries for users, and two fifths as many for the test; no text is in both."""
    rng, artifact = np.random.default_rng(seed), open_current(index)
    row_of = {item: row for row, item in enumerate(artifact.column("id").to_pylist())}
    rows, having = dict[int, list[str]](), dict[str, set[int]]()
    for line in (gallery / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if (row := row_of.get(item.get("id"))) is not None:
            rows[row] = [item["category"], *item["attributes"]]
            for name in rows[row]:
                having.setdefault(name, set()).add(row)
    asked = dict[str, frozenset[int]]()
    for name, *tags in rows.values():
        chosen = [(name,), *([(name, str(rng.choice(tags)))] if tags else [])]
        chosen += [tuple(map(str, rng.choice(tags, 2, replace=False)))] if len(tags) > 1 else []
        for parts in chosen:
            asked[" ".join(parts).lower()] = frozenset(set.intersection(*(having[part] for part in parts)))
    everything = Queries([*asked], [*asked.values()])
    order = rng.permutation(len(asked))[: limit + limit * 2 // 5]
    cut = len(order) * 5 // 7
    return everything.take(order[:cut].tolist()), everything.take(order[cut:].tolist())


class Loop:
    """An index in a copy of its own, its users, and what they do in a week."""

    def __init__(self, start: Path, folder: Path, users: Queries, test: Queries, encoder: Encoder) -> None:
        self.index, self.folder = Path(shutil.copytree(start, folder / "index")), folder
        self.users, self.test, self._encoder = users, test, encoder
        bare = replace(encoder.state, text_adapter=None)
        self._features = bare.encode_text(encoder.runtime, [*users.texts, *test.texts], 64)
        self.report: Report | None = None

    def search(self) -> tuple[Rows, Rows]:
        """Return what the served version and its model show for the queries of users, and for those of the test."""
        artifact = open_current(self.index)
        encoder = Encoder.load(artifact.checkpoint, device="cpu", backbone=self._encoder.model.backbone)
        artifact.require(encoder.fingerprint)
        rows = artifact.search(encoder.state.finish_text(self._features), DEPTH)[1]
        return rows[: len(self.users.texts)], rows[len(self.users.texts) :]

    def hit(self) -> float:
        """Return hit@5 of the test queries, in percent."""
        return round(100 * float(self.test.are_right(self.search()[1][:, :K]).any(1).mean()), 2)

    def run_week(self, searches: int, hostile: float, rng: np.random.Generator) -> str:
        """Search, click, export and retrain; return what came of it."""
        shown, _ = self.search()
        asyncio.run(self._log(shown, searches, hostile, rng))
        store.roll(self.index / "feedback", everything=True)
        pairs = self.folder / "pairs"
        shutil.rmtree(pairs, ignore_errors=True)
        self.report = export(self.index / "feedback", open_current(self.index), self.index.name, pairs, Options())
        try:
            return retrain(self.index, [pairs], device="cpu").to_text().partition("\n")[0]
        except (GateError, DataError) as error:
            return str(error)

    async def _log(self, shown: Rows, searches: int, hostile: float, rng: np.random.Generator) -> None:
        """Send a week's searches and clicks to the log of a service."""
        artifact = open_current(self.index)
        settings = Settings(index=self.index, feedback=True, feedback_texts=True)
        log = FeedbackLog(self.index / "feedback", settings, Metrics())
        log.start()
        queries = rng.integers(len(self.users.texts), size=searches)
        filters = np.where(rng.random(searches) < 0.5, rng.integers(FILTERS, size=searches), -1)
        is_hostile = rng.random(searches) < hostile
        results, right = dict[tuple[int, int], SearchResults](), dict[tuple[int, int], Rows]()
        for key in {*zip(queries.tolist(), filters.tolist(), strict=True)}:
            rows = [row for row in shown[key[0]].tolist() if row >= 0 and row % FILTERS != key[1]][:SHOWN]
            results[key] = SearchResults(artifact.manifest.version, [self._match(artifact, row) for row in rows])
            right[key] = np.array([row in self.users.answers[key[0]] for row in rows])
        for start in range(0, searches, BATCH):
            events = list[EventRow]()
            for number in range(start, min(searches, start + BATCH)):
                key = int(queries[number]), int(filters[number])
                text, page = self.users.texts[key[0]], results[key]
                name, count = log.note("", None, Query(query=text), page, has_image=False), len(page.matches)
                client, clicked = f"u{rng.integers(max(1, searches // 4))}", rng.random(count)
                clicked = clicked < EXAMINED[:count] * np.where(right[key], RIGHT, NOISE)
                if is_hostile[number]:
                    client, clicked = f"h{rng.integers(HOSTILE_CLIENTS)}", np.arange(count) == rng.integers(count)
                for place in np.flatnonzero(clicked).tolist():
                    item, now = page.matches[place].item.id, int(time.time() * 1000)
                    events.append(EventRow(name, now, "", client, "click", item, place + 1, None))
            await log.accept("", events)
        await log.close()

    @staticmethod
    def _match(artifact: Artifact, row: int) -> Match:
        match = Match(row, 0.0)
        match.item = artifact.item(row)
        return match


def refuse_useless(loop: Loop, rng: np.random.Generator) -> str:
    """Retrain on the last pairs, those to learn from with items of other texts; return what the gate said."""
    rows = [json.loads(line) for line in (loop.folder / "pairs" / "pairs.jsonl").read_text().splitlines()]
    texts, items = [row["caption"] for row in rows], [row["id"] for row in rows]
    learned = ItemPairs(texts, np.arange(len(rows)), np.ones(len(rows), np.float32)).divide()[0].rows.tolist()
    for place, other in zip(learned, rng.permutation(learned).tolist(), strict=True):
        items[place] = rows[other]["id"]
    lines = [json.dumps({"caption": row["caption"], "id": item}) for row, item in zip(rows, items, strict=True)]
    path = loop.folder / "useless.jsonl"
    path.write_text("\n".join(lines))
    try:
        return f"PUBLISHED, which it should not be: {retrain(loop.index, [path], device='cpu').reason}"
    except (GateError, DataError) as error:
        return str(error)


def time_retraining(start: Path, pairs: Path, out: Path, count: int) -> str:
    """Return what `dcar retrain` prints for the pairs and an index with random items beside those of the start."""
    artifact = open_current(start)
    others = Clusters(count, artifact.manifest.dim).draw(count - artifact.rows, seed=0)
    vectors = np.concatenate([artifact.vectors(np.arange(artifact.rows)), others])
    captions = [*artifact.column("caption").to_pylist(), *islice(unique_texts(), len(others))]
    made_index(out, artifact.checkpoint, lambda: vectors, captions)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [json.dumps(row | {"id": f"{artifact.row_of(row['id'])}"}) for row in rows]
    path = out.with_suffix(".pairs.jsonl")
    path.write_text("\n".join(lines))
    command = [sys.executable, "-m", "app.cli", "retrain", "--index", out, "--pairs", path, "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout


def worst_propensity(report: Report) -> str:
    """Return how far the estimated propensities are from the truth."""
    if not report.pairs_at_several_positions:
        return "not estimated: no item was shown at several positions yet"
    found = np.array(report.propensities[:SHOWN])
    off = np.abs(found / EXAMINED[: len(found)] - 1)
    return f"within {100 * off.max():.1f} % of the truth ({' '.join(f'{each:.2f}' for each in found)})"


def main() -> None:
    """Run the loop, and print what it shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weeks", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--searches", type=int, default=20_000, help="in a week; default: %(default)s")
    parser.add_argument("--queries", type=int, default=2_500, help="texts of the users; default: %(default)s")
    parser.add_argument(
        "--hostile", type=float, default=0.01, help="share of searches; 0 for none; default: %(default)s"
    )
    parser.add_argument(
        "--gallery", type=Path, default=EMOJI / "openmoji", help="with metadata.jsonl; default: openmoji"
    )
    parser.add_argument("--model", type=Path, default=EMOJI / "base", help="default: the bundled one")
    parser.add_argument("--items", type=int, help="of an index to time `dcar retrain` on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_zero_shot(load_backbone(BackboneSource(str(args.model))), work / "model")
        rebuild(args.gallery, work / "model", work / "start", device="cpu", progress=False)
        encoder = Encoder.load(work / "model", device="cpu")
        users, test = make_queries(args.gallery, work / "start", args.queries, args.seed)
        by_share = dict[float, list[float]]()
        for share in dict.fromkeys((0.0, args.hostile)):
            loop = Loop(work / "start", work / f"hostile-{share}", users, test, encoder)
            off, rng = loop.hit(), np.random.default_rng(args.seed)
            by_share[share] = []
            for week in range(1, args.weeks + 1):
                started = time.perf_counter()
                outcome = loop.run_week(args.searches, share, rng)
                by_share[share].append(loop.hit())
                print(
                    f"{share:.0%} hostile, week {week}: hit@{K} {by_share[share][-1]} (off: {off}), {outcome} "
                    f"[{time.perf_counter() - started:.0f} s]", file=sys.stderr, flush=True,
                )  # fmt: skip
        assert loop.report is not None
        print(f"{len(users.texts):,} queries of users, {len(test.texts):,} of the test, {len(by_share[0.0])} weeks")
        print(f"hostile clients move hit@{K} by {by_share[args.hostile][-1] - by_share[0.0][-1]:+.2f} points")
        print(f"propensities: {worst_propensity(loop.report)}")
        print(f"a candidate that learned from pairs of other items: {refuse_useless(loop, rng)}")
        if args.items:
            print(time_retraining(work / "start", loop.folder / "pairs" / "pairs.jsonl", work / "many", args.items))
        print(json.dumps({"on": by_share[args.hostile], "off": [off] * args.weeks}))


if __name__ == "__main__":
    main()
