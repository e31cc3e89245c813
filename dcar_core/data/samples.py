"""Image-caption pairs, their cleaning with a report, and their writing as JSONL tables
that the readers accept.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path

from dcar_core.images import ImageRoot
from dcar_core.util.errors import DataError, ImageError, shorten
from dcar_core.util.files import write_json, write_json_lines

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image-caption pair; an image with several captions has several samples.
    Unknown texts are "".

    image: the image's name below the image root. meta_category: the group of similar
    categories, if the data state one. negative_categories: the category of each
    negative, "" if unknown; empty if all are unknown. attributes: short texts that are
    true of the image; a text equal to one is not used as its negative.
    """

    image: str
    caption: str
    category: str = ""
    meta_category: str = ""
    negatives: tuple[str, ...] = ()
    negative_categories: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The pairs of one split and the root of their images."""

    split: str
    samples: list[Sample]
    root: ImageRoot

    def __len__(self) -> int:
        return len(self.samples)

    def __str__(self) -> str:
        return (
            f"{len(self):,} pairs, {len(self.images):,} images,"
            f" {len(self.categories):,} categories"
        )

    @property
    def categories(self) -> set[str]:
        return {sample.category for sample in self.samples} - {""}

    @cached_property
    def images(self) -> list[str]:
        """Every image once, in the order of the pairs."""
        return list(dict.fromkeys(sample.image for sample in self.samples))

    def read(self, image: str) -> bytes:
        """Return the bytes of an image. Raise DataError if it is missing; the message
        names it.
        """
        try:
            return self.root.read(image)
        except ImageError as error:
            raise DataError(
                f"{self.split}: {error}; point --images to the folder or tar that"
                " holds it"
            ) from error


def write_splits(splits: Mapping[str, Dataset], directory: Path) -> None:
    """Write a JSONL file for each split to a new or empty directory; image names stay
    relative to the image root.
    """
    if directory.is_dir() and (existing := sorted(directory.iterdir())):
        raise DataError(
            f"{directory} already holds {existing[0].name}; give --out an empty or a"
            " new directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in splits.items():
        rows = (
            {field: value for field, value in vars(sample).items() if value}
            for sample in data.samples
        )
        write_json_lines(directory / f"{name}.jsonl", rows)


@dataclass
class CleaningReport:
    """Counts of cases by a phrase that states the finding and its treatment, with names
    of the affected items.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(
        self,
        phrase: str,
        number: int = 1,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        """Count `number` cases, or one per name; empty names count nothing."""
        if names is not None:
            number = len(names)
        if number:
            self.counts[phrase] += number
        if names:
            self.names.setdefault(phrase, []).extend(names)

    def merge(self, other: "CleaningReport") -> None:
        self.counts.update(other.counts)
        for phrase, names in other.names.items():
            self.names.setdefault(phrase, []).extend(names)

    def __str__(self) -> str:
        lines = (
            f"{number:7,} {phrase}"
            + (f": {shorten(self.names[phrase])}" if phrase in self.names else "")
            for phrase, number in self.counts.most_common()
        )
        return "\n".join(lines) or "nothing to repair"


def describe_reports(
    splits: Mapping[str, object], reports: Mapping[str, CleaningReport]
) -> str:
    return "\n".join(
        f"{name}: {splits[name]}\n{report}" for name, report in reports.items()
    )


def save_reports(reports: Mapping[str, CleaningReport], directory: Path) -> None:
    """Write {split: {"counts": {phrase: number}, "names": {phrase: [every name]}}} to
    cleaning.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        split: {"counts": dict(report.counts.most_common()), "names": report.names}
        for split, report in reports.items()
    }
    write_json(directory / "cleaning.json", content)


def fold_text(text: str) -> str:
    """Return the text with case, underscores, spacing and Unicode forms folded, for
    comparisons.
    """
    return " ".join(
        unicodedata.normalize("NFKC", text).replace("_", " ").casefold().split()
    )


def tidy_caption(text: str) -> str:
    """Return the caption in Unicode's composed form, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_samples(samples: Sequence[Sample], report: CleaningReport) -> list[Sample]:
    """Return the pairs that can be used, in their order, and tidy texts."""
    seen = set[str]()
    pairs = set[tuple[str, str]]()
    cleaned = list[Sample]()
    true_texts = defaultdict[str, set[str]](set)  # of an image, over all of its pairs
    for sample in samples:
        true_texts[sample.image] |= {
            fold_text(text) for text in (sample.caption, *sample.attributes)
        }
    for sample in samples:
        folded = fold_text(sample.caption)
        if not folded:
            report.add(
                "captions that are empty or missing, left out", names=[sample.image]
            )
        elif (sample.image, folded) in pairs:
            report.add("pairs that occur twice, left out once")
        else:
            report.add(
                "captions that another image has too (positives of each other in"
                " training)",
                folded in seen,
            )
            seen.add(folded)
            pairs.add((sample.image, folded))
            cleaned.append(_clean_sample(sample, true_texts[sample.image], report))
    return cleaned


def _clean_sample(
    sample: Sample,
    true_texts: set[str],
    report: CleaningReport,
) -> Sample:
    kept: dict[str, tuple[str, str]] = {}
    for text, category in zip(
        sample.negatives,
        sample.negative_categories or repeat(""),
        strict=False,
    ):
        if (folded := fold_text(text)) and folded not in true_texts:
            kept.setdefault(folded, (tidy_caption(text), _tidy_name(category)))
    what = (
        "negatives that are empty, repeated, or equal to a caption or an attribute of"
        " their image, left out"
    )
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
