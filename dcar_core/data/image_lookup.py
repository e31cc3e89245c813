"""Lookup of annotated images, and the check whether they can be decoded.

- A name is tried as it is, with image suffixes, then by the last parts of its path, the
  longest first, so that /elsewhere/DATA/pets/images/a.jpg is found as images/a.jpg.
- The last attempt is the only file of that name below the image root. It is skipped if
  several annotated images share the name, or if the annotated folder exists without the
  image.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import PurePosixPath

from dcar_core.images import IMAGE_SUFFIXES, ImageRoot, has_image_suffix, open_image
from dcar_core.util.errors import ImageError

_SUFFIXES = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}), ".JPG", ".JPEG", ".PNG")
_THREADS = 8


class ImageFinder:
    """Finds annotated names below an image root. shared: file names of several
    images.
    """

    def __init__(self, root: ImageRoot, shared: Set[str]) -> None:
        self.root = root
        self._shared = shared

    def find(self, image: str) -> str | None:
        """Return the name for `root.read`; None without such an image, or with several
        in different folders.
        """
        for candidate in _candidates(image):
            if candidate in self._shared and candidate != image:
                continue  # ambiguous without its folder
            for form in unicode_forms(candidate):
                if form in self.root:
                    return form
        by_base, folders = self._by_base
        path = PurePosixPath(image)
        if path.name in self._shared or (
            path.parent.name and path.parent.name in folders
        ):
            return None
        matches = by_base[path.name]
        return matches[0] if len(matches) == 1 else None

    def faults(self, names: Sequence[str]) -> dict[str, str]:
        """Decode images, and return the faults of the broken ones."""

        def decode(name: str) -> str:
            try:
                open_image(self.root.read(name))
            except ImageError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(_THREADS) as pool:
            return {
                name: fault
                for name, fault in zip(names, pool.map(decode, names), strict=True)
                if fault
            }

    @cached_property
    def _by_base(self) -> tuple[defaultdict[str, list[str]], set[str]]:
        """Names by file name, with and without suffix, and the names of folders."""
        by_base = defaultdict[str, list[str]](list)
        folders = set[str]()
        for name in self.root.names():
            path = PurePosixPath(name)
            by_base[path.name].append(name)
            by_base[path.stem].append(name)
            folders.add(path.parent.name)
        return by_base, folders


def find_shared_names(images: Iterable[str]) -> frozenset[str]:
    """Return file names that occur in different folders; a/b.jpg and b.jpg may be one
    image.
    """
    paths_of = defaultdict[str, set[tuple[str, ...]]](set)
    for parts in (PurePosixPath(image).parts for image in images):
        paths_of["".join(parts[-1:])].add(parts)
    return frozenset(
        name
        for name, paths in paths_of.items()
        if any(max(paths, key=len)[-len(p) :] != p for p in paths)
    )


def unicode_forms(name: str) -> Iterable[str]:
    """Return the name and its Unicode forms on other systems."""
    if name.isascii():
        return (name,)
    return dict.fromkeys(
        (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    )


def _candidates(image: str) -> Iterator[str]:
    parts = PurePosixPath(image).parts
    for name in (image, *("/".join(parts[start:]) for start in range(1, len(parts)))):
        yield name
        if not has_image_suffix(name):
            yield from (name + suffix for suffix in _SUFFIXES)
