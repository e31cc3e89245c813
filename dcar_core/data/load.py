"""Splits of a data set: which files hold them, and one split as a `Dataset`.

- docs/reference/data-formats.md has the names of files. Without any, a gallery's own
  are read: its `metadata` table, otherwise its tars. A single file may be given instead
  of a directory.
- A column or the file's name states the split; otherwise a hash of the image's name
  decides.
- Data with a train split but no val gives a tenth of its training images to validation.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Literal

from dcar_core.data.image_lookup import ImageFinder, find_shared_names
from dcar_core.data.readers import read_annotations
from dcar_core.data.samples import (
    SPLITS,
    CleaningReport,
    Dataset,
    Sample,
    clean_samples,
)
from dcar_core.images import ImageRoot
from dcar_core.util.errors import DataError, shorten

ImagePolicy = Literal["require", "present", "skip", "ignore"]
MISSING_IMAGES = "images missing, left out"
BROKEN_IMAGES = "images broken, left out"
UNUSABLE = (MISSING_IMAGES, BROKEN_IMAGES)
_ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
_NAMES = {
    split: (split, *(alias for alias, meant in _ALIASES.items() if meant == split))
    for split in SPLITS
}
_IN_NAME = re.compile(
    rf"(?:^|[_\-.])({'|'.join([*SPLITS, *_ALIASES])})(?:$|[_\-.]\d+$)", re.IGNORECASE
)
_TABLES = (".jsonl", ".csv", ".parquet")
_FORMS = (
    "pairs.csv, .jsonl or .parquet with the columns image and caption, pairs.json or"
    " train.json (FDRD's form), train.jsonl, .csv, .parquet or .tar, or a gallery's"
    " metadata file or tars"
)


class NoPairsError(DataError):
    """Annotations were read, but no pair of a split can be used."""


class Annotations:
    """The annotation files of a data set, read once, on demand."""

    def __init__(self, path: Path, image_root: Path | None = None) -> None:
        """Take the directory that holds them, or one file, and the image root if it is
        another folder.
        """
        if not path.exists():
            raise DataError(
                f"{path} does not exist; give a directory with {_FORMS}, or one such"
                " file"
            )
        self.path = path
        self._image_root = image_root
        self._read_files: dict[
            Path, tuple[list[tuple[str, Sample]], CleaningReport]
        ] = {}

    def splits(self) -> list[str]:
        """Return the names of the splits, a held-out val split included. Raise
        DataError for none.
        """
        has_val = any(map(_is_held_out, self._samples_of("train")))
        splits = [
            split
            for split in SPLITS
            if self._samples_of(split) or (split == "val" and has_val)
        ]
        if not splits:
            raise self._no_pairs(", ".join(SPLITS), [])
        return splits

    def load(
        self,
        split: str,
        image_policy: ImagePolicy = "require",
    ) -> tuple[Dataset, CleaningReport]:
        """Return one split of a data set and the report of its cleaning.

        Args:
            split: train, val or test.
            image_policy: "require" every image to be there; "present" leaves out
                missing images and reports their names; "skip" also leaves out images
                that cannot be decoded; "ignore" reads only the annotations.

        Raises:
            DataError: no annotations, none for this split, too many bad rows, or
                missing images.
        """
        report = CleaningReport()
        samples = self._select(split, report)
        annotated = list(dict.fromkeys(sample.image for sample in samples))
        if image_policy == "ignore":
            # of an absolute one the name, if it is unique
            paths = {image: PurePosixPath(image) for image in annotated}
            name_of = {
                i: p.name if p.is_absolute() and p.name not in self._shared else i
                for i, p in paths.items()
            }
        else:
            located = {image: self.finder.find(image) for image in annotated}
            name_of = {
                image: name for image, name in located.items() if name is not None
            }
            missing = [image for image in annotated if image not in name_of]
            if missing and image_policy == "require":
                raise DataError(
                    f"{split}: {len(missing):,} of {len(annotated):,} images are not in"
                    f" {self._root.path}: {shorten(missing)}. Point --images to the"
                    " folder or tar that holds them, or leave them out with"
                    " --skip-broken"
                )
            report.add(MISSING_IMAGES, names=missing)
            renamed = [
                f"{image} as {name}"
                for image, name in name_of.items()
                if not image.endswith(name)
            ]
            report.add(
                "images found under a name that differs from the annotated one",
                names=renamed,
            )
            if image_policy == "skip":
                broken = self.finder.faults([*name_of.values()])
            else:
                broken = {}
            report.add(
                BROKEN_IMAGES,
                names=[f"{name} ({fault})" for name, fault in broken.items()],
            )
            name_of = {
                image: name for image, name in name_of.items() if name not in broken
            }
        usable = [
            replace(sample, image=name_of[sample.image])
            for sample in samples
            if sample.image in name_of
        ]
        cleaned = clean_samples(usable, report)
        if not cleaned:
            raise NoPairsError(
                f"{self.path} has no {split} pairs that can be used:\n{report}"
            )
        return Dataset(split, cleaned, self._root), report

    def load_all(
        self,
        splits: Sequence[str] | None = None,
        image_policy: ImagePolicy = "require",
    ) -> tuple[dict[str, Dataset], dict[str, CleaningReport]]:
        """Load splits (None: all), and report images that occur in several."""
        datasets = dict[str, Dataset]()
        reports = dict[str, CleaningReport]()
        for split in splits or self.splits():
            datasets[split], reports[split] = self.load(split, image_policy)
        for earlier, later in combinations(datasets, 2):
            known = set(datasets[earlier].images)
            both = [image for image in datasets[later].images if image in known]
            reports[later].add(
                f"images that {earlier} has too, so {later} measures nothing new",
                names=both,
            )
        return datasets, reports

    @cached_property
    def finder(self) -> ImageFinder:
        """Find images by the names that the annotations give them."""
        return ImageFinder(self._root, self._shared)

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Shared file names of all splits, so that a missing image of one is not taken
        from another.
        """
        samples = list[Sample]()
        for split in SPLITS:
            # raised again when that split is loaded
            with contextlib.suppress(DataError):
                samples += self._samples_of(split)
        return find_shared_names({sample.image for sample in samples})

    @cached_property
    def _root(self) -> ImageRoot:
        if self.path.is_dir() or self.path.suffix.lower() == ".tar":
            folder = self.path
        else:
            folder = self.path.parent
        return ImageRoot(self._image_root or folder)

    def _select(self, split: str, report: CleaningReport) -> list[Sample]:
        """Return the pairs of a split; without a val split, a tenth of the training
        images are val.
        """
        is_divided = split in {"train", "val"} and not self._samples_of("val")
        samples = self._samples_of("train" if is_divided else split, report)
        if is_divided:
            count = len(samples)
            samples = [s for s in samples if _is_held_out(s) == (split == "val")]
            moved = len(samples) if split == "val" else count - len(samples)
            report.add(
                "training pairs used for validation, as the data has no val split",
                moved,
            )
        if not samples:
            raise self._no_pairs(
                split, [name for name in SPLITS if self._samples_of(name)]
            )
        return samples

    def _no_pairs(self, splits: str, existing: Sequence[str]) -> DataError:
        if existing:
            hint = (
                "small data split by a hash of the images' names can lack one: add a"
                " column `split`"
            )
            return DataError(
                f"{self.path} has no {splits} pairs; it has {', '.join(existing)};"
                f" {hint}"
            )
        if self._read_files:
            read = f" in {shorten([file.name for file in self._read_files])}"
        else:
            read = ""
        return DataError(f"{self.path} has no {splits} pairs{read}; it needs {_FORMS}")

    def _files(self, split: str) -> list[Path]:
        """Return the files that may hold a split. A gallery's own files are used if
        there are no annotations.
        """
        files = {name: annotation_files(self.path, name) for name in SPLITS}
        if any(files.values()):
            return files[split]
        return _tables(self.path, "metadata", _TABLES) or sorted(
            self.path.glob("*.tar")
        )

    def _samples_of(
        self,
        split: str,
        report: CleaningReport | None = None,
    ) -> list[Sample]:
        """Return the pairs of a split as they are annotated; none if no file holds
        it.
        """
        samples = list[Sample]()
        for file in self._files(split):
            if file not in self._read_files:
                file_report = CleaningReport()
                pairs = _with_splits(
                    file,
                    read_annotations(file, file_report),
                    file_report,
                )
                self._read_files[file] = pairs, file_report
            pairs, file_report = self._read_files[file]
            samples += (sample for of, sample in pairs if of == split)
            if report is not None:
                report.merge(file_report)
        return samples


