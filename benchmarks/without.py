"""Measure `without`: the share of unwanted results, against naming "without ..." in the query.

    python benchmarks/without.py data/index/twemoji

- A query is a category of at least eight items without an attribute that 15 to 85 % of them have (metadata fields
  `category` and `attributes`), such as "woman running" without "dark skin tone".
- Unwanted: the share of the first five results with the attribute. Right: the share of the category without it.
- PyTorch encodes on one thread.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dcar_core import Encoder
from index_jobs.store.artifact import Artifact
from index_jobs.store.versions import open_current

FIRST = 5
WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def asked_for(categories: list[str], attributes: list[set[str]]) -> Iterator[tuple[str, str]]:
    members = defaultdict(list)
    for category, held in zip(categories, attributes, strict=True):
        members[category].append(held)
    for category, items in members.items():
        counts = Counter(name for held in items for name in held)
        for name, count in counts.items():
            if len(items) >= 8 and 0.15 <= count / len(items) <= 0.85:
                yield category, name


def unwanted_and_right(artifact: Artifact, queries: np.ndarray, asked: list[tuple[str, str]]) -> tuple[float, float]:
    """Return both shares, in percent, for float32 queries (N, E) of any norm."""
    _, rows = artifact.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), FIRST)
    unwanted = right = 0
    for (category, name), found in zip(asked, rows, strict=True):
        for item in map(artifact.item, map(int, found)):
            has = name in item.metadata.get("attributes", ())
            unwanted += has
            right += item.category == category and not has
    return 100 * unwanted / rows.size, 100 * right / rows.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="a published index whose items have attributes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifact = open_current(args.index)
    encoder = Encoder.load(artifact.checkpoint, device="cpu")
    items = [artifact.item(int(row)) for row in np.flatnonzero(artifact.live)]
    attributes = [set(item.metadata.get("attributes", ())) for item in items]
    asked = list(asked_for([item.category for item in items], attributes))
    if not asked:
        parser.error(f"{args.index}: no category has eight items of which some have an attribute and some not")
    wanted = encoder.encode_text([category for category, _ in asked])  # [N, E]
    not_wanted = encoder.encode_text([name for _, name in asked])
    said = encoder.encode_text([f"{category} without {name}" for category, name in asked])
    print(f"{len(asked)} queries, {len(items):,} items, first {FIRST} results, percent\n")
    print("| query | unwanted | right |\n| --- | --- | --- |")
    rows = {"the category": wanted, 'the category, and "without .." among the words': said}
    rows |= {f"the category, `without`, weight {w:g}": wanted - w * not_wanted for w in WEIGHTS}
    for name, queries in rows.items():
        unwanted, right = unwanted_and_right(artifact, queries, asked)
        print(f"| {name} | {unwanted:.1f} | {right:.1f} |")


if __name__ == "__main__":
    main()
