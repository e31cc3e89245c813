"""Lookup of an entry's image, and the check whether it can be decoded.

- A name is tried as it is, with image suffixes, then by the last parts of its path, the longest first, so that
  /elsewhere/DATA/pets/images/a.jpg is found as images/a.jpg.
- The last attempt is the only file of that name below the image root. It is skipped if several annotated images share
  the name, or if the annotated folder exists without the image.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import PurePosixPath

from dcar_core.data.entries import Entry
from dcar_core.data.samples import CleaningReport
from dcar_core.images import IMAGE_SUFFIXES, ImageRoot, has_image_suffix, open_image
from dcar_core.util.errors import ImageError

_SUFFIXES = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}), ".JPG", ".JPEG", ".PNG")
_THREADS = 8


class ImageFinder:
    """Finds annotated names below an image root. shared: file names of several images."""

    def __init__(self, root: ImageRoot, shared: Set[str]) -> None:
        self.root, self._shared = root, shared

    def find(self, image: str, path: str = "") -> str | None:
        """Return the name for `root.read`; None without such an image, or with several in different folders."""
        for candidate in _candidates(image, path):
            if candidate in self._shared and candidate != (path or image):
                continue  # ambiguous without its folder
            for form in unicode_forms(candidate):
                if form in self.root:
                    return form
        by_base, folders = self._by_base
        annotated = PurePosixPath(path or image)
        if annotated.name in self._shared or (annotated.parent.name and annotated.parent.name in folders):
            return None
        matches = by_base[PurePosixPath(image).name]
        return matches[0] if len(matches) == 1 else None

    def fault(self, name: str) -> str:
        """Return why an image cannot be decoded, or ""."""
        try:
            open_image(self.root.read(name))
        except ImageError as error:
            return str(error)
        return ""

    @cached_property
    def _by_base(self) -> tuple[defaultdict[str, list[str]], set[str]]:
        """Names by file name, with and without suffix, and the names of folders."""
        by_base, folders = defaultdict[str, list[str]](list), set[str]()
        for name in self.root.names():
            path = PurePosixPath(name)
            by_base[path.name].append(name)
            by_base[path.stem].append(name)
            folders.add(path.parent.name)
        return by_base, folders


def find_shared_names(entries: Iterable[Entry]) -> frozenset[str]:
    """Return file names that occur in different folders; a/b.jpg and b.jpg may be one image."""
    places = defaultdict[str, set[tuple[str, ...]]](set)
    for entry in entries:
        parts = PurePosixPath(entry.path or entry.image).parts
        places[parts[-1] if parts else ""].add(parts)
    return frozenset(name for name, paths in places.items() if any(max(paths, key=len)[-len(p) :] != p for p in paths))


def unicode_forms(name: str) -> Iterable[str]:
    """Return the name and its Unicode forms on other systems."""
    if name.isascii():
        return (name,)
    return dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))


def _candidates(image: str, path: str) -> Iterator[str]:
    if image and not image.startswith("/"):
        yield image
    if not has_image_suffix(image):
        yield from (image + suffix for suffix in (PurePosixPath(path).suffix, *_SUFFIXES) if suffix)
    parts = PurePosixPath(path or image).parts
    if parts:
        yield path or image
        yield from ("/".join(parts[start:]) for start in range(1, len(parts)))


def locate_images(
    entries: Iterable[Entry], finder: ImageFinder, report: CleaningReport, *, decode: bool
) -> tuple[list[Entry], list[str], list[str]]:
    """Look up every entry's image; with `decode`, also decode it.

    Returns:
        Entries with a usable image, names of missing images, and "name (reason)" of broken ones.
    """
    found, missing = list[Entry](), dict[str, None]()
    for entry in entries:
        name = finder.find(entry.image, entry.path)
        if name is None:
            missing[entry.image] = None
            continue
        renamed = [f"{entry.image} as {name}"] if name != entry.image else []
        report.add("images found under a name that differs from the annotated one", names=renamed)
        found.append(replace(entry, image=name))
    names = list(dict.fromkeys(entry.image for entry in found)) if decode else []
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = zip(names, pool.map(finder.fault, names), strict=True)
        broken = {name: fault for name, fault in faults if fault}
    usable = [entry for entry in found if entry.image not in broken]
    return usable, list(missing), [f"{name} ({fault})" for name, fault in broken.items()]


def name_without_lookup(entry: Entry, shared: Set[str]) -> str:
    """Return the name of an image that is not looked up.

    It has the suffix of its path if it lacks one, and is the whole path if others share the name.
    """
    path = PurePosixPath(entry.path)
    if path.name in shared:
        return entry.path
    if has_image_suffix(entry.image) or not has_image_suffix(entry.path):
        return PurePosixPath(entry.image).name if entry.image.startswith("/") else entry.image
    return entry.image + path.suffix
