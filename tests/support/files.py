"""Files that tests write."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_file(path: Path, data: bytes) -> Path:
    """Write bytes, creating parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_json(path: Path, content: object) -> Path:
    """Write one JSON document, creating parent folders."""
    return write_file(path, json.dumps(content).encode())


def jsonl(*rows: Any) -> bytes:
    """Return one JSON document per line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_jsonl(path: Path, *rows: Any) -> Path:
    """Write one JSON document per line, creating parent folders."""
    return write_file(path, jsonl(*rows))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table in the format of its suffix."""
    if path.suffix == ".jsonl":
        write_jsonl(path, *rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    """Return a tar of these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """Write a tar of these members, in this order."""
    return write_file(path, tar_bytes(members, mode))


def copy_exports(exports: Path, cache: Path) -> None:
    """Copy exported graphs into a runtime cache, without the encoders that are cached
    beside them.
    """
    shutil.copytree(
        exports,
        cache / "exports",
        ignore=shutil.ignore_patterns("*encoder-*"),
        dirs_exist_ok=True,
    )
