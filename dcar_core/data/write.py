"""Writing of data sets as JSONL tables that the readers accept."""

import json
from collections.abc import Mapping
from pathlib import Path

from dcar_core.data.samples import Dataset
from dcar_core.util.errors import DataError
from dcar_core.util.files import atomic_writer


def write_splits(splits: Mapping[str, Dataset], directory: Path) -> None:
    """Write a JSONL file for each split, or none if that fails; image names stay relative to the image root.

    Raises:
        DataError: the directory already holds annotations.
    """
    for pattern in ("*.json", "*.jsonl", "*.csv", "*.parquet", "*.tar"):
        existing = sorted(directory.glob(pattern))
        if existing:
            raise DataError(f"{directory} already holds {existing[0].name}; give --out an empty or a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in splits.items():
            rows = ({name: value for name, value in vars(sample).items() if value} for sample in data.samples)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with atomic_writer(directory / f"{name}.jsonl") as file:
                file.write(text.encode())
    except BaseException:
        for name in splits:  # the same command would refuse them
            (directory / f"{name}.jsonl").unlink(missing_ok=True)
        raise
