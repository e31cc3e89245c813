"""Compare index kinds: build time, memory, latency and recall, printed as a Markdown table.

    python benchmarks/index_kinds.py                                        20,000 clustered vectors, every kind
    python benchmarks/index_kinds.py --count 1000000 --out kinds-1m         an hour or more
    python benchmarks/index_kinds.py --count 1000000 --out kinds-1m --kind hnsw      one kind; --out keeps the others
    python benchmarks/index_kinds.py --emoji --count 100000                 a trained encoder's vectors, texts to search

- Each kind is built, tuned and written by the code of `dcar index build`, then opened as the service does in a process
  of its own, which measures latency (one query at a time, on one core), recall and memory.
- Vectors lie around clusters of unequal size, each wide in directions of its own, so the cluster alone does not give
  the neighbours. HeldOutQueries are drawn from the same clusters: some to tune, others to measure.
- Synthetic clusters still flatter inverted lists, whose centres they resemble. With --emoji, texts query images of the
  bundled galleries. `dcar index build` measures on your own.
- `auto` builds everything that it tries, so its build time is the sum.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from emoji_vectors import captions, load_encoder
from emoji_vectors import vectors as drawn_emoji

from dcar_core.util.arrays import Floats
from index_jobs.building.build import build_index
from index_jobs.building.kinds import choose_kinds, machine_memory
from index_jobs.building.tuning import NEIGHBOURS, TARGET_RECALL, HeldOutQueries, find_neighbours
from index_jobs.store.faiss_index import FaissIndex, write_faiss

KINDS = ("flat", "SQ8", "hnsw", "hnsw-sq8", "ivf", "ivf-sq8", "ivf-pq", "ivf-rabitq", "pq", "auto")
BLOCK, QUERIES, TIMED = 20_000, 1000, 500
LONGEST_S = 30  # of queries, for slow kinds
NOISE = 0.002  # of a recall over so many queries
EMOJI_DIM = 256
SPREAD = 24  # directions in which a cluster is wide


class Clusters:
    """sqrt(count) clusters of unequal size; the largest is many times the smallest."""

    def __init__(self, count: int, dim: int) -> None:
        fixed = np.random.default_rng(0)
        number = max(20, int(np.sqrt(count)))
        self.centres = fixed.normal(size=(number, dim)).astype(np.float32)
        self.basis = fixed.normal(size=(256, dim)).astype(np.float32)
        self.own = fixed.integers(256, size=(number, SPREAD))
        self.shares = np.arange(1, number + 1) ** -0.7
        self.shares /= self.shares.sum()

    def draw(self, size: int, seed: int) -> Floats:
        """Return float32 (size, dim), L2-normalised."""
        draw = np.random.default_rng([7, seed])
        which = draw.choice(len(self.centres), size, p=self.shares)
        wide = 0.25 * draw.normal(size=(size, SPREAD)).astype(np.float32)
        vectors = self.centres[which] + 0.12 * draw.normal(size=(size, self.centres.shape[1])).astype(np.float32)
        for place in range(SPREAD):
            vectors += wide[:, place : place + 1] * self.basis[self.own[which, place]]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


@dataclass(frozen=True)
class Material:
    """Files of vectors, queries to tune with, and queries to measure with their exact neighbours; made once."""

    out: Path
    name: str  # "clusters" or "emoji"
    count: int
    dim: int
    queries: int

    @property
    def mark(self) -> str:
        return f"{self.name}-{self.count}x{self.dim}"

    @property
    def truth(self) -> Path:
        return self.out / f"truth-{self.mark}.npz"

    def index(self, kind: str) -> Path:
        return self.out / f"{kind}-{self.mark}.faiss"

    def prepare(self) -> tuple[Floats, HeldOutQueries]:
        """Return the vectors, memory-mapped, and queries to tune with."""
        path = self.out / f"vectors-{self.mark}.npy"
        if not (path.exists() and self.truth.exists()):
            drawn, queries = self._emoji() if self.name == "emoji" else self._clusters()
            drawing = self.out / f"drawing-{os.getpid()}.npy"  # its own, should another run be at the same
            written = np.lib.format.open_memmap(drawing, "w+", np.float32, (self.count, self.dim))
            start = 0
            for block in drawn:
                written[start : start + len(block)] = block
                start += len(block)
            written.flush()
            drawing.rename(path)
            vectors: Floats = np.load(path, mmap_mode="r")
            truth = find_neighbours(lambda: blocks(vectors), _queries(queries[1::2])).rows
            np.savez(self.truth, tuning=queries[::2], queries=queries[1::2], truth=truth)
        with np.load(self.truth) as file:
            return np.load(path, mmap_mode="r"), _queries(file["tuning"])

    def _clusters(self) -> tuple[Iterator[Floats], Floats]:
        clusters = Clusters(self.count, self.dim)
        starts = range(0, self.count, BLOCK)
        drawn = (clusters.draw(min(BLOCK, self.count - start), seed=start) for start in starts)
        return drawn, clusters.draw(2 * self.queries, seed=2**31 - 1)

    def _emoji(self) -> tuple[Iterator[Floats], Floats]:
        model = load_encoder()
        return drawn_emoji(model, self.count), model.encode_text(captions(2 * self.queries))


def _queries(vectors: Floats) -> HeldOutQueries:
    return HeldOutQueries(vectors, "new", np.full(len(vectors), -1))


def blocks(vectors: Floats) -> Iterator[Floats]:
    return (vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK))


def make(kind: str, path: Path, vectors: Floats, queries: HeldOutQueries, memory: int) -> dict[str, object]:
    """Build one kind, tune it and write it. `built_s` (seconds) includes the tuning, and for auto all attempts."""
    count, dim = vectors.shape
    start, worked = time.perf_counter(), time.process_time()
    built = build_index(lambda: blocks(vectors), count, dim, choose_kinds(kind, count, dim, memory=memory), queries)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    write_faiss(built.index, path)
    return {
        "kind": kind,
        "factory": built.choice.factory,
        "reason": built.choice.reason,
        "parameters": built.measured["parameters"],
        "built_s": round(seconds, 1),
        "cpu_s": round(worked, 1),
        "file_mb": round(path.stat().st_size / 1e6, 1),
    }


def try_out(kind: str, material: Material) -> dict[str, object]:
    """Measure a built index in a fresh process."""
    path = material.index(kind)
    command = [sys.executable, __file__, "--measure", str(path), "--truth", str(material.truth)]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    path.unlink()
    return found


def measure(path: Path, truth_path: Path) -> dict[str, float]:
    """Open an index as the service does; return latency, recall and the growth of the process."""
    import faiss

    faiss.omp_set_num_threads(1)
    with np.load(truth_path) as file:
        queries, truth = file["queries"], file["truth"]
    before = resident()
    index = FaissIndex.open(path)
    rows, times = [], []
    end = time.perf_counter() + LONGEST_S
    for query in queries:
        if time.perf_counter() > end:
            break
        start = time.perf_counter()
        rows.append(index.search(query[None], NEIGHBOURS)[1][0])
        times.append(1000 * (time.perf_counter() - start))
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(rows, truth, strict=False))
    p50, p99 = np.percentile(times[-TIMED:], [50, 99])  # the first ones warm up
    grown = (resident() - before) / 1e6
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "recall_at_10": round(hits / (len(rows) * NEIGHBOURS), 4),
        "resident_mb": round(grown, 1),
    }


def resident() -> int:
    """Return the bytes of this process in memory, shared pages of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def show(results: dict[str, dict[str, Any]], material: Material, memory: int) -> None:
    """Print the table of docs/benchmarks.md, and the choice of `auto`."""
    about = {
        "clusters": f"{material.count:,} clustered vectors of {material.dim}",
        "emoji": f"{material.count:,} images drawn from the emoji, {material.dim} dimensions, queried by texts",
    }[material.name]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{about}; built on {cores} cores, searched on one, one query at a time:\n")
    print("| `--kind` | FAISS | searched with | build s | file MB | resident MB | p50 ms | p99 ms | recall@10 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in results.values():
        searched = ", ".join(f"{name} {value}" for name, value in r["parameters"].items())
        columns = [r[c] for c in ("built_s", "file_mb", "resident_mb", "p50_ms", "p99_ms", "recall_at_10")]
        print("|", " | ".join(map(str, [f"`{r['kind']}`", f"`{r['factory']}`", searched, *columns])), "|")
    if auto := results.get("auto"):
        enough = TARGET_RECALL - NOISE
        fits = [r for r in results.values() if r["recall_at_10"] >= enough and r["file_mb"] * 1e6 <= memory]
        best = min(fits, key=lambda r: r["p50_ms"], default=None)
        print(f"\n`auto` takes `{auto['factory']}`: {auto['reason']}.", end=" ")
        if best:
            print(f"Of those that reach {TARGET_RECALL} and fit, `{best['kind']}` is fastest: {best['p50_ms']} ms.")
        else:
            print(f"None reaches {TARGET_RECALL} here.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=512, help="of clustered vectors")
    parser.add_argument(
        "--queries",
        type=int,
        default=QUERIES,
        help="to tune with, and as many to measure; fixed by the first run of --out",
    )
    parser.add_argument("--emoji", action="store_true", help="vectors of a trained encoder in place of clusters")
    parser.add_argument("--kind", action="append", help=f"may be repeated; default: {', '.join(KINDS)}")
    parser.add_argument("--memory", type=float, default=0, help="GiB that auto may use (default: half of all)")
    parser.add_argument(
        "--out", type=Path, help="keep vectors and results here for later kinds (default: discard them)"
    )
    parser.add_argument("--build-only", action="store_true", help="build now and measure in a later run; needs --out")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--truth", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.truth)))
        return
    if given.build_only and not given.out:
        parser.error("--build-only needs --out")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        material = Material(
            out,
            "emoji" if given.emoji else "clusters",
            given.count,
            EMOJI_DIM if given.emoji else given.dim,
            given.queries,
        )
        vectors, queries = material.prepare()
        notes = out / f"results-{material.mark}.json"
        results = json.loads(notes.read_text()) if notes.exists() else {}
        memory = int(given.memory * 2**30) or machine_memory() // 2
        for kind in given.kind or [kind for kind in KINDS if "p50_ms" not in results.get(kind, {})]:
            print(f"{kind} ..", file=sys.stderr, flush=True)
            if kind not in results or not material.index(kind).exists():
                results[kind] = make(kind, material.index(kind), vectors, queries, memory)
            notes.write_text(json.dumps(results, indent=2))
            if not given.build_only:
                results[kind] |= try_out(kind, material)
                notes.write_text(json.dumps(results, indent=2))
        show({kind: result for kind, result in results.items() if "p50_ms" in result}, material, memory)


if __name__ == "__main__":
    main()
