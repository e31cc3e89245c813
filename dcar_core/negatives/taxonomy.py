"""Similarity of categories: meta-categories, and a ranking inside each.

- The meta-category comes from the taxonomy file, else from the data; without either, all categories are one [ours].
- Inside a meta-category the order is that of the taxonomy file, then the frequency in the data's own negatives, then
  the cosine of the features.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.data import CleaningReport, Sample
from dcar_core.negatives.words import fold_name
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

NameVectors = NDArray[np.floating[Any]]
NameFeatures = Callable[[Sequence[str]], NameVectors]  # names -> (n, d), L2-normalized
MOST_RANKED = 100  # of a meta-category
_FORM = '{"meta_categories": {"cats": ["Sphynx", "Ragdoll"]}, "similar": {"Sphynx": ["Ragdoll"]}}; either is optional'


@dataclass(frozen=True)
class Taxonomy:
    """A taxonomy file with folded category names as keys.

    meta_categories: category -> group. similar: category -> others, most similar first. names: category -> spelling.
    """

    meta_categories: dict[str, str] = field(default_factory=dict)
    similar: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def load_taxonomy(file: Path) -> Taxonomy:
    """Read a taxonomy file. Raise DataError if it is missing, is not valid, or puts a category into two groups."""
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"the taxonomy {file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not content or set(content) - {"meta_categories", "similar"}:
        raise DataError(f"the taxonomy {file} must look like {_FORM}")
    for part, value in content.items():
        lists = value.values() if isinstance(value, dict) else [None]
        if not all(isinstance(names, list) and all(isinstance(n, str) and n.strip() for n in names) for names in lists):
            raise DataError(f"the taxonomy {file}: {part!r} must map names to lists of category names; like {_FORM}")
    tree = Taxonomy()
    for group, members in content.get("meta_categories", {}).items():
        for category in members:
            key = fold_name(category)
            if (known := tree.meta_categories.setdefault(key, group)) != group:
                raise DataError(f"the taxonomy {file} has {category!r} in both {known!r} and {group!r}")
            tree.names.setdefault(key, category)
    for category, others in content.get("similar", {}).items():
        tree.similar[fold_name(category)] = [fold_name(other) for other in others]
        for name in (category, *others):
            tree.names.setdefault(fold_name(name), name)
    return tree


def rank_categories(
    samples: Iterable[Sample], taxonomy: Taxonomy | None, features: NameFeatures, report: CleaningReport
) -> dict[str, list[str]]:
    """Map each folded category to the rest of its meta-category, most similar first.

    Raises:
        DataError: the taxonomy has none of the data's categories.
    """
    samples = [sample for sample in samples if sample.category]
    names: dict[str, str] = {}
    for sample in samples:
        names.setdefault(fold_name(sample.category), sample.category)
    groups = _groups(samples, names, taxonomy, report)
    tree = taxonomy or Taxonomy()
    similar, names = _preferred(samples) | tree.similar, tree.names | names
    ranked: dict[str, list[str]] = {}
    for members in map(sorted, groups.values()):
        vectors = features([names[key] for key in members])
        row_of = {key: row for row, key in enumerate(members)}
        for key, row in row_of.items():
            near = np.round(vectors @ vectors[row], 4)  # rounded, to be equal on every device
            place_of = np.full(len(members), np.inf)
            for place, other in enumerate(similar.get(key, ())):
                if other in row_of:
                    place_of[row_of[other]] = place
            nearest = np.lexsort((-near, place_of))[: MOST_RANKED + 1]  # equal ones stay in the order of names
            ranked[key] = [names[members[i]] for i in nearest if i != row]
    for key, others in tree.similar.items():
        said = [names[other] for other in others if other != key]  # the file's order comes first, across groups
        ranked[key] = [*said, *(name for name in ranked.get(key, []) if fold_name(name) not in others)]
    return ranked


def _groups(
    samples: Sequence[Sample], names: Mapping[str, str], taxonomy: Taxonomy | None, report: CleaningReport
) -> dict[str, list[str]]:
    """Map each group to its folded categories, in a stable order; categories without a group are left out."""
    groups: dict[str, list[str]] = defaultdict(list)
    if taxonomy is not None:
        known = {*taxonomy.meta_categories, *taxonomy.similar}
        missing = [name for key, name in names.items() if key not in known]
        if names and len(missing) == len(names):
            raise DataError(
                f"the taxonomy has none of the data's {len(names):,} categories, such as {missing[0]!r}; it has "
                f"{', '.join(map(repr, list(taxonomy.names.values())[:3])) or 'no categories at all'}"
            )
        report.add("categories missing from the taxonomy, not swapped for others", names=sorted(missing))
        for key, group in taxonomy.meta_categories.items():
            groups[group].append(key)
        return groups
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        if sample.meta_category:
            said[fold_name(sample.category)][sample.meta_category] += 1
    if not said:
        return {"": sorted(names)} if names else {}
    several = sorted(names[key] for key, metas in said.items() if len(metas) > 1)
    report.add("categories with several meta-categories, the most frequent taken", names=several)
    without = sorted(name for key, name in names.items() if key not in said)
    report.add("categories without a meta-category, swapped for one another", names=without)
    for key in sorted(names):
        metas = said.get(key, Counter([""]))
        groups[min(metas, key=lambda meta: (-metas[meta], meta))].append(key)
    return groups


def _preferred(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Map each folded category to those of the data's own negatives, the most frequent first."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        others = {fold_name(other) for other in sample.negative_categories if other}
        found[fold_name(sample.category)].update(others - {fold_name(sample.category)})
    return {key: sorted(counts, key=lambda other: (-counts[other], other)) for key, counts in found.items()}


def letter_features(names: Sequence[str]) -> NameVectors:
    """Return hashed letter-trigram features (n, 512) of names, for use without a CLIP."""
    found = np.zeros((len(names), 512))
    for row, name in enumerate(names):
        text = f"  {fold_name(name)} "
        for i in range(len(text) - 2):
            found[row, zlib.crc32(text[i : i + 3].encode()) % 512] += 1
    unit: NameVectors = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit
