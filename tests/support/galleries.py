"""Galleries of drawn images, pairs of them, and the rows of scanned ones."""

import json
import tarfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from index_jobs.gallery.scan import Gallery
from tests.support.files import write_jsonl, write_tar
from tests.support.images import draw

WORDS = (
    "photo",
    "drawing",
    "sketch",
    "icon",
    "sticker",
    "print",
    "card",
    "sign",
    "stamp",
    "badge",
    "tile",
    "mark",
)


def write_images(
    path: Path,
    *colors: str,
    shape: str = "square",
    **fields: object,
) -> Path:
    """Write a gallery with one image per colour."""
    path.mkdir()
    for color in colors:
        draw(color, shape).save(path / f"{color}.png")
    rows = (
        {
            "file_name": f"{color}.png",
            "id": color,
            "caption": f"a {color} {shape}",
            "color": color,
        }
        for color in colors
    )
    write_jsonl(path / "metadata.jsonl", *(row | fields for row in rows))
    return path


def write_pairs(path: Path, gallery: Path, words: Sequence[str] = WORDS) -> Path:
    """Write a text of each image of a gallery with each word."""
    rows = [
        json.loads(line)
        for line in (gallery / "metadata.jsonl").read_text().splitlines()
    ]
    return write_jsonl(
        path,
        *(
            {
                "caption": f"{word} of {row['caption']}",
                "image": str(gallery / row["file_name"]),
            }
            for row, word in product(rows, words)
        ),
    )


def write_few(path: Path, example: Path) -> None:
    """Write a bundled gallery with the images of its validation pairs only, and a
    crying cat.
    """
    rows = [
        json.loads(line)
        for line in (example / "metadata.jsonl").read_text().splitlines()
    ]
    rows = [
        row for row in rows if row["split"] == "val" or row["category"] == "crying cat"
    ]
    with tarfile.open(example / "gallery.tar") as tar:
        files = {row["file_name"]: tar.extractfile(row["file_name"]) for row in rows}
        members = {name: file.read() for name, file in files.items() if file}
    write_jsonl(path / "metadata.jsonl", *rows)
    write_tar(path / "gallery.tar", members)


def rows_of(gallery: Gallery) -> dict[str, dict[str, Any]]:
    """Return the rows by name, with their metadata parsed."""
    return {
        row["name"]: row | {"metadata": json.loads(row["metadata"])}
        for row in gallery.table.to_pylist()
    }
