"""Memory that each further collection costs a process that already serves one.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/domains.py data/index/twemoji data/index/openmoji

- Opens the indexes one after the other as the service does, runs a few hundred queries on each, and prints the growth
  of resident memory: private memory, and memory mapped from files, which the kernel may drop.
- The last line opens the last index again with a backbone of its own, as a separate process would.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from app.core.settings import Settings
from app.search.snapshots import Snapshot, load_snapshot

QUERIES, BATCH = 300, 30


def resident_memory() -> dict[str, int]:
    """Return resident bytes: private ("anon") and mapped from files ("file")."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("anon", "RssAnon"), ("file", "RssFile"))}


def open_and_query(index: Path, loaded: Sequence[Snapshot], runtime: str) -> Snapshot:
    """Open an index, sharing the backbone of `loaded` snapshots, and run queries until its memory is touched."""
    snapshot = load_snapshot(index, Settings(index=index, device="cpu", threads=1, runtime=runtime), loaded)
    for start in range(0, QUERIES, BATCH):
        vectors = snapshot.encoder.encode_text([f"a picture of thing number {start + n}" for n in range(BATCH)])
        scores, rows = snapshot.artifact.search(vectors, 50)
        assert len(scores) == BATCH
        for row in rows[:, 0]:
            snapshot.artifact.item(int(row))
    gc.collect()
    return snapshot


def main() -> None:
    """Print one line for each index, and one for the last index with its own backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexes", type=Path, nargs="+", help="published indexes with one backbone")
    parser.add_argument("--runtime", default="torch", help="runtime of the encoders (default: %(default)s)")
    args = parser.parse_args()
    loaded: list[Snapshot] = []
    print(f"{'':34}{'private':>10}{'mapped':>10}{'items':>10}")
    for index, is_shared in [*((index, True) for index in args.indexes), (args.indexes[-1], False)]:
        before = resident_memory()
        loaded.append(open_and_query(index, loaded if is_shared else [], args.runtime))
        growth = {name: value - before[name] for name, value in resident_memory().items()}
        label = "everything" if not loaded[1:] else "shared backbone" if is_shared else "its own backbone"
        count = loaded[-1].artifact.manifest.count
        print(f"{f'{index.name}, {label}':34}{growth['anon'] / 1e6:7.1f} MB{growth['file'] / 1e6:7.1f} MB{count:>10,}")
    assert loaded[1].encoder.runtime is loaded[0].encoder.runtime or len(args.indexes) == 1


if __name__ == "__main__":
    main()
