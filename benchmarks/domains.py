"""Measure the memory that one more collection adds to a process that serves one already.

    python benchmarks/domains.py data/index/twemoji data/index/openmoji

- Opens the indexes one after the other as the service does, runs a few hundred queries on each, and prints the growth
  of resident memory: private to the process, and mapped from files, which the kernel may drop.
- The last line opens the last index again with a backbone of its own, as a process per collection would.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from app.core.settings import Settings
from app.search.snapshots import Snapshot, load_snapshot

MIB = 2**20
QUERIES = 300


def memory() -> dict[str, int]:
    """Return resident bytes: private ("anon") and mapped from files ("file")."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("anon", "RssAnon"), ("file", "RssFile"))}


def opened(index: Path, loaded: Sequence[Snapshot], runtime: str) -> Snapshot:
    snapshot = load_snapshot(index, Settings(index=index, device="cpu", threads=1, runtime=runtime), loaded)
    for start in range(0, QUERIES, 30):
        vectors = snapshot.encoder.encode_text([f"a picture of thing number {start + n}" for n in range(30)])
        scores, rows = snapshot.artifact.search(vectors, 50)
        assert len(scores) == 30
        for row in rows[:, 0]:
            snapshot.artifact.item(int(row))
    gc.collect()
    return snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexes", type=Path, nargs="+", help="published indexes over one backbone")
    parser.add_argument("--runtime", default="torch", help="runtime of the encoders (default: %(default)s)")
    args = parser.parse_args()
    loaded: list[Snapshot] = []
    print(f"{'':34}{'private':>10}{'mapped':>10}{'items':>10}")
    shared = [(index, True) for index in args.indexes] + [(args.indexes[-1], False)]
    for index, sharing in shared:
        before = memory()
        loaded.append(opened(index, loaded if sharing else [], args.runtime))
        grown = {name: value - before[name] for name, value in memory().items()}
        label = "everything" if not loaded[1:] else "shared backbone" if sharing else "its own backbone"
        count = loaded[-1].artifact.manifest.count
        print(f"{index.name + ', ' + label:34}{grown['anon'] / MIB:7.1f} MB{grown['file'] / MIB:7.1f} MB{count:>10,}")
    assert loaded[1].encoder.runtime is loaded[0].encoder.runtime or len(args.indexes) == 1


if __name__ == "__main__":
    main()
