"""Latency and recall of searches with filters, in Qdrant and in a FAISS file, printed as Markdown tables.

    python benchmarks/qdrant.py http://HOST:6333        a server; benchmarks/qdrant.sh also runs the tests there
    python benchmarks/qdrant.py core                    Qdrant's own core in this process: the extra stacks

- The collection is created, filled and tuned by the engine, as `dcar index build` does, and dropped at the end.
- Filters are conditions for Qdrant and a mask for FAISS, whose time does not include making the mask.
- The second table compares other parts of a search in Qdrant with what they take over rows and columns at hand; in the
  core also words, drawn by Zipf's law, as sparse vectors with the lexical index.
- `index_material.py` describes the vectors; --vectors and --queries take your own.
"""

import argparse
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from index_material import Clusters

from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.engines.measure import NEIGHBOURS
from index_jobs.engines.protocol import HeldOutQueries, NewIndex, load_engine
from index_jobs.engines.qdrant import engine as qdrant_engine
from index_jobs.engines.qdrant import index as qdrant_index
from index_jobs.selection import Selection
from index_jobs.spec import IndexSpec
from index_jobs.store.lexical.lexical_index import LexicalIndex, write_lexical

CATEGORIES, BRANDS = 8, 200  # so that a filter allows 12.5 % and 0.5 % of the rows
IMAGES = 5  # of each product
TIMED, PART_ROWS, PART_TIMES = 300, 512, 7
RATED = 20_480  # points that are made to measure their rate
WORDS, OF_ITEM, WORD_ROWS = 50_000, 8, 512  # in all, of each item, and rows found by them
BATCH = 1000  # points that the core is given at once
WORD_QUERIES = {"rare": [3000, 9000], "common": [2, 40, 700]}  # the words' places by frequency

Parts = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]  # by name: in Qdrant, and here


