"""Which file holds which split, and one split as a Dataset.

- A directory has one file for each split: `train.json` (or cars_train.json), `train.jsonl`, .csv, .parquet, `train.tar`
  or `train-*.tar`; or one table `pairs.jsonl`, `.csv` or `.parquet`. Without any, a gallery's own files are read: its
  `metadata` table, otherwise its tars. A single file may be given instead of a directory.
- A row names its split in a column, a file in its name; otherwise a hash of the image's name decides.
- Data with a train split but no validation split gives a tenth of its training images to validation.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Literal

from dcar_core.data.clean import clean_entries
from dcar_core.data.entries import Entry
from dcar_core.data.fdrd import read_fdrd
from dcar_core.data.image_lookup import find_shared_names, find_unreadable, locate_images, name_without_lookup
from dcar_core.data.report import CleaningReport, shorten
from dcar_core.data.samples import SPLITS, Dataset
from dcar_core.data.tables import read_table, read_tar
from dcar_core.images import ImageRoot
from dcar_core.util.errors import DataError

ImagePolicy = Literal["require", "present", "skip", "ignore"]
MISSING_IMAGES = "pictures missing, left out"
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_NAMES = {split: (split, *(alias for alias, meant in _ALIASES.items() if meant == split)) for split in SPLITS}
_IN_NAME = re.compile(rf"(?:^|[_\-.])({'|'.join([*SPLITS, *_ALIASES])})(?:$|[_\-.]\d+$)", re.IGNORECASE)
_TABLES = (".jsonl", ".csv", ".parquet")
_FORMS = (
    "train.json (FDRD's form), train.jsonl, .csv, .parquet or .tar, pairs.jsonl, .csv or .parquet with a split column, "
    "or a gallery's metadata file or tars"
)
_SHARES = (("train", 0.8), ("val", 0.9), ("test", 1.0))  # up to here


class Annotations:
    """A data set's files, each read once and not before something is asked of it."""

    def __init__(self, path: Path, image_root: Path | None = None) -> None:
        """
        Args:
            path: the directory that holds the annotations, or one annotation file.
            image_root: the image root, when it is not `path` (or the file's folder).

        Raises:
            DataError: there is no such path.
        """
        if not path.exists():
            raise DataError(f"{path} does not exist; give a directory with {_FORMS}, or one such file")
        self.path, self._image_root = path, image_root
        self._known: dict[Path, tuple[list[Entry], CleaningReport]] = {}

    def splits(self) -> list[str]:
        """Those that the data set has, of train, val and test; a val that is held out from training counts.

        Raises:
            DataError: there are none, or annotations cannot be read.
        """
        found = {split: entries for split in SPLITS if (entries := self._of(split))}
        has_val = "val" in found or any(map(_is_held_out, found.get("train", ())))
        if not found:
            needed = "" if any(map(self._files, SPLITS)) else f": {self._needed()}"
            raise DataError(f"{self.path} has no pairs for {', '.join(SPLITS)}{needed}")
        return [split for split in SPLITS if split in found or (split == "val" and has_val)]

    def load(self, split: str, image_policy: ImagePolicy = "require") -> tuple[Dataset, CleaningReport]:
        """See `load_split`."""
        report = CleaningReport()
        entries = self._chosen(split, report)
        for note in (note for entry in entries for note in entry.notes):
            report.add(note)
        if image_policy == "ignore":
            found = [replace(entry, image=name_without_lookup(entry, self._shared)) for entry in entries]
        else:
            found, missing, broken = _with_images(
                entries, self._root, report, self._shared, decode=image_policy == "skip"
            )
            if missing and image_policy == "require":
                raise DataError(
                    f"{split}: {len(missing):,} of {len(entries):,} pictures are not in {self._root.path}: "
                    f"{shorten(missing)}. Point --images to the folder or tar that holds them, or leave them out with "
                    f"--skip-broken"
                )
            report.add(MISSING_IMAGES, names=missing)
            report.add("pictures broken, left out", names=broken)
        samples = list(clean_entries(found, report))
        if not samples:
            raise DataError(f"{self.path} has no {split} pairs that can be used:\n{report}")
        return Dataset(split, samples, self._root), report

    def unusable_images(self, split: str) -> tuple[list[str], list[str], CleaningReport]:
        """Decode a split's pictures: the names of the missing ones, "name (reason)" of the broken ones, and how others
        were found."""
        report = CleaningReport()
        entries = self._chosen(split, CleaningReport())
        _, missing, broken = _with_images(entries, self._root, report, self._shared, decode=True)
        return missing, broken, report

    @cached_property
    def _shared(self) -> frozenset[str]:
        """See `shared_names`, of all splits: a picture that is missing in one is not taken from another."""
        entries = list[Entry]()
        for split in SPLITS:
            with contextlib.suppress(DataError):  # whoever asks for that split will hear
                entries += self._of(split)
        return find_shared_names(entries)

    @cached_property
    def _root(self) -> ImageRoot:
        beside = self.path if self.path.is_dir() or self.path.suffix.lower() == ".tar" else self.path.parent
        return ImageRoot(self._image_root or beside)

    def _chosen(self, split: str, report: CleaningReport) -> list[Entry]:
        """The split's entries; of data with a train split but no val, a tenth of the training pictures are val."""
        divided = split in {"train", "val"} and not self._of("val")
        source = "train" if divided else split
        own = self._of(source, report)
        if divided:
            whole, own = len(own), [entry for entry in own if _is_held_out(entry) == (split == "val")]
            if split == "train":
                report.add("pairs held out for validation, as the data has no val split", whole - len(own))
            else:
                report.add("pairs taken from the training split, as the data has no val split", len(own))
        if not own and not self._files(source):
            there = [name for name in SPLITS if self._files(name)]
            has = f"it has {', '.join(there)} alone" if there else self._needed()
            raise DataError(f"{self.path} has no annotations for {split}: {has}")
        if not own:
            others = ", ".join(name for name in self.splits() if name != split)
            hint = "Where a hash cuts them, few pictures can leave a split empty: give each row one"
            raise DataError(f"{self.path} has no {split} pairs; it has {others}. {hint}")
        return own

    def _needed(self) -> str:
        packed = [file.name for pattern in ("*.tar.*", "*.tgz") for file in self.path.glob(pattern)]
        return f"it needs {_FORMS}" + (f"; unpack {shorten(packed)} first" if packed else "")

    def _files(self, split: str) -> list[Path]:
        """Return the files that may hold a split. A gallery's own files are used if there are no annotations."""
        files = {name: annotation_files(self.path, name) for name in SPLITS}
        return files.get(split, []) if any(files.values()) else _gallery_files(self.path)

    def _of(self, split: str, report: CleaningReport | None = None) -> list[Entry]:
        """The entries that say they are of a split; none where there is no file for it."""
        found = list[Entry]()
        for file in self._files(split):
            if file not in self._known:
                noted = CleaningReport()
                self._known[file] = list(_with_splits(file, list(_read(file, noted)), noted)), noted
            entries, noted = self._known[file]
            found += (entry for entry in entries if entry.split == split)
            if report is not None:
                report.merge(noted)
        return found


