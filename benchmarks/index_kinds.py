r"""Compare index kinds by texts that search images: build time, size, latency and
recall, printed as a Markdown table.

    python benchmarks/emoji_vectors.py emoji
        vectors and texts, first
    python benchmarks/index_kinds.py emoji
        kinds of `auto`, newer ones
    python benchmarks/index_kinds.py emoji --kind hnsw --kind IVF4000,RaBitQfs,RFlat
    python benchmarks/index_kinds.py emoji --kind hnsw --tune words --tune images
        other queries for tuning

- The folder has `vectors.npy`, float32 (n, E) and normalized, and a file of each kind
  of query. Half of the queries of `--tune` choose the search parameters, by the code of
  `dcar index build`; the other half of every file measures.
- Indexes stay in the folder, so that another run measures them again, beside further
  ones. One process opens them as the service does and times them in turns, one query at
  a time, by the processor time of one thread.
- hnswlib is tuned and measured as our kinds are.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dcar_core.util.arrays import Floats
from dcar_core.util.metrics import TIE_TOLERANCE
from index_jobs.engines.faiss.build import (
    SearchParameters,
    build_index,
    choose_kinds,
    machine_memory,
)
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.engines.measure import NEIGHBOURS, Benchmark, find_neighbours, tune
from index_jobs.engines.protocol import HeldOutQueries
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec

KINDS = (
    # of `auto`; the others are newer in FAISS
    *("hnsw", "ivf-pq-fp16", "ivf-pq", "ivf"),
    *("IVF1264,RaBitQfs,Refine(SQfp16)", "IVF1264,RaBitQfs4,Refine(SQfp16)"),
    *("RaBitQfs,RFlat", "PQ64x4fs,RFlat", "RaBitQfs4"),
)
TEXTS = ("captions", "categories", "typed", "words")
BLOCK = 20_000
QUERIES = 1000  # of a kind: to tune with, and as many to measure
# queries that an index answers before the next one's turn
ROUNDS = 7
TIMED = 60
PERCENTS = (1, 10, 90)  # of the rows that a filter allows


class Hnswlib:
    """hnswlib, with what tuning and measuring need."""

    width = "ef"
    min_width = 10
    max_width = 4096
    has_reranking = False

    def __init__(self, file: Path, vectors: Floats) -> None:
        import hnswlib  # type: ignore[import-untyped, unused-ignore]

        self._loaded = hnswlib.Index("ip", vectors.shape[1])
        if file.exists():
            self._loaded.load_index(str(file))
            return
        self._loaded.init_index(len(vectors), ef_construction=200, M=24)
        self._loaded.add_items(vectors)
        self._loaded.save_index(str(file))

    def set(self, name: str, value: int) -> None:
        self._loaded.set_ef(value)

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Any]:
        rows, distances = self._loaded.knn_query(
            vectors,
            k,
            num_threads=1 if len(vectors) == 1 else -1,
        )
        return 1 - distances, rows.astype(np.int64)


@dataclass
class Built:
    """An index of a kind, tuned by queries of a source."""

    kind: str
    source: str
    file: Path
    factory: str = ""
    seconds: float = 0.0  # of the processor, tuning and all attempts of `auto` included
    parameters: dict[str, int] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)  # of the table, by column
    times: list[float] = field(default_factory=list)  # milliseconds

    def build(
        self,
        vectors: Floats,
        queries: HeldOutQueries,
        memory: int,
        target: float,
    ) -> None:
        """Build and tune an index, or tune the one that other queries have tuned."""
        start, (count, dim) = time.process_time(), vectors.shape
        if self.file.exists() or self.kind == "hnswlib":
            index, tunable = self.open(vectors)
            measured = tune(
                Benchmark(lambda: blocks(vectors), queries, target=target),
                index,
                tunable,
            )
        else:
            choices = choose_kinds(self.kind, count, dim, memory=memory)
            made = build_index(
                self.file,
                lambda: blocks(vectors),
                count,
                dim,
                choices,
                queries,
                target=target,
            )
            self.factory = made.kind
            measured = made.measured
        self.parameters = measured["parameters"]
        self.seconds = round(time.process_time() - start)

    def open(self, vectors: Floats) -> tuple[Any, Any]:
        """Return the index with its parameters, in memory as a whole, and what sets
        them.
        """
        if self.kind == "hnswlib":
            tunable: Any = Hnswlib(self.file, vectors)
            index = tunable
        else:
            self.file.read_bytes()
            index = FaissIndex.open(self.file)._index
            tunable = SearchParameters(index)
        for name, value in self.parameters.items():
            tunable.set(name, value)
        return (
            index if index is tunable else FaissIndex(index, on_gpu="gpu" in self.kind)
        ), tunable


def blocks(vectors: Floats) -> Iterator[Floats]:
    return (vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK))


def measure(indexes: list[Built], vectors: Floats, folder: Path, filters: bool) -> None:
    """Fill `cells`: recall by kind of text, latency of all of them in turns, and both
    with filters.
    """
    opened = [built.open(vectors)[0] for built in indexes]
    texts = {
        name: read_queries(folder, name)[1]
        for name in TEXTS
        if (folder / f"{name}.npy").exists()
    }
    for name, queries in texts.items():
        benchmark = Benchmark(
            lambda: blocks(vectors), HeldOutQueries(queries, name), target=1.0
        )
        for built, index in zip(indexes, opened, strict=True):
            built.cells[name] = (
                f"{benchmark.recall(index, np.arange(len(queries))):.3f}"
            )
    mixed = np.random.default_rng(5).permutation(np.concatenate(list(texts.values())))
    masks = {
        percent: (
            np.random.default_rng([17, percent]).random(len(vectors)) < percent / 100
        )
        for percent in PERCENTS
    }
    for start in range(0, ROUNDS * TIMED, TIMED):
        for built, index in zip(indexes, opened, strict=True):
            built.times += timed(index, mixed[start : start + TIMED])
    for built, index in zip(indexes, opened, strict=True):
        for percent, mask in (
            masks.items() if filters and built.kind != "hnswlib" else ()
        ):
            rows = RowFilter.of_mask(mask)
            few = mixed[: 2 * TIMED]
            exact = find_neighbours(lambda mask=mask: selected(vectors, mask), few)[0]  # type: ignore[misc]
            scores = np.einsum(
                "qe,qke->qk",
                few,
                vectors[index.search(few, NEIGHBOURS, rows)[1]],
            )
            recall = np.mean(scores >= exact[:, -1:] - TIE_TOLERANCE)
            built.cells[f"{percent} % allowed"] = (
                f"{np.median(timed(index, few, rows)):.2f} ms, {recall:.3f}"
            )


def selected(vectors: Floats, mask: Any) -> Iterator[Floats]:
    return (
        block[mask[BLOCK * n : BLOCK * n + len(block)]]
        for n, block in enumerate(blocks(vectors))
    )


def timed(index: Any, queries: Floats, *rows: RowFilter) -> list[float]:
    """Return milliseconds of one query at a time, of the thread alone, since others may
    share the cores.
    """
    faiss.omp_set_num_threads(1)
    times = []
    for query in queries:
        start = time.thread_time()
        index.search(query[None], NEIGHBOURS, *rows)
        times.append(1000 * (time.thread_time() - start))
    return times


def read_queries(folder: Path, names: str) -> tuple[Floats, Floats]:
    """Return queries of one or more kinds to tune with, and others to measure with."""
    several = [
        np.load(folder / f"{name}.npy")[: 2 * QUERIES // (1 + names.count("+"))]
        for name in names.split("+")
    ]
    tuning, measuring = (
        np.concatenate([queries[start::2] for queries in several]) for start in (0, 1)
    )
    return tuning, measuring


def show(indexes: list[Built]) -> None:
    """Print the table of docs/benchmarks.md."""
    columns = list(dict.fromkeys(name for built in indexes for name in built.cells))
    heads = [
        "kind",
        "FAISS",
        "tuned by",
        "searched with",
        "build, processor s",
        "file MB",
        "p50 ms",
        "p99 ms",
    ]
    heads += columns
    print("|", " | ".join(heads), "|")
    print("|", " --- |" * len(heads), sep="")
    for built in indexes:
        searched = ", ".join(
            f"{name} {value}" for name, value in built.parameters.items()
        )
        size, (p50, p99) = (
            built.file.stat().st_size / 1e6,
            np.percentile(built.times, [50, 99]),
        )
        cells = [
            f"`{built.kind}`",
            f"`{built.factory}`",
            built.source,
            searched,
            f"{built.seconds:.0f}",
            f"{size:.0f}",
        ]
        cells += [
            f"{p50:.3f}",
            f"{p99:.3f}",
            *(built.cells.get(name, "") for name in columns),
        ]
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="of emoji_vectors.py, or with files like those",
    )
    parser.add_argument("--count", type=int, help="of the first vectors (default: all)")
    parser.add_argument(
        "--kind",
        action="append",
        help=f"may be repeated; default: {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--tune",
        action="append",
        help="kinds of queries; may be repeated; default: captions+words",
    )
    parser.add_argument(
        "--target",
        type=float,
        default=IndexSpec.target_recall,
        help="recall",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=0,
        help="GiB that the kind auto may use (default: half of all)",
    )
    parser.add_argument(
        "--filters",
        action="store_true",
        help="search among 1, 10 and 90 percent of the rows as well",
    )
    given = parser.parse_args()
    vectors = np.load(given.folder / "vectors.npy", mmap_mode="r")[: given.count]
    notes = given.folder / f"built-{len(vectors)}.json"
    known = json.loads(notes.read_text()) if notes.exists() else {}
    indexes = []
    for kind in given.kind or KINDS:
        for source in given.tune or ["captions+words"]:
            file = given.folder / f"{kind}-{len(vectors)}.index"
            name = f"{file.stem} {source} {given.target}"
            factory = next(
                (
                    noted[0]
                    for other, noted in known.items()
                    if other.startswith(f"{file.stem} ")
                ),
                kind,
            )
            indexes.append(built := Built(kind, source, file, factory))
            if name not in known:
                queries = HeldOutQueries(read_queries(given.folder, source)[0], source)
                built.build(
                    vectors,
                    queries,
                    int(given.memory * 2**30) or machine_memory() // 2,
                    given.target,
                )
                known[name] = [built.factory, built.seconds, built.parameters]
                notes.write_text(json.dumps(known))
            built.factory, built.seconds, built.parameters = known[name]
    measure(indexes, vectors, given.folder, given.filters)
    print(f"{len(vectors):,} vectors of {vectors.shape[1]}:\n")
    show(indexes)


if __name__ == "__main__":
    main()
