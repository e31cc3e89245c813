"""Intervals of R@1 that resample categories, from the results of `dcar evaluate`.

    python benchmarks/category_intervals.py results/twemoji dcar+ lora

- `dcar evaluate` resamples images, as if each were independent. The skin tones of an
  emoji are not: they are found or missed together. Here a resample takes whole
  categories, for data whose test categories are not those of training, with one caption
  for each image.
- Prints the R@1 of both methods and their difference, with 95 % intervals and the
  two-sided p-value.
"""

import argparse
import json
from operator import itemgetter
from pathlib import Path

import numpy as np

from dcar_core.evaluation.tables import mean_categories
from dcar_core.training.validation import mean_r1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results",
        type=Path,
        help="the directory of `dcar evaluate --out`",
    )
    parser.add_argument("method")
    parser.add_argument("other")
    parser.add_argument(
        "--measure",
        choices=("t2i_r1", "i2t_r1"),
        help="default: the mean of both",
    )
    args = parser.parse_args()
    results = json.loads((args.results / "results.json").read_text())
    model = mean_categories(results, args.method)
    other = mean_categories(results, args.other)
    recall = itemgetter(args.measure) if args.measure else mean_r1
    pairs = np.array([each["pairs"] for each in model.values()])
    hits = [
        np.array([recall(found[name]) for name in model]) * pairs / 100
        for found in (model, other)
    ]
    rng = np.random.default_rng(0)
    differences = hits[0] - hits[1]
    # [resamples, categories]
    counts = rng.multinomial(
        len(pairs),
        np.full(len(pairs), 1 / len(pairs)),
        size=10_000,
    )
    for name, own in (
        (args.method, hits[0]),
        (args.other, hits[1]),
        ("difference", differences),
    ):
        samples = 100 * (counts @ own) / (counts @ pairs)
        low, high = np.quantile(samples, [0.025, 0.975])
        tail = min((samples <= 0).sum(), (samples >= 0).sum())
        if name == "difference":
            p = f", p = {min(1, 2 * (tail + 1) / (len(samples) + 1)):.4f}"
        else:
            p = ""
        print(
            f"{name}: {100 * own.sum() / pairs.sum():.1f} ({low:.1f} to {high:.1f}){p}"
        )


if __name__ == "__main__":
    main()
