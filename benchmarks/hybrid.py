"""Vectors alone, words alone, and both: what they find, and how long they take.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/hybrid.py quality --index data/index/twemoji --queries examples/emoji/queries/test.tsv
    python benchmarks/hybrid.py latency --items 100000
    python benchmarks/hybrid.py service --items 100000

- Quality: hit@1, hit@5 and nDCG@10 of short queries over every item of a bundled gallery; `--queries` as in
  examples/emoji/evaluate_queries.py. `--weights` compares weights of the words; choose on validation.tsv.
- Latency: p50 of one search on one core, without the encoding of the query; size and seconds of the lexical index.
  Vectors are random around 1,000 centres, in an index of kind `auto`; texts are words of a Zipf distribution, and
  queries are the words of an item. Each way has queries of its own, so that none has the caches warmed for it.
- Service: p50 of POST /search/text over the same items, one query at a time, with the bundled model on one core and the
  caller on another; for texts that are new, and for texts that were asked before. The ways alternate.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
from index_material import read_whole
from load import connect, text_request
from service import made_index, serving

from app.cli.serving import bundled_checkpoint
from app.search.plan import Plan
from app.search.query import Query
from app.search.rank import rank
from dcar_core.util.arrays import Floats, Rows
from index_jobs.engines.faiss.build import build_index
from index_jobs.engines.faiss.index import VECTORS, FaissIndex
from index_jobs.engines.faiss.kinds import choose_kinds
from index_jobs.spec import IndexSpec
from index_jobs.store.lexical.fusion import DEFAULT_WEIGHT, spread_rows
from index_jobs.store.lexical.lexical_index import STARTS, TERMS, LexicalIndex, write_lexical

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
DIM, CENTRES, WORDS, WORDS_PER_ITEM = 256, 1000, 50_000, 12
SEARCHES = 200
WAYS = (False, 1, DEFAULT_WEIGHT)  # `hybrid` of vectors, words and both


class Index:
    """The parts of an artifact that ranking reads, over made vectors and texts."""

    def __init__(self, vectors: FaissIndex, lexical: LexicalIndex) -> None:
        self._vectors, self.lexical, self.rows = vectors, lexical, vectors.count
        self.manifest = SimpleNamespace(removed=0, spec=IndexSpec())
        self.live = np.ones(self.rows, np.bool_)
        self.sample_vectors = self.vectors(spread_rows(self.rows))

    def search(self, vectors: Floats, k: int, allowed: Any = None, *, is_narrow: bool = False) -> Any:
        """As `Artifact.search`."""
        return self._vectors.search(vectors, k, allowed, is_narrow=is_narrow)

    def vectors(self, rows: Rows) -> Floats:
        """As `Artifact.vectors`."""
        vectors: Floats = self._vectors.vectors(rows)
        return vectors


def make_material(items: int) -> tuple[Floats, list[str], Floats]:
    """Return the vectors of made items, their texts, and query vectors for each of `WAYS`."""
    rng, generator = np.random.default_rng(0), random.Random(0)
    centres = rng.standard_normal((CENTRES, DIM)).astype(np.float32)

    def near_centres(count: int) -> Floats:
        vectors = centres[rng.integers(0, CENTRES, count)] + rng.standard_normal((count, DIM)).astype(np.float32)
        unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    vectors = near_centres(items)
    names = ["".join("abcdefghij"[int(digit)] for digit in str(number + 10_000)) for number in range(WORDS)]
    limits = np.cumsum(1 / np.arange(1, WORDS + 1)).tolist()
    texts = [" ".join(generator.choices(names, cum_weights=limits, k=WORDS_PER_ITEM)) for _ in range(items)]
    return vectors, texts, near_centres(len(WAYS) * SEARCHES).reshape(len(WAYS), SEARCHES, DIM)


def draw_queries(texts: list[str], words: int, generator: random.Random) -> list[list[str]]:
    """Return queries of some words of an item, other ones for each of `WAYS`."""
    return [[" ".join(generator.sample(generator.choice(texts).split(), words)) for _ in range(SEARCHES)] for _ in WAYS]


def make_index(vectors: Floats, texts: list[str], folder: Path) -> Index:
    """Return an index of the material."""
    items = len(vectors)
    faiss.omp_set_num_threads(2)

    def blocks() -> Iterator[Floats]:
        yield from np.array_split(vectors, -(-items // 65_536))

    built = build_index(folder / VECTORS, blocks, items, DIM, choose_kinds("auto", items, DIM), target=0.99)
    started = time.process_time()
    write_lexical(folder / "lexical", texts)
    seconds = time.process_time() - started
    sizes = {file.name: file.stat().st_size / 1e6 for file in (folder / "lexical").iterdir()}
    total, lists = sum(sizes.values()), sizes[TERMS] + sizes[STARTS]
    print(
        f"{items:,} items, {built.kind}; lexical index: {total:.1f} MB, {lists:.1f} of them lists of terms, "
        f"written in {seconds:.1f} s of one core\n"
    )
    return Index(FaissIndex.open(folder / VECTORS), LexicalIndex(folder / "lexical"))


def measure_latency(items: int) -> None:
    """Print a table: one row for each number of query words, and each way of searching."""
    with tempfile.TemporaryDirectory() as folder:
        item_vectors, texts, vectors = make_material(items)
        index = make_index(item_vectors, texts, Path(folder))
        artifact: Any = index
        faiss.omp_set_num_threads(1)
        generator = random.Random(1)
        print(
            "| words in the query | vectors, ms | words, ms | both, ms | both / vectors |\n"
            "| --- | --- | --- | --- | --- |"
        )
        for words in (1, 2, 4):
            queries = draw_queries(texts, words, generator)
            taken: list[list[float]] = [[] for _ in WAYS]
            for search in range(SEARCHES):
                for way, weight in enumerate(WAYS):
                    plan = Plan(Query(query=queries[way][search]), words_weight=weight)
                    started = time.perf_counter()
                    rank(artifact, vectors[way, search], plan, 13)
                    taken[way].append(1000 * (time.perf_counter() - started))
            medians = [statistics.median(values) for values in taken]
            cells = [*(f"{value:.2f}" for value in medians), f"{medians[2] / medians[0]:.2f}"]
            print(f"| {words} | {' | '.join(cells)} |")


def make_served(items: int, work: Path) -> tuple[Path, list[str]]:
    """Return a published index of made items, and their texts; the vectors are no longer in memory."""
    vectors, texts, _ = make_material(items)
    return made_index(work / f"hybrid-{items}", bundled_checkpoint(work / "bundled"), lambda: vectors, texts), texts


def measure_service(items: int, work: Path) -> None:
    """Print a table: new and cached texts of several numbers of words, and each way of searching."""
    index, texts = make_served(items, work)
    for file in index.rglob(VECTORS):  # into memory, where those of a running service are
        read_whole(file)
    generator = random.Random(1)
    queries = {words: draw_queries(texts, words, generator) for words in (1, 2, 4)}
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    print(
        "| query | vectors, ms | words, ms | both, ms | both / vectors |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for kind, cache_size in (("new", 0), ("cached", 10_000)):
        with serving(index, cores={cores[0]}, cache_size=cache_size) as server:
            for words, drawn in queries.items():
                taken = asyncio.run(_milliseconds(server.port, drawn, 2 if cache_size else 1))
                medians = [statistics.median(values) for values in taken]
                cells = [*(f"{value:.2f}" for value in medians), f"{medians[2] / medians[0]:.2f}"]
                print(f"| {words} words, {kind} | {' | '.join(cells)} |", flush=True)


async def _milliseconds(port: int, texts: list[list[str]], rounds: int) -> list[list[float]]:
    """Return the latencies, in the last round, of each way's own texts; the ways alternate."""
    connection = await connect(port)
    taken: list[list[float]] = []
    for _ in range(rounds):
        taken = [[] for _ in WAYS]
        for asked in zip(*texts, strict=True):
            for text, weight, latencies in zip(asked, WAYS, taken, strict=True):
                request = text_request(text, hybrid=weight)
                started = time.perf_counter()
                status = await connection.ask(request)
                latencies.append(1000 * (time.perf_counter() - started))
                if status != 200:
                    raise SystemExit(f"the service answered {status}")
    connection.transport.close()
    return taken