def load_split(
    path: Path, split: str, *, image_root: Path | None = None, image_policy: ImagePolicy = "require"
) -> tuple[Dataset, CleaningReport]:
    """Read one split of a data set.

    Args:
        path: the directory that holds the annotations, or one annotation file.
        split: train, val or test.
        image_root: the image root, when it is not `path` (or the file's folder).
        image_policy: "require" every image to be there; "present" leaves out missing images and reports their names;
            "skip" also leaves out images that cannot be decoded; "ignore" reads the annotations alone.

    Raises:
        DataError: no annotations, none for this split, a field that is missing, or missing pictures; names the file
            and the entry.
    """
    return Annotations(path, image_root).load(split, image_policy)


def load_splits(
    path: Path,
    splits: Sequence[str] | None = None,
    *,
    image_root: Path | None = None,
    image_policy: ImagePolicy = "require",
) -> tuple[dict[str, Dataset], dict[str, CleaningReport]]:
    """Several splits with their reports, as `load_split` reads each; None: all that there are."""
    annotations = Annotations(path, image_root)
    read = {split: annotations.load(split, image_policy) for split in splits or annotations.splits()}
    datasets = {split: data for split, (data, _) in read.items()}
    reports = {split: report for split, (_, report) in read.items()}
    note_overlaps(datasets, reports)
    return datasets, reports


def note_overlaps(splits: Mapping[str, Dataset], reports: Mapping[str, CleaningReport]) -> None:
    """Report pictures that an earlier split has too: what is measured on them is no measure of new pictures."""
    for earlier, later in combinations(splits, 2):
        known = {sample.image for sample in splits[earlier].samples}
        both = dict.fromkeys(sample.image for sample in splits[later].samples if sample.image in known)
        reports[later].add(f"pictures that {earlier} has too, which makes {later} no measure", names=list(both))


def splits_of(path: Path) -> list[str]:
    """See `Annotations.splits`."""
    return Annotations(path).splits()


