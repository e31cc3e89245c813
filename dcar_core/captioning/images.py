"""Images in one folder per category."""

from pathlib import Path

from dcar_core.data import SPLITS
from dcar_core.images import has_image_suffix
from dcar_core.negatives.words import fold_name
from dcar_core.util.errors import DataError


def list_images(images: Path) -> tuple[list[str], list[str]]:
    """List the images in category folders, and the images outside of them; a folder `_` is not a category."""
    if not images.is_dir():
        raise DataError(f"{images} is not a directory; --images takes one with a folder for each category")
    files = (p.relative_to(images) for p in images.rglob("*") if has_image_suffix(p.name) and p.is_file())
    shown = sorted(p.as_posix() for p in files if not any(part.startswith(".") for part in p.parts))
    inside = [name for name in shown if "/" in name and fold_name(folder_category(name)[0])]
    if not inside:
        raise DataError(f"{images} has no images in folders; use one folder per category")
    return inside, sorted(set(shown) - set(inside))


def folder_category(name: str) -> tuple[str, str]:
    """Return the folder of an image (its category) and the folder above (its meta-category, or "")."""
    folders = name.split("/")[:-1]
    meta = folders[-2] if len(folders) > 1 and folders[-2] not in SPLITS else ""
    return folders[-1], meta
