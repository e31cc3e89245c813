"""Splits of a data set: which files hold them, and one split as a `Dataset`.

- A directory has one file for each split: `train.json` (or cars_train.json), `train.jsonl`, .csv, .parquet, `train.tar`
  or `train-*.tar`; or one table `pairs.jsonl`, `.csv`, `.parquet` or `.json`. Without any, a gallery's own files are
  read: its `metadata` table, otherwise its tars. A single file may be given instead of a directory.
- A column or the file's name states the split; otherwise a hash of the image's name decides.
- Data with a train split but no val gives a tenth of its training images to validation.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Literal

from dcar_core.data.clean import clean_entries
from dcar_core.data.entries import Entry
from dcar_core.data.image_lookup import ImageFinder, find_shared_names, locate_images, name_without_lookup
from dcar_core.data.readers import read_fdrd, read_table, read_tar
from dcar_core.data.samples import SPLITS, CleaningReport, Dataset
from dcar_core.images import ImageRoot
from dcar_core.util.errors import DataError, shorten

ImagePolicy = Literal["require", "present", "skip", "ignore"]
MISSING_IMAGES = "images missing, left out"
UNUSABLE = ("images missing", "images broken")  # of a check
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_NAMES = {split: (split, *(alias for alias, meant in _ALIASES.items() if meant == split)) for split in SPLITS}
_IN_NAME = re.compile(rf"(?:^|[_\-.])({'|'.join([*SPLITS, *_ALIASES])})(?:$|[_\-.]\d+$)", re.IGNORECASE)
_TABLES = (".jsonl", ".csv", ".parquet")
_READERS = {".json": read_fdrd, **dict.fromkeys(_TABLES, read_table), ".tar": read_tar}
_FORMS = (
    "pairs.csv, .jsonl or .parquet with the columns image and caption, pairs.json or train.json (FDRD's form), "
    "train.jsonl, .csv, .parquet or .tar, or a gallery's metadata file or tars"
)


class NoPairsError(DataError):
    """Annotations were read, but no pair of a split can be used."""


class Annotations:
    """The annotation files of a data set, each read once, when it is needed."""

    def __init__(self, path: Path, image_root: Path | None = None) -> None:
        """Take the directory that holds them, or one file, and the image root if it is another folder."""
        if not path.exists():
            raise DataError(f"{path} does not exist; give a directory with {_FORMS}, or one such file")
        self.path, self._image_root = path, image_root
        self._read_files: dict[Path, tuple[list[Entry], CleaningReport]] = {}

    def splits(self) -> list[str]:
        """Return the splits that there are; a val split held out from training counts. Raise DataError for none."""
        has_val = any(map(_is_held_out, self._entries_of("train")))
        found = [split for split in SPLITS if self._entries_of(split) or (split == "val" and has_val)]
        if not found:
            raise self._no_pairs(", ".join(SPLITS), [])
        return found

    def load(self, split: str, image_policy: ImagePolicy = "require") -> tuple[Dataset, CleaningReport]:
        """Return one split of a data set and the report of its cleaning.

        Args:
            split: train, val or test.
            image_policy: "require" every image to be there; "present" leaves out missing images and reports their
                names; "skip" also leaves out images that cannot be decoded; "ignore" reads only the annotations.

        Raises:
            DataError: no annotations, none for this split, too many bad rows, or missing images.
        """
        report = CleaningReport()
        entries = self._select(split, report)
        if self.path.is_dir():
            unread = [file.name for form in [*_forms(self.path, split)][1:] for file in form]
            report.add("files of annotations that are not read, as another one comes first", names=unread)
        report.counts.update(entry.note for entry in entries if entry.note)
        if image_policy == "ignore":
            found = [replace(entry, image=name_without_lookup(entry, self._shared)) for entry in entries]
        else:
            found, missing, broken = locate_images(entries, self.finder, report, decode=image_policy == "skip")
            if missing and image_policy == "require":
                raise DataError(
                    f"{split}: {len(missing):,} of {len(entries):,} images are not in {self._root.path}: "
                    f"{shorten(missing)}. Point --images to the folder or tar that holds them, or leave them out with "
                    f"--skip-broken"
                )
            report.add(MISSING_IMAGES, names=missing)
            report.add("images broken, left out", names=broken)
        samples = list(clean_entries(found, report))
        if not samples:
            raise NoPairsError(f"{self.path} has no {split} pairs that can be used:\n{report}")
        return Dataset(split, samples, self._root), report

    def load_all(
        self, splits: Sequence[str] | None = None, image_policy: ImagePolicy = "require"
    ) -> tuple[dict[str, Dataset], dict[str, CleaningReport]]:
        """Load splits, None for all, and report images that an earlier one has too.

        Results on these do not carry over to new ones.
        """
        datasets, reports = dict[str, Dataset](), dict[str, CleaningReport]()
        for split in splits or self.splits():
            datasets[split], reports[split] = self.load(split, image_policy)
        for earlier, later in combinations(datasets, 2):
            known = set(datasets[earlier].images)
            both = [image for image in datasets[later].images if image in known]
            reports[later].add(f"images that {earlier} has too, so {later} measures nothing new", names=both)
        return datasets, reports

    def check_images(self, split: str, report: CleaningReport) -> None:
        """Decode the images of a split, and report how they were found, and which ones are missing or broken."""
        _, *unusable = locate_images(self._select(split, CleaningReport()), self.finder, report, decode=True)
        for phrase, names in zip(UNUSABLE, unusable, strict=True):
            report.add(phrase, names=names)

    @cached_property
    def finder(self) -> ImageFinder:
        """Find images by the names that the annotations give them."""
        return ImageFinder(self._root, self._shared)

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Shared file names of all splits, so that a missing image of one is not taken from another."""
        entries = list[Entry]()
        for split in SPLITS:
            with contextlib.suppress(DataError):  # raised again when that split is loaded
                entries += self._entries_of(split)
        return find_shared_names(entries)

    @cached_property
    def _root(self) -> ImageRoot:
        folder = self.path if self.path.is_dir() or self.path.suffix.lower() == ".tar" else self.path.parent
        return ImageRoot(self._image_root or folder)

    def _select(self, split: str, report: CleaningReport) -> list[Entry]:
        """Return the entries of a split; without a val split, a tenth of the training images are val."""
        divided = split in {"train", "val"} and not self._entries_of("val")
        own = self._entries_of("train" if divided else split, report)
        if divided:
            count, own = len(own), [entry for entry in own if _is_held_out(entry) == (split == "val")]
            if split == "train":
                report.add("pairs held out for validation, as the data has no val split", count - len(own))
            else:
                report.add("pairs taken from the training split, as the data has no val split", len(own))
        if not own:
            raise self._no_pairs(split, [name for name in SPLITS if self._entries_of(name)])
        return own

    def _no_pairs(self, splits: str, there: Sequence[str]) -> DataError:
        if there:
            hint = "small data split by a hash of the images' names can lack one: add a column `split`"
            return DataError(f"{self.path} has no {splits} pairs; it has {', '.join(there)}; {hint}")
        packed = [file.name for pattern in ("*.tar.*", "*.tgz") for file in self.path.glob(pattern)]
        unpack = f"; unpack {shorten(packed)} first" if packed else ""
        read = f" in {shorten([file.name for file in self._read_files])}" if self._read_files else ""
        return DataError(f"{self.path} has no {splits} pairs{read}; it needs {_FORMS}{unpack}")

    def _files(self, split: str) -> list[Path]:
        """Return the files that may hold a split. A gallery's own files are used if there are no annotations."""
        files = {name: annotation_files(self.path, name) for name in SPLITS}
        if any(files.values()):
            return files[split]
        return next(iter(_tables(self.path, "metadata")), sorted(self.path.glob("*.tar")))

    def _entries_of(self, split: str, report: CleaningReport | None = None) -> list[Entry]:
        """Return the entries of a split; none if no file holds it."""
        found = list[Entry]()
        for file in self._files(split):
            if file not in self._read_files:
                if (read := _READERS.get(file.suffix.lower())) is None:
                    raise DataError(f"{file}: annotations are read from {', '.join(_READERS)} files")
                file_report = CleaningReport()
                self._read_files[file] = _with_splits(file, list(read(file, file_report)), file_report), file_report
            entries, file_report = self._read_files[file]
            found += (entry for entry in entries if entry.split == split)
            if report is not None:
                report.merge(file_report)
        return found


