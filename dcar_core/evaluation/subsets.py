"""Parts of a data set that an evaluation trains on: few pairs a category, and only some of the categories."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from random import Random

from dcar_core.data import Dataset
from dcar_core.util.errors import DataError


def take_shots(data: Dataset, count: int, seed: int) -> Dataset:
    """Return at most `count` pairs of each category; fewer pairs are a part of more.

    Raises:
        DataError: no pair has a category.
    """
    rows = list(range(len(data)))
    Random(seed).shuffle(rows)
    taken = dict[str, list[int]]()
    for row in rows:
        own = taken.setdefault(data.samples[row].category, [])
        if len(own) < count:
            own.append(row)
    taken.pop("", None)
    if not taken:
        raise DataError("--shots counts pairs of a category, but no training pair has one")
    return replace(data, samples=[data.samples[row] for row in sorted(chain(*taken.values()))])


def hold_out_categories(splits: Mapping[str, Dataset], share: float) -> tuple[dict[str, Dataset], frozenset[str]]:
    """Leave a share of the categories out of training and validation, chosen by a hash of their names.

    Returns:
        The splits, of which the test split is whole, and the categories that it alone has.

    Raises:
        DataError: too few categories to leave some out and keep some.
    """
    names = {sample.category for data in splits.values() for sample in data.samples} - {""}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    unseen = frozenset(ordered[: round(share * len(ordered))])
    if not 0 < len(unseen) < len(names):
        raise DataError(f"--unseen-categories {share:g} leaves {len(unseen)} of {len(names)} categories out; change it")
    kept = {
        name: data
        if name == "test"
        else replace(data, samples=[sample for sample in data.samples if sample.category not in unseen])
        for name, data in splits.items()
    }
    return kept, unseen
