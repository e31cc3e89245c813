"""Vectors alone, words alone, and both: what they find, and how long they take.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/hybrid.py quality --index data/index/twemoji --queries examples/emoji/queries/test.tsv
    python benchmarks/hybrid.py service --items 100000

- Quality: hit@1, hit@5 and nDCG@10 of short queries over every item of a bundled gallery; `--queries` as in
  examples/emoji/evaluate_queries.py. `--weights` compares weights of the words; choose on validation.tsv.
- Service: p50 of POST /search/text, one query at a time, with the bundled model on one core and the caller on another;
  for texts that are new, and for texts that were asked before. Vectors of items are random around 1,000 centres; texts
  are words of a Zipf distribution, and queries are the words of an item. The ways alternate, and each has queries of
  its own, so that none has the caches warmed for it.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from index_material import read_whole
from load import connect, text_request
from service import made_index, serving

from app.cli.serving import bundled_checkpoint
from app.search.hits import best_rows
from app.search.plan import Plan
from dcar_core.util.arrays import Floats
from index_jobs.engines.faiss.index import VECTORS
from index_jobs.index.lexical.fusion import DEFAULT_WEIGHT

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
DIM, CENTRES, WORDS, WORDS_PER_ITEM = 256, 1000, 50_000, 12
SEARCHES = 200
WAYS = (False, 1, DEFAULT_WEIGHT)  # `hybrid` of vectors, words and both


def make_material(items: int) -> tuple[Floats, list[str]]:
    """Return the vectors of made items, and their texts."""
    rng, generator = np.random.default_rng(0), random.Random(0)
    centres = rng.standard_normal((CENTRES, DIM)).astype(np.float32)
    vectors = centres[rng.integers(0, CENTRES, items)] + rng.standard_normal((items, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = ["".join("abcdefghij"[int(digit)] for digit in str(number + 10_000)) for number in range(WORDS)]
    limits = np.cumsum(1 / np.arange(1, WORDS + 1)).tolist()
    texts = [" ".join(generator.choices(names, cum_weights=limits, k=WORDS_PER_ITEM)) for _ in range(items)]
    return vectors, texts


def draw_queries(texts: list[str], words: int, generator: random.Random) -> list[list[str]]:
    """Return queries of some words of an item, other ones for each of `WAYS`."""
    return [[" ".join(generator.sample(generator.choice(texts).split(), words)) for _ in range(SEARCHES)] for _ in WAYS]


def make_served(items: int, work: Path) -> tuple[Path, list[str]]:
    """Return a published index of made items, and their texts; the vectors are no longer in memory."""
    vectors, texts = make_material(items)
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
    from index_jobs.index.versions import open_current

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
            best = best_rows(artifact, Plan(text=text, words_weight=weight), vector, 10, None)[0].rows.tolist()
            scores[number, best] = -np.arange(len(best))
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
    service = commands.add_parser("service", help="how long a request takes")
    service.add_argument("--items", type=int, default=100_000, help="default: %(default)s")
    service.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="default: %(default)s")
    args = parser.parse_args()
    if args.command == "quality":
        measure_quality(args.index, args.queries, args.weights)
    else:
        measure_service(args.items, args.work)


if __name__ == "__main__":
    main()
