r"""Compare index kinds: build time, memory, latency and recall, printed as a Markdown table.

    python benchmarks/index_kinds.py                                        20,000 clustered vectors, every kind
    python benchmarks/index_kinds.py --count 1000000 --out kinds-1m         an hour or more
    python benchmarks/index_kinds.py --count 1000000 --out kinds-1m --kind hnsw      one kind; --out keeps the others
    python benchmarks/index_kinds.py --vectors V.npy --queries Q.npy --peers    your own, with other libraries beside
    python benchmarks/index_kinds.py --vectors V.npy --queries Q.npy --count 10000000 --filters

- Each kind is built, tuned and written by the code of `dcar index build`, then opened as the service does in a process
  of its own, which measures latency (one query at a time, on one core), recall and memory.
- `index_material.py` describes the vectors. Synthetic clusters flatter inverted lists, whose centres they resemble;
  `gloss_vectors.py` makes real vectors, and `dcar index build` measures on your own.
- Peers are tuned and measured as our kinds are. Their memory is that of an index that is read, ours is memory-mapped.
- `auto` builds everything that it tries, so its build time is the sum.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from index_material import Material, allowed_rows, blocks, count_hits, read_whole
from index_peers import PEERS

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.processes import in_own_process
from index_jobs.engines.faiss.build import SearchParameters, build_index, choose_kinds, machine_memory
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.engines.measure import NEIGHBOURS, Benchmark, tune
from index_jobs.engines.protocol import HeldOutQueries
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec

KINDS = ("flat", "SQ8", "hnsw", "ivf", "ivf-pq-fp16", "ivf-pq", "pq", "auto")
QUERIES, TIMED = 1000, 500
LONGEST_S = 30  # of queries, for slow kinds
PERCENTS = (1, 10, 90)  # of the rows that a filter allows
Result = dict[str, Any]  # a row of the table


def make(kind: str, path: Path, vectors: Floats, queries: HeldOutQueries, memory: int, targets: list[float]) -> Result:
    """Build one kind, tune it and write it. `built_s` (seconds) includes the tuning, and for auto all attempts."""
    count, dim = vectors.shape
    with Usage() as usage:
        if kind in PEERS:
            index: Any = PEERS[kind].build(vectors)
            tunable, about = index, {"factory": index.settings, "reason": "a peer"}
            benchmark = Benchmark(lambda: blocks(vectors), queries, target=targets[0])
            parameters = tune(benchmark, index, tunable)["parameters"]
            index.save(path)
        else:
            choices = choose_kinds(kind, count, dim, memory=memory)
            built = build_index(path, lambda: blocks(vectors), count, dim, choices, queries, target=targets[0])
            index, parameters = faiss.read_index(str(path)), built.measured["parameters"]
            tunable, about = SearchParameters(index), {"factory": built.kind, "reason": built.reason}
    tuned = {targets[0]: parameters}
    for target in targets[1:]:
        benchmark = Benchmark(lambda: blocks(vectors), queries, target=target)
        tuned[target] = tune(benchmark, index, tunable)["parameters"]
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    return {"kind": kind, **about, **usage.found, "file_mb": round(size / 1e6, 1), "tuned": list(tuned.items())}


class Usage:
    """Seconds, processor seconds and the peak of the process's own memory, without pages of mapped files."""

    def __enter__(self) -> "Usage":
        self._start, self._worked, self._peak = time.perf_counter(), time.process_time(), 0.0
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._sample)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._watch.join()
        self.found = {
            "built_s": round(time.perf_counter() - self._start, 1),
            "cpu_s": round(time.process_time() - self._worked, 1),
            "peak_mb": round(self._peak),
        }

    def _sample(self) -> None:
        before = own_memory()
        while not self._ended.wait(0.2):
            self._peak = max(self._peak, (own_memory() - before) / 1e6)