def check_dataset(
    path: Path, *, image_root: Path | None = None, decode_images: bool = True, context: int = 0
) -> tuple[dict[str, Dataset], dict[str, CleaningReport]]:
    """Return every split of a data set, with images that are missing or broken named in its report.

    context: count captions of more CLIP tokens, SOS and EOT included; 0 counts none.
    """
    annotations = Annotations(path, image_root)
    datasets, reports = annotations.load_all(None, "ignore")
    for split, data in datasets.items():
        report = reports[split]
        report.add("splits with one category only: no category can be swapped for another", len(data.categories) == 1)
        report.add("pairs without a category", sum(not sample.category for sample in data.samples))
        if context:
            from dcar_core.model.text.tokenizer import count_clip_tokens

            lengths = count_clip_tokens([sample.caption for sample in data.samples])
            report.add(f"captions longer than the context's {context} tokens, cut", sum(n > context for n in lengths))
        if decode_images:
            annotations.check_images(split, report)
    return datasets, reports


def _is_held_out(entry: Entry) -> bool:
    return _hashed(entry.split_key) == "val"


def annotation_files(path: Path, split: str) -> list[Path]:
    """Return the files of a directory, or the single file, that may hold a split."""
    if path.is_file():
        return [path]
    first = next(_forms(path, split), [])
    if len(first) > 1 and first[0].suffix == ".json":
        raise DataError(f"{path} has several files for {split} ({shorten([p.name for p in first])}); name one of them")
    return first


