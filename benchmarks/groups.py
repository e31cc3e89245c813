"""Recall of the ten best groups beside that of the ten best rows, and the time of both.

    python benchmarks/groups.py --items 100000 --kind auto --kind ivf-pq-fp16

- Items are images of products, one to nine each: a vector near one of 1,000 centres for the product, and one near that
  for each image. Queries lie near the centres too.
- Recall is the share of the exact answer, for which every row is compared. p50 is of one search on one core.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np

from app.search.hits import best_of_groups, best_rows
from app.search.plan import Plan
from app.search.rows import GroupField, first_places
from dcar_core.util.arrays import Floats, Rows
from index_jobs.engines.faiss.build import build_index
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.engines.faiss.kinds import choose_kinds
from index_jobs.row_filter import RowFilter

DIM, CENTRES, MOST_IMAGES, NOISE, K, SEARCHES = 256, 1000, 9, 0.5, 10, 200


def make_products(items: int) -> tuple[Floats, Rows, Floats]:
    """Return the vectors of the images, the product of each, and the queries."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, DIM)).astype(np.float32)

    def near(origins: Floats, noise: float) -> Floats:
        vectors = origins + noise * rng.standard_normal(origins.shape).astype(np.float32)
        unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    sizes = rng.integers(1, MOST_IMAGES + 1, items)
    products = np.repeat(np.arange(items), sizes)[:items]
    of_products = near(centres[rng.integers(0, CENTRES, items)], 1)
    order = rng.permutation(items)
    images = near(of_products[products[order]], NOISE / np.sqrt(DIM))
    return images, products[order], near(centres[rng.integers(0, CENTRES, SEARCHES)], 1)


def measure(kind: str, vectors: Floats, products: Rows, queries: Floats) -> str:
    """Return the row of a kind."""
    count, dim = vectors.shape
    with tempfile.TemporaryDirectory() as folder:
        choices = choose_kinds(kind, count, dim)
        built = build_index(Path(folder) / "index", lambda: iter([vectors]), count, dim, choices)
        index = FaissIndex.open(Path(folder) / "index")
    every = RowFilter.of_mask(np.ones(count, np.bool_))
    artifact: Any = SimpleNamespace(search=index.search, vectors=index.vectors, rows=count, live_rows=every)
    groups = GroupField(artifact, "product", products, np.bincount(products))
    recalls, times = [], []
    faiss.omp_set_num_threads(1)
    plan = Plan(end=K - 1)
    for vector in queries:
        order = np.argsort(-(vectors @ vector), kind="stable")
        exact_rows, exact_groups = order[:K], products[order[first_places(products[order])[:K]]]
        started = time.perf_counter()
        rows = best_rows(artifact, plan, vector, K, None)[0].rows
        between = time.perf_counter()
        best = best_of_groups(artifact, plan, vector, groups).rows
        times.append((between - started, time.perf_counter() - between))
        recalls.append((np.isin(exact_rows, rows).mean(), np.isin(exact_groups, products[best]).mean()))
    row_recall, group_recall = np.mean(recalls, 0)
    row_ms, group_ms = (1000 * statistics.median(each) for each in zip(*times, strict=True))
    name = built.kind if kind == "auto" else kind
    return f"| `{name}` | {row_recall:.3f} | {group_recall:.3f} | {row_ms:.2f} | {group_ms:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--kind", action="append", help="may be repeated; default: auto")
    args = parser.parse_args()
    material = make_products(args.items)
    print("| kind | recall of rows | recall of groups | rows, ms | groups, ms |\n| --- | --- | --- | --- | --- |")
    for kind in args.kind or ["auto"]:
        print(measure(kind, *material), flush=True)


if __name__ == "__main__":
    main()
