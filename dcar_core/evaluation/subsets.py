"""Parts of a data set that an evaluation trains on: few pairs per category, and only some of the categories."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import chain
from random import Random

import numpy as np

from dcar_core.data import Dataset
from dcar_core.negatives.words import fold_name
from dcar_core.training.validation import mean_r1
from dcar_core.util.errors import DataError


def take_shots(data: Dataset, count: int, seed: int) -> Dataset:
    """Return at most `count` pairs of each category. The pairs for a smaller count are among those for a larger one.

    Raises:
        DataError: no pair has a category.
    """
    rows = list(range(len(data)))
    Random(seed).shuffle(rows)
    taken = dict[str, list[int]]()
    for row in rows:
        own = taken.setdefault(fold_name(data.samples[row].category), [])
        if len(own) < count:
            own.append(row)
    taken.pop("", None)
    if not taken:
        raise DataError("--shots counts pairs of a category, but no training pair has one")
    return replace(data, samples=[data.samples[row] for row in sorted(chain(*taken.values()))])


def hold_out_categories(splits: Mapping[str, Dataset], share: float) -> tuple[dict[str, Dataset], frozenset[str]]:
    """Leave a share of the categories out of training and validation, chosen by a hash of their names.

    Returns:
        The splits, with a whole test split, and the folded names of the categories left out.

    Raises:
        DataError: too few categories to leave some out and keep some, or no pair of a split is left.
    """
    names = sorted({sample.category for data in splits.values() for sample in data.samples} - {""})
    spellings = {fold_name(name): name for name in reversed(names)}
    ordered = sorted(spellings, key=lambda key: hashlib.sha256(spellings[key].encode()).digest())
    held_out = frozenset(ordered[: round(share * len(ordered))])
    if not 0 < len(held_out) < len(ordered):
        counts = f"{len(held_out)} of {len(ordered)}"
        raise DataError(f"--unseen-categories {share:g} leaves {counts} categories out; change it")
    kept = dict(splits)
    for name in [name for name in splits if name != "test"]:
        samples = [sample for sample in splits[name].samples if fold_name(sample.category) not in held_out]
        if not samples:
            raise DataError(f"--unseen-categories {share:g} leaves no {name} pairs; lower it, or add {name} pairs")
        kept[name] = replace(splits[name], samples=samples)
    return kept, held_out


def recall_by_familiarity(categories: Mapping[str, dict[str, float]], trained: Collection[str]) -> dict[str, float]:
    """Return R@1 (mean of both directions) on the test pairs of seen and of unseen categories.

    categories: name -> pairs and recall. trained: folded names of the categories that the training split has.
    """
    seen = {name for name in categories if name and fold_name(name) in trained}
    measures = {}
    for label, names in (("seen", seen), ("unseen", categories.keys() - seen - {""})):
        if names:
            recalls, weights = zip(*((mean_r1(categories[n]), categories[n]["pairs"]) for n in names), strict=True)
            measures[f"{label} categories R@1"] = float(np.average(recalls, weights=weights))
    return measures