def measure_quality(index: Path, queries: Path, weights: list[float]) -> None:
    """Print a table: one row for each weight of the words, from none to words alone."""
    sys.path.insert(0, str(EMOJI))
    evaluate_queries: Any = import_module("evaluate_queries")
    from dcar_core import Encoder
    from index_jobs.store.versions import open_current

    artifact = open_current(index)
    items = [artifact.item(row) for row in range(artifact.rows)]
    read = evaluate_queries.read_queries(queries, [item.metadata | {"category": item.category} for item in items])
    texts = [query.text for query in read]
    encoder = Encoder.load(artifact.checkpoint, device="cpu")
    print(f"{len(read)} queries, {len(items):,} items, percent\n")
    print(f"| weight of the words | {' | '.join(evaluate_queries.METRICS)} |\n| --- | --- | --- | --- |")
    vectors = encoder.encode_text(texts)
    for weight in weights:
        scores = np.full((len(read), len(items)), -np.inf, np.float32)
        for number, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
            best = rank(artifact, vector, Plan(Query(query=text), words_weight=weight), 10)
            scores[number, [each.row for each in best]] = -np.arange(len(best))
        means = 100 * evaluate_queries.measure(scores, read).mean(0)
        name = {0.0: "vectors alone", 1.0: "words alone"}.get(weight, f"{weight:g}")
        print(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality", help="what is found")
    quality.add_argument("--index", type=Path, required=True, help="an index of examples/emoji/twemoji or openmoji")
    quality.add_argument(
        "--queries", type=Path, default=EMOJI / "queries" / "validation.tsv", help="default: %(default)s"
    )
    quality.add_argument("--weights", type=float, nargs="+", default=[0.0, DEFAULT_WEIGHT, 1.0])
    latency = commands.add_parser("latency", help="how long a search takes")
    latency.add_argument("--items", type=int, default=100_000, help="default: %(default)s")
    service = commands.add_parser("service", help="how long a request takes")
    service.add_argument("--items", type=int, default=100_000, help="default: %(default)s")
    service.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="default: %(default)s")
    args = parser.parse_args()
    if args.command == "quality":
        measure_quality(args.index, args.queries, args.weights)
    elif args.command == "service":
        measure_service(args.items, args.work)
    else:
        measure_latency(args.items)


if __name__ == "__main__":
    main()
