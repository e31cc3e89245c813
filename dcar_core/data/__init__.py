"""Data sets: annotation files become cleaned image-caption pairs, with a report of what was repaired or left out.

    files --readers--> Entry --clean--> Sample --pictures--> Sample with a readable image --> Dataset

In: a directory of annotations (the formats of docs/data.md) and images. Out: a `Dataset` for each split.
Every folder above `model` may import it; it imports `util` alone.
"""

from dcar_core.data.check import CheckedSplit, check
from dcar_core.data.load import MISSING, Pictures, load_split, load_splits, splits_of
from dcar_core.data.report import CleaningReport, describe, save_reports
from dcar_core.data.samples import SPLITS, Dataset, Sample
from dcar_core.data.write import write_splits

__all__ = [
    "MISSING",
    "SPLITS",
    "CheckedSplit",
    "CleaningReport",
    "Dataset",
    "Pictures",
    "Sample",
    "check",
    "describe",
    "load_split",
    "load_splits",
    "save_reports",
    "splits_of",
    "write_splits",
]
