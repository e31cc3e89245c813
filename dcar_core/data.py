"""Annotations to samples, with a report of what was repaired or left out.

A data set is a directory with `train.json`, `val.json` and `test.json` in FDRD's form

    key -> {"file_name", "file_path", "positive", "negative": [...], "class_name"?}

or with one `pairs.jsonl` / `pairs.csv` with the columns image, caption, split and, if known, category and negatives.
Pictures are found by `file_name` below the image root (the directory itself by default), in folders or tars. Of the
absolute paths in released files, which are somebody else's, only the last part is used, and only without a `file_name`.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcar_core.errors import DataError, ImageError
from dcar_core.images import ImageRoot

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image-caption pair. `category` is "" when it is not known."""

    image: str
    caption: str
    category: str = ""
    negatives: tuple[str, ...] = ()
    negative_categories: tuple[str, ...] = ()


@dataclass
class CleaningReport:
    """Counts of everything that was not as it should be; nothing is repaired in silence."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def __str__(self) -> str:
        if not self.counts:
            return "nothing to repair"
        return "\n".join(f"{number:7,} {what}" for what, number in self.counts.most_common())


@dataclass(frozen=True)
class Dataset:
    """The pairs of one split and where their pictures are."""

    split: str
    samples: list[Sample]
    root: ImageRoot

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: Sample) -> bytes:
        """The picture's bytes.

        Raises:
            DataError: it is missing; the message names it.
        """
        try:
            return self.root.read(sample.image)
        except ImageError as error:
            raise DataError(f"{self.split}: {error}; point --images to the folder or tar that holds it") from error


def load_split(path: Path, split: str, *, images: Path | None = None) -> tuple[Dataset, CleaningReport]:
    """Read one split of a data set.

    Args:
        path: the directory that holds the annotations, or one FDRD file.
        split: train, val or test.
        images: the image root, when it is not `path`.

    Raises:
        DataError: no annotations, none for this split, or a field that is missing; names the file and the entry.
    """
    report = CleaningReport()
    root = images or (path if path.is_dir() else path.parent)
    samples = list(_clean(_read(path, split, report), report))
    if not samples:
        raise DataError(f"{path} has no {split} pairs")
    return Dataset(split, samples, ImageRoot(root)), report


def _read(path: Path, split: str, report: CleaningReport) -> Iterator[Sample]:
    if path.is_file():
        yield from _read_fdrd(path, report)
        return
    fdrd = path / f"{split}.json"
    if fdrd.is_file():
        yield from _read_fdrd(fdrd, report)
        return
    for table in (path / "pairs.jsonl", path / "pairs.csv"):
        if table.is_file():
            yield from _read_table(table, split)
            return
    raise DataError(f"{path} has neither {split}.json (FDRD's form) nor pairs.jsonl or pairs.csv with a split column")


def _read_fdrd(file: Path, report: CleaningReport) -> Iterator[Sample]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold an object, key -> entry, not a {type(content).__name__}")
    for key, entry in content.items():
        if not isinstance(entry, dict):
            raise DataError(f"{file}, entry {key!r}: must be an object, not a {type(entry).__name__}")
        caption = _field(entry, "positive", file, key)
        name = entry.get("file_name") or Path(_field(entry, "file_path", file, key)).name
        category = entry.get("class_name")
        if category is None:
            report.add("categories derived from the key")
            category = re.sub(r"[_\-/]*\d+(\.\w+)?$", "", key).replace("_", " ")
        yield Sample(
            str(name),
            caption,
            str(category),
            tuple(map(str, entry.get("negative") or ())),
            tuple(map(str, entry.get("negative_class") or ())),
        )


def _read_table(file: Path, split: str) -> Iterator[Sample]:
    for number, row in enumerate(_rows(file), start=1):
        if _field(row, "split", file, number) != split:
            continue
        negatives = row.get("negatives") or []
        if isinstance(negatives, str):
            negatives = [negatives]
        yield Sample(
            _field(row, "image", file, number),
            _field(row, "caption", file, number),
            str(row.get("category") or ""),
            tuple(negatives),
        )


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{file}, line {number}: not JSON: {error}") from error


def _field(entry: Mapping[str, Any], name: str, file: Path, where: object) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{file}, entry {where!r}: field {name!r} is missing or empty")
    return value


def _clean(samples: Iterator[Sample], report: CleaningReport) -> Iterator[Sample]:
    seen: set[str] = set()
    for sample in samples:
        caption = " ".join(sample.caption.split())
        normal = caption.casefold()
        if normal in seen:
            report.add("captions that another pair has too (positives of each other in training)")
        seen.add(normal)
        matched = len(sample.negative_categories) == len(sample.negatives)
        categories = sample.negative_categories if matched else ("",) * len(sample.negatives)
        kept = [
            (n, c)
            for n, c in zip(sample.negatives, categories, strict=True)
            if " ".join(n.split()).casefold() != normal
        ]
        if len(kept) < len(sample.negatives):
            report.add("negatives equal to their positive, left out", len(sample.negatives) - len(kept))
        if not kept:
            report.add("pairs without a negative (they take no part in the category loss)")
        yield Sample(
            sample.image,
            caption,
            sample.category,
            tuple(n for n, _ in kept),
            tuple(c for _, c in kept) if matched else (),
        )