def own_memory() -> int:
    """Return the bytes of this process that no file holds."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def try_out(result: Result, material: Material, filters: bool) -> None:
    """Measure a built index in a process of its own, with the parameters of every target."""
    path = material.index(result["kind"])
    task = {"path": str(path), "kind": result["kind"], "count": material.count, "dim": material.dim}
    task |= {"truth": str(material.truth)}
    if filters and result["kind"] not in PEERS:
        task |= {"filters": {percent: str(material.filtered(percent)) for percent in PERCENTS}}
    result["measured"] = []
    for target, parameters in result["tuned"]:
        found = in_own_process(measure, task | {"parameters": parameters})
        result["measured"].append({"target": target, "parameters": parameters, **found})
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(task: dict[str, Any]) -> Result:
    """Open an index as the service does; return latency, recall and the growth of the process.

    The file is read beforehand, since an index that has been served for a while is in memory, and peers read theirs.
    """
    faiss.omp_set_num_threads(1)
    path, peer = Path(task["path"]), PEERS.get(task["kind"])
    if not peer:
        read_whole(path)
    with np.load(task["truth"]) as file:
        queries, truth = file["queries"], file["truth"]
    before = resident()
    index: Any = peer.open(path, task["dim"]) if peer else FaissIndex.open(path)
    tunable = index if peer else SearchParameters(index._index)
    for name, value in task["parameters"].items():
        tunable.set(name, value)
    index = index if peer else FaissIndex(index._index)  # with these parameters
    found = timed(lambda query: index.search(query, NEIGHBOURS), queries, truth)
    found["resident_mb"] = round((resident() - before) / 1e6, 1)
    for percent, exact in task.get("filters", {}).items():
        rows = RowFilter.of_mask(allowed_rows(task["count"], percent))
        filtered = timed(lambda query, rows=rows: index.search(query, NEIGHBOURS, rows), queries, np.load(exact))
        found[f"of_{percent}"] = f"{filtered['p50_ms']} ms, {filtered['recall_at_10']}"
    return found


def timed(search: Callable[[Floats], Any], queries: Floats, truth: Rows) -> Result:
    """Search one query at a time."""
    rows, times = [], []
    end = time.perf_counter() + LONGEST_S
    for query in queries[: len(truth)]:
        if time.perf_counter() > end:
            break
        start = time.perf_counter()
        rows.append(search(query[None])[1][0])
        times.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times[-TIMED:], [50, 99])  # the first ones warm up
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "recall_at_10": round(count_hits(np.array(rows), truth[: len(rows)]), 4),
    }


def resident() -> int:
    """Return the bytes of this process in memory, shared pages of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def show(results: list[Result], material: Material) -> None:
    """Print the table of docs/benchmarks.md, and the choice of `auto`."""
    kind, source = ("vectors", f", from {material.name}") if material.files else ("clustered vectors", "")
    about = f"{material.count:,} {kind} of {material.dim}{source}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [result | measured for result in results for measured in result["measured"]]
    filters = {f"of_{percent}": f"{percent} % allowed" for percent in PERCENTS}
    columns = {
        "built_s": "build s", "cpu_s": "processor s", "peak_mb": "peak MB", "file_mb": "file MB",
        "resident_mb": "resident MB", "p50_ms": "p50 ms", "p99_ms": "p99 ms", **filters,
        "recall_at_10": "recall@10",
    }  # fmt: skip
    figures = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    print(f"{about}; built on {cores} cores, searched on one, one query at a time:\n")
    print("| `--kind` | FAISS | target | searched with |", " | ".join(figures.values()), "|")
    print("|", " --- |" * (4 + len(figures)), sep="")
    for r in rows:
        searched = ", ".join(f"{name} {value}" for name, value in r["parameters"].items())
        cells = [f"`{r['kind']}`", f"`{r['factory']}`", r["target"], searched, *(r.get(key, "") for key in figures)]
        print("|", " | ".join(map(str, cells)), "|")
    if auto := next((r for r in rows if r["kind"] == "auto"), None):
        print(f"\n`auto` takes `{auto['factory']}`: {auto['reason']}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="default: 20,000, or all of --vectors; beyond, moved copies")
    parser.add_argument("--dim", type=int, default=512, help="of clustered vectors")
    parser.add_argument(
        "--query-count",
        type=int,
        default=QUERIES,
        help="to tune with, and as many to measure; fixed by the first run of --out",
    )
    parser.add_argument("--vectors", type=Path, help="your own: a .npy file, float32 (n, E), normalized")
    parser.add_argument("--queries", type=Path, help="for --vectors: a .npy file; half of them tune, half measure")
    parser.add_argument("--kind", action="append", help=f"may be repeated; default: {', '.join(KINDS)}")
    parser.add_argument("--peers", action="store_true", help=f"as well, where installed: {', '.join(PEERS)}")
    parser.add_argument("--target", type=float, action="append", help="recall; may be repeated, the highest first")
    parser.add_argument("--filters", action="store_true", help="search among 1, 10 and 90 percent of the rows as well")
    parser.add_argument("--memory", type=float, default=0, help="GiB that auto may use (default: half of all)")
    parser.add_argument(
        "--out", type=Path, help="keep vectors and results here for later kinds (default: discard them)"
    )
    given = parser.parse_args()
    if bool(given.vectors) != bool(given.queries):
        parser.error("--vectors and --queries belong together")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run(given, describe(given, out), out)


def describe(given: argparse.Namespace, out: Path) -> Material:
    if given.vectors:
        count, dim = np.load(given.vectors, mmap_mode="r").shape
        files = (given.vectors, given.queries)
        return Material(out, given.vectors.stem, given.count or count, dim, given.query_count, files)
    return Material(out, "clusters", given.count or 20_000, given.dim, given.query_count)


def run(given: argparse.Namespace, material: Material, out: Path) -> None:
    vectors, queries = material.prepare()
    for percent in PERCENTS if given.filters else ():
        material.prepare_filter(vectors, percent)
    notes = out / f"results-{material.mark}.json"
    results: dict[str, Result] = json.loads(notes.read_text()) if notes.exists() else {}
    memory = int(given.memory * 2**30) or machine_memory() // 2
    peers = [name for name in PEERS if importlib.util.find_spec(name)] if given.peers else []
    for kind in [*(given.kind or [kind for kind in KINDS if "measured" not in results.get(kind, {})]), *peers]:
        print(f"{kind} ..", file=sys.stderr, flush=True)
        if kind not in results or not material.index(kind).exists():
            targets = given.target or [IndexSpec.target_recall]
            results[kind] = make(kind, material.index(kind), vectors, queries, memory, targets)
        notes.write_text(json.dumps(results, indent=2))
        try_out(results[kind], material, given.filters)
        notes.write_text(json.dumps(results, indent=2))
    show([result for result in results.values() if "measured" in result], material)


if __name__ == "__main__":
    main()
