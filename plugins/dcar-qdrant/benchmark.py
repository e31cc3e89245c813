"""Latency and recall of searches with filters, in Qdrant and in a FAISS file, printed
as a Markdown table.

    python plugins/dcar-qdrant/benchmark.py http://HOST:6333        a server
    python plugins/dcar-qdrant/benchmark.py core
        Qdrant's own core in this process: the extra test

- The collection is created, filled and tuned by the engine, as `dcar index build` does,
  and dropped at the end.
- Filters are conditions for Qdrant and a mask for FAISS, whose time does not include
  making the mask.
- `benchmarks/clusters.py` describes the vectors.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_qdrant import engine as qdrant_engine
from dcar_qdrant import index as qdrant_index
from index_jobs.engines.measure import NEIGHBOURS
from index_jobs.engines.protocol import Engine, HeldOutQueries, NewIndex, load_engine
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec

HERE = Path(__file__).parent
# so that a filter allows 12.5 % and 0.5 % of the rows
CATEGORIES = 8
BRANDS = 200
TIMED = 300


def use_core(folder: Path) -> str:
    """Put Qdrant's core in the place of servers, and return a URL."""
    sys.path.append(str(HERE / "tests"))
    from qdrant_core import CoreClient

    client: Any = CoreClient(folder)
    for module in (qdrant_engine, qdrant_index):
        module.connect = lambda _: client  # type: ignore[attr-defined]
    return "http://core"


def exact(vectors: Floats, queries: Floats, mask: Mask) -> Rows:
    """Return the nearest allowed rows, int64 (q, 10) or fewer."""
    rows = np.flatnonzero(mask)
    nearest = faiss.knn(
        queries,
        vectors[rows],
        min(NEIGHBOURS, len(rows)),
        metric=faiss.METRIC_INNER_PRODUCT,
    )[1]
    return rows[nearest]


def measure(search: Callable[[Floats], Any], queries: Floats, truth: Rows) -> str:
    """Return p50 and p99 in milliseconds, one query at a time, and the recall at 10."""
    times = []
    hits = 0
    for query, neighbours in zip(queries[:, None], truth, strict=True):
        start = time.perf_counter()
        _, rows = search(query)
        times.append(1000 * (time.perf_counter() - start))
        hits += len(np.intersect1d(rows[0], neighbours))
    return "{:.2f} / {:.2f} / {:.3f}".format(
        *np.percentile(times, [50, 99]), hits / truth.size
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("location", help="URL of a server, with settings, or core")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    arguments = parser.parse_args()
    sys.path.append(str(HERE.parents[1] / "benchmarks"))
    from clusters import Clusters  # type: ignore[import-not-found]

    clusters = Clusters(arguments.count, arguments.dim)
    vectors = clusters.draw(arguments.count, 0)
    queries = clusters.draw(1000, 1)
    number = np.random.default_rng(0).permutation(len(vectors))
    fields = pa.table(
        {
            "id": [str(row) for row in range(len(vectors))],
            **dict.fromkeys(("caption", "category"), [""] * len(vectors)),
            "kind": [f"k{row % CATEGORIES}" for row in number],
            "brand": [f"b{row % BRANDS}" for row in number],
        }
    )
    masks = {"kind": number % CATEGORIES == 1, "brand": number % BRANDS == 1}
    timed = queries[1::2][:TIMED]
    print(
        "p50 ms / p99 ms / recall@10\n\n| | build | no filter | 12.5 % allowed | 0.5 %"
        " allowed |"
    )
    print("| --- | ---: | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        (core := Path(temporary) / "core").mkdir()
        url = use_core(core) if arguments.location == "core" else arguments.location
        engines: dict[str, Engine] = {
            "qdrant": qdrant_engine.QdrantEngine(url),
            "faiss": load_engine("faiss"),
        }
        for name, engine in engines.items():
            (folder := Path(temporary) / name).mkdir(parents=True)
            new = NewIndex(
                name=name,
                folder=folder,
                version=1,
                blocks=lambda: iter([vectors]),
                fields=fields,
                count=len(vectors),
                dim=vectors.shape[1],
                queries=HeldOutQueries(queries, "given"),
            )
            created = engine.create(IndexSpec(kind="hnsw"), new)
            index = engine.open({path.name: path for path in folder.iterdir()})
            faiss.omp_set_num_threads(1)
            cells = [
                measure(
                    partial(index.search, k=NEIGHBOURS),
                    timed,
                    exact(vectors, timed, number >= 0),
                )
            ]
            for field, mask in masks.items():
                rows = RowFilter(lambda mask=mask: mask, {field: f"{field[0]}1"})  # type: ignore[misc]
                truth = exact(vectors, timed, mask)
                cells.append(
                    measure(
                        partial(index.search, k=NEIGHBOURS, rows=rows),
                        timed,
                        truth,
                    )
                )
            label = f"{name}, {created.measured['parameters']}"
            print(
                f"| {label} | {created.measured['build_seconds']} s |"
                f" {' | '.join(cells)} |",
                flush=True,
            )
            engine.sync(name, 1, {})  # drops the collection, which no version names


if __name__ == "__main__":
    main()