def _is_held_out(entry: Entry) -> bool:
    return _hashed(entry.cut_by) == "val"


def _with_images(
    entries: Sequence[Entry], root: ImageRoot, report: CleaningReport, shared: Set[str], *, decode: bool
) -> tuple[list[Entry], list[str], list[str]]:
    """Entries whose picture is there (and can be decoded), missing names, broken names with the reason."""
    found, missing = [], []
    for entry, name in locate_images(entries, root, report, shared):
        if name is None:
            missing.append(entry.image)
        else:
            found.append(replace(entry, image=name))
    broken = find_unreadable(list(dict.fromkeys(entry.image for entry in found)), root) if decode else {}
    whole = [entry for entry in found if entry.image not in broken]
    return whole, list(dict.fromkeys(missing)), [f"{name} ({why})" for name, why in broken.items()]


def annotation_files(path: Path, split: str) -> list[Path]:
    """Those that may hold a split, of a directory or a single file."""
    if path.is_file():
        return [path]
    named_so = list[Path]()
    for name in _NAMES[split]:
        for suffix in (".json", *_TABLES):
            if (path / f"{name}{suffix}").is_file():
                return [path / f"{name}{suffix}"]
        shards = sorted(p for p in path.glob("*.tar") if re.fullmatch(rf"{name}([_\-.]\d+)?", p.stem))
        if shards:
            return shards
        named_so += sorted(path.glob(f"*_{name}.json"))
    if len(named_so) > 1:
        raise DataError(
            f"{path} has several files for {split} ({shorten([p.name for p in named_so])}); name one of them"
        )
    return named_so or _tables(path, "pairs")[:1]


def _gallery_files(path: Path) -> list[Path]:
    """Return the files that describe a gallery's images: its metadata file, otherwise its tars."""
    return _tables(path, "metadata")[:1] or sorted(path.glob("*.tar"))


def _tables(path: Path, name: str) -> list[Path]:
    return [file for suffix in _TABLES if (file := path / f"{name}{suffix}").is_file()]


def _read(file: Path, report: CleaningReport) -> Iterator[Entry]:
    suffix = file.suffix.lower()
    if suffix == ".json":
        return read_fdrd(file, report)
    if suffix in _TABLES:
        return read_table(file)
    if suffix == ".tar":
        return read_tar(file, report)
    raise DataError(f"{file}: annotations are read from .json, .jsonl, .csv, .parquet and .tar files")


def _with_splits(file: Path, entries: list[Entry], report: CleaningReport) -> Iterator[Entry]:
    """Each entry with its split: of the file's name, of its own column, or by a hash."""
    entries = _to_cut(entries)
    in_name = file.stem.lower() != "pairs" and _IN_NAME.search(file.stem)
    if in_name:
        split = _split_named(in_name[1])
        other = [entry for entry in entries if entry.split and _split_named(entry.split) != split]
        if other:
            raise DataError(
                f"{file}: {len(other):,} rows say that they are of another split, such as {other[0].image!r} "
                f"({other[0].split}); call the file pairs{file.suffix} for the column to decide, or leave it out"
            )
        yield from (replace(entry, split=split) for entry in entries)
        return
    said = [bool(entry.split) for entry in entries]
    if any(said) and not all(said):
        raise DataError(
            f"{file}: {said.count(False):,} rows have no split, such as {entries[said.index(False)].image!r}"
        )
    if not any(said):
        note = f"entries of {file.name}, which names no splits, cut by a hash of the picture's name (80/10/10)"
        yield from (replace(e, split=_hashed(e.cut_by), notes=(*e.notes, note)) for e in entries)
        return
    for entry in entries:
        split = _split_named(entry.split)
        if split not in SPLITS:
            report.add(f"pairs of the split {entry.split!r}, left out")
        yield replace(entry, split=split)


def _split_named(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def _to_cut(entries: list[Entry]) -> list[Entry]:
    """With what a hash decides by: the picture's name, without the folder that all absolute ones have in common."""
    absolute = [entry.image for entry in entries if entry.image.startswith("/")]
    common = os.path.commonpath([PurePosixPath(image).parent for image in absolute]) if absolute else "/"
    return [replace(entry, cut_by=_below(entry.image, common)) for entry in entries]


def _below(image: str, folder: str) -> str:
    return PurePosixPath(image).relative_to(folder).as_posix() if image.startswith("/") else image


def _hashed(image: str) -> str:
    share = int.from_bytes(hashlib.sha256(image.encode()).digest()[:4]) / 2**32
    return next(split for split, up_to in _SHARES if share < up_to)