def use_core(folder: Path) -> str:
    """Put Qdrant's core in the place of servers, and return a URL."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.support.qdrant_core import CoreClient

    client: Any = CoreClient(folder)
    for module in (qdrant_engine, qdrant_index):
        module.connect = lambda _: client  # type: ignore[attr-defined]
    return "http://core"


def exact(vectors: Floats, queries: Floats, mask: Mask) -> Rows:
    """Return the nearest allowed rows, int64 (q, 10) or fewer."""
    rows = np.flatnonzero(mask)
    found = faiss.knn(queries, vectors[rows], min(NEIGHBOURS, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)[1]
    return rows[found]


def measure(search: Callable[[Floats], Any], queries: Floats, truth: Rows) -> str:
    """Return p50 and p99 in milliseconds, one query at a time, and the recall at 10."""
    times, hits = [], 0
    for query, neighbours in zip(queries[:, None], truth, strict=True):
        start = time.perf_counter()
        _, rows = search(query)
        times.append(1000 * (time.perf_counter() - start))
        hits += len(np.intersect1d(rows[0], neighbours))
    return "{:.2f} / {:.2f} / {:.3f}".format(*np.percentile(times, [50, 99]), hits / truth.size)


def word(number: int) -> str:
    """Return a word of letters."""
    letters = f"{number:05d}".translate(str.maketrans("0123456789", "bdfghklmnp"))
    return "".join(f"{letter}a" for letter in letters)


def word_parts(folder: Path, kinds: list[str]) -> Parts:
    """Return searches by words in the core and in the lexical index. kinds: of the items, whose words are drawn."""
    import qdrant_edge as core

    shares = 1 / np.arange(1, WORDS + 1)
    drawn = np.random.default_rng(0).choice(WORDS, (len(kinds), OF_ITEM), p=shares / shares.sum())
    (folder / "words").mkdir()
    shard = core.EdgeShard.create(
        str(folder / "words"), core.EdgeConfig(vectors={}, sparse_vectors={"words": core.EdgeSparseVectorParams()})
    )
    shard.update(core.UpdateOperation.create_field_index("kind", core.PayloadSchemaType.Keyword))
    for start in range(0, len(kinds), BATCH):
        points = [
            core.Point(row, {"words": core.SparseVector(numbers, [1.0] * len(numbers))}, {"kind": kinds[row]})
            for row, numbers in enumerate((np.unique(each).tolist() for each in drawn[start : start + BATCH]), start)
        ]
        shard.update(core.UpdateOperation.upsert_points(points))
    shard.optimize()
    write_lexical(folder / "lexical", (" ".join(map(word, numbers)) for numbers in drawn))
    lexical, mask = LexicalIndex(folder / "lexical"), np.array(kinds) == "k1"
    some = core.Filter(must=[core.FieldCondition("kind", match=core.MatchValue("k1"))])

    def ways(numbers: list[int], filter: Any, allowed: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        query = core.Query.Nearest(core.SparseVector(numbers, [1.0] * len(numbers)), using="words")
        request = core.QueryRequest(limit=WORD_ROWS, query=query, filter=filter, with_payload=False)
        return lambda: shard.query(request), lambda: lexical.search(" ".join(map(word, numbers)), WORD_ROWS, allowed)

    return {
        f"{WORD_ROWS} rows by {name} words{label}": ways(numbers, *given)
        for name, numbers in WORD_QUERIES.items()
        for label, given in (("", (None, None)), (" and kind", (some, mask)))
    }


def measure_parts(index: Any, fields: pa.Table, query: Floats, more: Parts) -> list[str]:
    """Return the rows of a table: p50 of parts of a search among the rows of one kind, in Qdrant and here."""
    from index_jobs.engines.qdrant.conditions import stored_conditions

    client, name, count = index._client, index._name, index.count
    mask = pc.equal(fields["kind"], "k1").to_numpy()
    some = Selection(lambda: mask, ({"kind": "k1"},))
    conditions = stored_conditions(some, {"kind": ("kind", "string")})
    rows = np.random.default_rng(1).choice(count, PART_ROWS, replace=False)
    sizes = fields["product"].filter(mask).unique()[:10].to_pylist()

    def group_table() -> Any:
        encoded = fields["product"].dictionary_encode().combine_chunks()
        codes, values = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        return np.bincount(codes[mask], minlength=len(values))

    def facet(field: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        column = fields[field]
        return (
            lambda: client.facet(name, field, conditions, 100, exact=True),
            lambda: pc.value_counts(column.filter(pc.equal(fields["kind"], "k1"))),
        )

    parts: Parts = {
        f"cosines of {PART_ROWS} rows": (
            lambda: index.search(query, PART_ROWS, Selection(lambda: mask).within(rows)),
            lambda: index.vectors(rows) @ query[0],
        ),
        "sizes of 10 groups": (lambda: index.stored_counts("product", sizes, some), group_table),
        f"counts of {BRANDS} values": facet("brand"),
        f"counts of {len(fields['product'].unique())} values": facet("product"),
        **more,
    }

    def median(way: Callable[[], Any]) -> str:
        return f"{1000 * np.median(timeit.repeat(way, number=1, repeat=PART_TIMES)):.2f}"

    return [f"| {label} | {' | '.join(map(median, ways))} |" for label, ways in parts.items()]


def upload_rate(vectors: Floats, fields: pa.Table) -> float:
    """Return the points that a second of one core makes of vectors, as the engine sends them."""
    from qdrant_client import models

    start, batches = time.process_time(), range(0, min(len(vectors), RATED), qdrant_index.BATCH)
    for row in batches:
        points = qdrant_engine.make_points(vectors[row : row + qdrant_index.BATCH], fields, row)
        models.PointsList(points=points).model_dump_json(exclude_unset=True, exclude_none=True)
    return min(len(vectors), RATED) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("location", help="URL of a server, with settings, or core")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vectors", type=Path, help="float32 (n, E), as .npy")
    parser.add_argument("--queries", type=Path, help="float32 (q, E), as .npy")
    given = parser.parse_args()
    clusters = Clusters(given.count, given.dim)
    vectors = np.load(given.vectors)[: given.count] if given.vectors else clusters.draw(given.count, 0)
    queries = np.load(given.queries)[:1000] if given.queries else clusters.draw(1000, 1)
    vectors, queries = np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(queries, np.float32)
    number = np.random.default_rng(0).permutation(len(vectors))
    fields = pa.table({
        "id": [str(row) for row in range(len(vectors))],
        **dict.fromkeys(("caption", "category"), [""] * len(vectors)),
        "kind": [f"k{each % CATEGORIES}" for each in number], "brand": [f"b{each % BRANDS}" for each in number],
        "product": [f"product {each // IMAGES}" for each in number],
    })  # fmt: skip
    filters = {"12.5 %": ("kind", number % CATEGORIES == 1), "0.5 %": ("brand", number % BRANDS == 1)}
    timed = queries[1::2][:TIMED]
    print(f"One core makes and serialises {upload_rate(vectors, fields):,.0f} points a second.\n")
    print("p50 ms / p99 ms / recall@10\n\n| | build | no filter | 12.5 % allowed | 0.5 % allowed |")
    print("| --- | ---: | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        (core := Path(temporary) / "core").mkdir()
        url = use_core(core) if given.location == "core" else given.location
        for name in (f"qdrant={url}", "faiss"):
            engine, folder = load_engine(name), Path(temporary) / name.partition("=")[0]
            (folder / "versions").mkdir(parents=True)
            new = NewIndex(
                name=str(folder), folder=folder, version=1, blocks=lambda: iter([vectors]), fields=fields,
                count=len(vectors), dim=vectors.shape[1],
                queries=HeldOutQueries(queries, "given", np.full(len(queries), -1)),
            )  # fmt: skip
            created = engine.create(IndexSpec(kind="hnsw"), new)
            index = engine.open(folder)
            faiss.omp_set_num_threads(1)
            cells = [measure(partial(index.search, k=NEIGHBOURS), timed, exact(vectors, timed, number >= 0))]
            for field, mask in filters.values():
                allowed: Any = mask
                if name != "faiss":
                    allowed = Selection(lambda: mask, ({field: f"{field[0]}1"},))  # noqa: B023
                cells.append(
                    measure(partial(index.search, k=NEIGHBOURS, mask=allowed), timed, exact(vectors, timed, mask))
                )
            label = f"{name.partition('=')[0]}, {created.measured['parameters']}"
            print(f"| {label} | {created.measured['build_seconds']} s | {' | '.join(cells)} |", flush=True)
            if name != "faiss":
                more = word_parts(Path(temporary), fields["kind"].to_pylist()) if given.location == "core" else {}
                parts = measure_parts(index, fields, timed[:1], more)
            engine.sync(folder, str(folder), 1)  # drops the collection, which no version names
    print("\n| p50 ms | in Qdrant | here |\n| --- | ---: | ---: |", *parts, sep="\n")


if __name__ == "__main__":
    main()
