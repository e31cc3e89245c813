"""hit@1, hit@5 and nDCG@10 of short queries by vectors alone, by words alone, and by
both.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/hybrid.py --index data/index/twemoji --queries
    examples/emoji/queries/test.tsv

Every item of a bundled gallery is searched. `--queries` as in
examples/emoji/evaluate_queries.py. `--weights` compares weights of the words; choose on
validation.tsv.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from app.search.hits import best_rows
from app.search.query import Plan
from index_jobs.index.lexical import DEFAULT_WEIGHT

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"


def measure_quality(index: Path, queries: Path, weights: list[float]) -> None:
    """Print a table: one row for each weight of the words, from none to words alone."""
    sys.path.insert(0, str(EMOJI))
    evaluate_queries: Any = import_module("evaluate_queries")
    from dcar_core import Encoder
    from index_jobs.index.versions import open_current

    opened = open_current(index)
    items = [opened.item(row) for row in range(opened.rows)]
    read = evaluate_queries.read_queries(
        queries, [item.metadata | {"category": item.category} for item in items]
    )
    texts = [query.text for query in read]
    encoder = Encoder.load(opened.checkpoint, device="cpu")
    print(f"{len(read)} queries, {len(items):,} items, percent\n")
    print(
        f"| weight of the words | {' | '.join(evaluate_queries.METRICS)} |\n| --- | ---"
        " | --- | --- |"
    )
    vectors = encoder.encode_text(texts)
    for weight in weights:
        scores = np.full((len(read), len(items)), -np.inf, np.float32)
        for number, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
            best = best_rows(
                opened,
                Plan(text=text, words_weight=weight),
                vector,
                10,
                None,
            ).rows.tolist()
            scores[number, best] = -np.arange(len(best))
        means = 100 * evaluate_queries.measure(scores, read).mean(0)
        name = {0.0: "vectors alone", 1.0: "words alone"}.get(weight, f"{weight:g}")
        print(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--index",
        type=Path,
        required=True,
        help="an index of examples/emoji/twemoji or openmoji",
    )
    parser.add_argument(
        "--queries",
        type=Path,
        default=EMOJI / "queries/validation.tsv",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[0.0, DEFAULT_WEIGHT, 1.0],
    )
    args = parser.parse_args()
    measure_quality(args.index, args.queries, args.weights)


if __name__ == "__main__":
    main()