def _forms(path: Path, split: str) -> Iterator[list[Path]]:
    """Yield the files of each form that a directory has for a split, in the order of precedence."""
    named = list[Path]()
    for name in _NAMES[split]:
        yield from _tables(path, name, (".json", *_TABLES))
        shards = sorted(p for p in path.glob("*.tar") if re.fullmatch(rf"{name}([_\-.]\d+)?", p.stem))
        yield from [shards] if shards else []
        named += sorted(path.glob(f"*_{name}.json"))
    yield from [named] if named else []
    yield from _tables(path, "pairs", (*_TABLES, ".json"))


def _tables(path: Path, name: str, suffixes: Sequence[str] = _TABLES) -> list[list[Path]]:
    return [[file] for suffix in suffixes if (file := path / f"{name}{suffix}").is_file()]


def _with_splits(file: Path, entries: list[Entry], report: CleaningReport) -> list[Entry]:
    """Return each entry with its split: from the file's name, from its column, or by a hash of the image's name.

    Of absolute names, the folder that all have in common does not count for the hash.
    """
    absolute = [entry.image for entry in entries if entry.image.startswith("/")]
    common = os.path.commonpath([PurePosixPath(image).parent for image in absolute]) if absolute else "/"
    in_name = file.stem.lower() != "pairs" and _IN_NAME.search(file.stem)
    named = _split_named(in_name[1]) if in_name else ""
    without = [entry for entry in entries if not entry.split]
    if without and len(without) < len(entries) and not named:
        raise DataError(f"{file}: {len(without):,} rows have no split, such as {without[0].image!r}")
    hashed = f"entries of {file.name}, which names no splits, split by a hash of the image's name (80/10/10)"
    done = list[Entry]()
    for entry in entries:
        key, split = entry.image.removeprefix(common).lstrip("/"), _split_named(entry.split)
        if named and split not in {"", named}:
            raise DataError(
                f"{file} has rows of another split, such as {entry.image!r} ({entry.split}); call the file "
                f"pairs{file.suffix} for the column to decide, or leave it out"
            )
        note, split = "" if named or split else hashed, named or split or _hashed(key)
        if split not in SPLITS:
            report.add(f"pairs of the split {entry.split!r}, left out")
        done.append(replace(entry, split=split, split_key=key, note=note))
    return done


def _split_named(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def _hashed(image: str) -> str:
    share = int.from_bytes(hashlib.sha256(image.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"