def check_dataset(
    path: Path,
    *,
    image_root: Path | None = None,
    decode_images: bool = True,
    context: int = 0,
) -> tuple[dict[str, Dataset], dict[str, CleaningReport]]:
    """Return every split of a data set without the images that are missing or broken,
    which its report names.

    context: count captions of more CLIP tokens, SOS and EOT included; 0 counts none.
    """
    datasets, reports = Annotations(path, image_root).load_all(
        None, "skip" if decode_images else "ignore"
    )
    for split, data in datasets.items():
        report = reports[split]
        report.add(
            "splits with one category only: no category can be swapped for another",
            len(data.categories) == 1,
        )
        report.add(
            "pairs without a category",
            sum(not sample.category for sample in data.samples),
        )
        if context:
            from dcar_core.model.tokenizer import count_clip_tokens

            lengths = count_clip_tokens([sample.caption for sample in data.samples])
            report.add(
                f"captions longer than the context's {context} tokens, cut",
                sum(n > context for n in lengths),
            )
    return datasets, reports


def annotation_files(path: Path, split: str) -> list[Path]:
    """Return the files of a directory, or the single file, that may hold a split."""
    if path.is_file():
        return [path]
    for name in _NAMES[split]:
        if tables := _tables(path, name):
            return tables
        if shards := sorted(
            p
            for p in path.glob("*.tar")
            if re.fullmatch(rf"{name}([_\-.]\d+)?", p.stem)
        ):
            return shards
    named = sorted(
        file for name in _NAMES[split] for file in path.glob(f"*_{name}.json")
    )
    if len(named) > 1:
        raise DataError(
            f"{path} has several files for {split}"
            f" ({shorten([p.name for p in named])}); name one of them"
        )
    return named or _tables(path, "pairs")


