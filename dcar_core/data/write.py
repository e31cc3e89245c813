"""Writing of data sets as JSONL tables that the readers accept."""

import json
from collections.abc import Mapping
from pathlib import Path

from dcar_core.data.samples import Dataset
from dcar_core.util.errors import DataError


def write_splits(splits: Mapping[str, Dataset], directory: Path) -> list[Path]:
    """Write a JSONL file for each split and return the files; image names stay relative to the image root.

    Raises:
        DataError: the directory already holds annotations.
    """
    for pattern in ("*.json", "*.jsonl", "*.csv", "*.parquet", "*.tar"):
        existing = sorted(directory.glob(pattern))
        if existing:
            raise DataError(f"{directory} already holds {existing[0].name}; give --out an empty or a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, data in splits.items():
        file = directory / f"{name}.jsonl"
        rows = ({name: value for name, value in vars(sample).items() if value} for sample in data.samples)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        written.append(file)
    return written
