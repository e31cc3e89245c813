"""Cleaning: entries become samples; broken ones are repaired or left out, and every case is counted."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator

from dcar_core.data.entries import Entry
from dcar_core.data.samples import CleaningReport, Sample

# "This is a photo of banded.The image": CLIP's tokens are the same with a space.
_GLUED = re.compile(r"(?<=[\w)\"'])\.(?=[A-Z][a-z]|[A-Z] )")


def fold_text(text: str) -> str:
    """Return the text with case, underscores, spacing and Unicode forms folded, for comparisons."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("_", " ").casefold().split())


def clean_entries(entries: Iterable[Entry], report: CleaningReport) -> Iterator[Sample]:
    """Yield one sample per caption, in the order of the entries."""
    seen: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    entries = list(entries)
    true_texts = defaultdict[str, set[str]](set)  # of an image, over all of its entries
    spellings = defaultdict[str, dict[str, None]](dict)
    for entry in entries:
        true_texts[entry.image] |= {fold_text(tidy_caption(text)) for text in (*entry.captions, *entry.attributes)}
    for entry in entries:
        own = true_texts[entry.image]
        category = " ".join(entry.category.replace("_", " ").split())
        spellings[fold_text(category)][category] = None
        for raw in entry.captions:
            caption = tidy_caption(raw)
            normal = fold_text(caption)
            if not normal:
                report.add("empty captions, left out", names=[entry.image])
                continue
            report.add("captions with stray white space, repaired", _collapse_spaces(raw) != raw)
            report.add("captions with sentences that touch, repaired", caption != _collapse_spaces(raw))
            if (entry.image, normal) in pairs:
                report.add("pairs that occur twice, left out once")
                continue
            report.add("captions that another image has too (positives of each other in training)", normal in seen)
            report.add("captions with an underscore, kept as written", "_" in caption)
            seen.add(normal)
            pairs.add((entry.image, normal))
            negatives, categories = _negatives(entry, own, report)
            yield Sample(entry.image, caption, category, entry.meta_category, negatives, categories, entry.attributes)
    twins = [" = ".join(names) for names in spellings.values() if len(names) > 1]
    report.add("categories written in several ways, which results and filters keep apart", names=twins)


def tidy_caption(text: str) -> str:
    """Return the caption with single spaces, and one between sentences that touch."""
    return _GLUED.sub(". ", _collapse_spaces(text))


def _collapse_spaces(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _negatives(entry: Entry, own: set[str], report: CleaningReport) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the usable negatives, and their categories if each has one."""
    matched = len(entry.negative_categories) == len(entry.negatives)
    if entry.negative_categories and not matched:
        report.add("entries whose negatives and negative categories differ in number, categories left out")
    categories = entry.negative_categories if matched else ("",) * len(entry.negatives)
    kept: dict[str, tuple[str, str]] = {}
    for raw, category in zip(entry.negatives, categories, strict=True):
        text = tidy_caption(raw)
        normal = fold_text(text)
        if not normal:
            report.add("empty negatives, left out")
        elif normal in own:
            report.add("negatives equal to a caption or an attribute of their image, left out")
        elif normal in kept:
            report.add("negatives that occur twice for one caption, left out once")
        else:
            kept[normal] = (text, " ".join(category.replace("_", " ").split()))
    if not kept:
        report.add("pairs without a negative")
    return tuple(text for text, _ in kept.values()), tuple(c for _, c in kept.values()) if matched else ()