def _tables(
    path: Path,
    name: str,
    suffixes: Sequence[str] = (".json", *_TABLES),
) -> list[Path]:
    return [
        file for suffix in suffixes if (file := path / f"{name}{suffix}").is_file()
    ][:1]


def _with_splits(
    file: Path,
    pairs: Sequence[tuple[str, Sample]],
    report: CleaningReport,
) -> list[tuple[str, Sample]]:
    """Return each pair with its split: from the file's name, from its column, or by a
    hash of the image's name.
    """
    in_name = _IN_NAME.search(file.stem)
    named = _split_named(in_name[1]) if in_name else ""
    without = [sample.image for split, sample in pairs if not split and not named]
    if 0 < len(without) < len(pairs):
        raise DataError(
            f"{file}: {len(without):,} pairs have no split, such as {without[0]!r}"
        )
    what = (
        f"entries of {file.name}, which names no splits, split by a hash of the image's"
        " name (80/10/10)"
    )
    report.add(what, len(without))
    result = list[tuple[str, Sample]]()
    for stated, sample in pairs:
        split = _split_named(stated) or named or _hashed(sample)
        if named and split != named:
            raise DataError(
                f"{file} has rows of another split, such as {sample.image!r}"
                f" ({stated}); call the file pairs{file.suffix} for the column to"
                " decide, or leave it out"
            )
        report.add(f"pairs of the split {stated!r}, left out", split not in SPLITS)
        result.append((split, sample))
    return result


def _split_named(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def _hashed(sample: Sample) -> str:
    """Return the split of an image by its name; of an absolute one, the last two parts
    count, wherever it lies.
    """
    name = sample.image
    name = "/".join(PurePosixPath(name).parts[-2:]) if name.startswith("/") else name
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def _is_held_out(sample: Sample) -> bool:
    return _hashed(sample) == "val"
