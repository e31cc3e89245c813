"""Cleaning of pairs: broken ones are repaired or left out, and every omission is counted."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat

from dcar_core.data.samples import CleaningReport, Sample


def fold_text(text: str) -> str:
    """Return the text with case, underscores, spacing and Unicode forms folded, for comparisons."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("_", " ").casefold().split())


def tidy_caption(text: str) -> str:
    """Return the caption in Unicode's composed form, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_samples(samples: Sequence[Sample], report: CleaningReport) -> list[Sample]:
    """Return the pairs that can be used, in their order, and tidy texts."""
    seen, pairs, cleaned = set[str](), set[tuple[str, str]](), list[Sample]()
    true_texts = defaultdict[str, set[str]](set)  # of an image, over all of its pairs
    for sample in samples:
        true_texts[sample.image] |= {fold_text(text) for text in (sample.caption, *sample.attributes)}
    for sample in samples:
        folded = fold_text(sample.caption)
        if not folded:
            report.add("captions that are empty or missing, left out", names=[sample.image])
        elif (sample.image, folded) in pairs:
            report.add("pairs that occur twice, left out once")
        else:
            report.add("captions that another image has too (positives of each other in training)", folded in seen)
            seen.add(folded)
            pairs.add((sample.image, folded))
            cleaned.append(_clean_sample(sample, true_texts[sample.image], report))
    return cleaned


def _clean_sample(sample: Sample, true_texts: set[str], report: CleaningReport) -> Sample:
    kept: dict[str, tuple[str, str]] = {}
    for text, category in zip(sample.negatives, sample.negative_categories or repeat(""), strict=False):
        if (folded := fold_text(text)) and folded not in true_texts:
            kept.setdefault(folded, (tidy_caption(text), _tidy_name(category)))
    what = "negatives that are empty, repeated, or equal to a caption or an attribute of their image, left out"
    report.add(what, len(sample.negatives) - len(kept))
    report.add("pairs without a negative", not kept)
    negatives, categories = zip(*kept.values(), strict=True) if kept else ((), ())
    return replace(
        sample,
        caption=tidy_caption(sample.caption),
        category=_tidy_name(sample.category),
        negatives=negatives,
        negative_categories=categories if sample.negative_categories else (),
    )


def _tidy_name(name: str) -> str:
    return " ".join(name.replace("_", " ").split())
