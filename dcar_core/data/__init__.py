"""Data sets: annotation files become cleaned image-caption pairs, with a report of
repairs and omissions.

    files --readers--> record --image_lookup--> Sample with a readable image --> Dataset

In: annotations (the formats of docs/reference/data-formats.md) and images. Out: a
`Dataset` for each split. Every folder above `model` may import it; it imports `model`,
`images` and `util`.
"""

from dcar_core.data.load import (
    MISSING_IMAGES,
    UNUSABLE,
    Annotations,
    ImagePolicy,
    check_dataset,
)
from dcar_core.data.samples import (
    SPLITS,
    CleaningReport,
    Dataset,
    Sample,
    describe_reports,
    save_reports,
    write_splits,
)

__all__ = [
    "MISSING_IMAGES",
    "SPLITS",
    "UNUSABLE",
    "Annotations",
    "CleaningReport",
    "Dataset",
    "ImagePolicy",
    "Sample",
    "check_dataset",
    "describe_reports",
    "save_reports",
    "write_splits",
]
