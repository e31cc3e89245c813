"""How well `without` excludes what is unwanted, compared with the word "without" in the
query.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/without.py data/index/twemoji

- Queries: each category of at least eight items, without each attribute that 15 to 85 %
  of them have (metadata fields `category` and `attributes`), such as "woman running"
  without "dark skin tone".
- Unwanted: share of the first five results that have the attribute. Right: share that
  are of the category and lack it.

PyTorch encodes on one thread.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dcar_core import Encoder
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.versions import open_current

RESULTS = 5
WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def exclusion_queries(
    categories: list[str], attributes: list[set[str]]
) -> Iterator[tuple[str, str]]:
    """Yield (category, unwanted attribute) pairs."""
    members = defaultdict(list)
    for category, names in zip(categories, attributes, strict=True):
        members[category].append(names)
    for category, items in members.items():
        counts = Counter(name for names in items for name in names)
        for name, count in counts.items():
            if len(items) >= 8 and 0.15 <= count / len(items) <= 0.85:
                yield category, name


def result_shares(
    opened: IndexVersion,
    vectors: np.ndarray,
    queries: list[tuple[str, str]],
) -> tuple[float, float]:
    """Search with float32 vectors (N, E) of any length; return the unwanted and the
    right share in percent.
    """
    _, rows = opened.search(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True), RESULTS
    )
    unwanted = right = 0
    for (category, name), result_rows in zip(queries, rows, strict=True):
        for item in map(opened.item, map(int, result_rows)):
            is_unwanted = name in item.metadata.get("attributes", ())
            unwanted += is_unwanted
            right += item.category == category and not is_unwanted
    return 100 * unwanted / rows.size, 100 * right / rows.size


def main() -> None:
    """Print one line for each way of excluding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "index",
        type=Path,
        help="a published index whose items have attributes",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_current(args.index)
    encoder = Encoder.load(opened.checkpoint, device="cpu")
    items = [opened.item(int(row)) for row in np.flatnonzero(opened.live)]
    attributes = [set(item.metadata.get("attributes", ())) for item in items]
    queries = list(exclusion_queries([item.category for item in items], attributes))
    categories = encoder.encode_text([category for category, _ in queries])  # [N, E]
    exclusions = encoder.encode_text([name for _, name in queries])
    in_words = encoder.encode_text(
        [f"{category} without {name}" for category, name in queries]
    )
    print(
        f"{len(queries)} queries, {len(items):,} items, first {RESULTS} results,"
        " percent\n"
    )
    print("| query | unwanted | right |\n| --- | --- | --- |")
    rows = {
        "the category": categories,
        'the category, and "without .." in the query': in_words,
    }
    rows |= {
        f"the category, `without`, weight {w:g}": categories - w * exclusions
        for w in WEIGHTS
    }
    for name, vectors in rows.items():
        unwanted, right = result_shares(opened, vectors, queries)
        print(f"| {name} | {unwanted:.1f} | {right:.1f} |")


if __name__ == "__main__":
    main()
