"""Reader of FDRD's JSON, in the two generations that its authors released.

    key -> {"file_name", "file_path", "positive", "negative": [...], "class_name"?}

- Older files give absolute paths of another machine, file names without a suffix and four negatives.
- Newer files (`inter_*`) give the placeholder YOUR_IMAGE_PATH, file names with a suffix, class names and no negatives.
- Beyond FDRD, `positive` may be a list, and `negative_class`, `meta_category` and `attributes` are read.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dcar_core.data.entries import Entry, RowLimit, label_text, make_entry, read_text, required_text
from dcar_core.data.report import CleaningReport
from dcar_core.images import has_image_suffix
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

_PLACEHOLDER = re.compile(r"^<?(YOUR|PATH_TO|MY)\w*PATH\w*>?", re.IGNORECASE)
_FIELDS = ("positive", "negative", "negative_class", "meta_category", "attributes")
_NUMBER = re.compile(r"[_\-/ ]*\d+$")
_VIDEO = re.compile(r"^v_(\w+)_g\d+_c\d+$")  # UCF101's frames


class _Object(dict[str, Any]):
    """A JSON object that keeps repeated keys in `pairs`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def read_fdrd(file: Path, report: CleaningReport) -> Iterator[Entry]:
    """Yield the entries of one file; a repeated key gives two. Raise DataError if too many of them are bad."""
    try:
        content = parse_json(read_text(file), _Object)
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, _Object):
        raise DataError(f"{file} must hold an object, key -> entry, not a {type(content).__name__}")
    if isinstance(content.get("images"), list):
        raise DataError(
            f"{file} has the form of COCO or of Karpathy's splits, which is not read; docs/how-to/prepare-data.md "
            f"shows how to write it as pairs.jsonl"
        )
    report.add("keys that occur twice, both entries kept", len(content.pairs) - len(content))
    limit = RowLimit(file, report)
    for key, value in content.pairs:
        with limit.row():
            if not isinstance(value, dict):
                raise DataError(f"{file}, entry {key!r}: must be an object, not a {type(value).__name__}")
            yield _make_entry(file, key, value)
    limit.finish()


def _make_entry(file: Path, key: str, entry: dict[str, Any]) -> Entry:
    where, notes = f"{file}, entry {key!r}", []
    path = str(entry.get("file_path") or "").replace("\\", "/")
    if _PLACEHOLDER.match(path):
        notes.append("placeholder paths, replaced by the image root")
        path = path.partition("/")[2]
    elif path.startswith("/") or path[1:3] == ":/":
        notes.append("absolute paths of another machine, replaced by the image root")
    name = entry.get("file_name")
    if not name:
        name = PurePosixPath(required_text(entry, where, "file_path")).name
        notes.append("missing file names, taken from the path")
    if not has_image_suffix(str(name)):
        notes.append("file names without a suffix")
    category = label_text(entry, where, "class_name")
    if not category:
        category = category_of_key(key)
        notes.append("categories derived from the key" if category else "entries without a category")
    fields = {field: entry[field] for field in _FIELDS if field in entry}
    return make_entry(fields, where, str(name), path, ["positive"], category=category, notes=tuple(notes))


def category_of_key(key: str) -> str:
    """Return the category that a key states.

    "great_pyrenees_43" -> "great pyrenees", "707-320_1514522" -> "707-320", "1514522" -> "".
    """
    stem = PurePosixPath(key).stem if has_image_suffix(key) else key
    video = _VIDEO.match(stem)
    if video:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", video[1])
    stem = _NUMBER.sub("", stem).removesuffix("_image")
    return stem.replace("_", " ").strip()
