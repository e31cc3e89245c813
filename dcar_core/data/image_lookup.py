"""Where an entry's picture is, and whether it can be read.

A name is tried as it is, with a picture's suffix, then by the last parts of its path, the longest first (so that
/elsewhere/DATA/pets/images/a.jpg is found as images/a.jpg), then as the only file of that name below the image root:
but not where the annotations have several pictures of that name, or the folder that they name is there without it.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from dcar_core.data.entries import Entry
from dcar_core.data.report import CleaningReport
from dcar_core.images import IMAGE_SUFFIXES, ImageRoot, has_image_suffix, open_image
from dcar_core.util.errors import ImageError

_SUFFIXES = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}), ".JPG", ".JPEG", ".PNG")
_THREADS = 8


class ImageFinder:
    """Names of annotations to names below an image root. shared: file names that several pictures have."""

    def __init__(self, root: ImageRoot, shared: Set[str] = frozenset()) -> None:
        self.root = root
        self._shared = shared
        self._folders: set[str] = set()
        self._by_base: dict[str, list[str]] | None = None

    def find(self, image: str, path: str = "") -> str | None:
        """The name that `root.read` takes, or None: no such picture, or several in different folders."""
        for candidate in _candidates(image, path):
            if candidate in self._shared and candidate != (path or image):
                continue  # without its folder it may be any of them
            for form in unicode_forms(candidate):
                if form in self.root:
                    return form
        if self._by_base is None:
            self._by_base = {}
            for name in self.root.names():
                base = PurePosixPath(name)
                self._by_base.setdefault(base.name, []).append(name)
                self._by_base.setdefault(base.stem, []).append(name)
                self._folders.add(base.parent.name)
        wanted = PurePosixPath(path or image)
        if wanted.name in self._shared or (wanted.parent.name and wanted.parent.name in self._folders):
            return None
        found = self._by_base.get(PurePosixPath(image).name, [])
        return found[0] if len(found) == 1 else None


def find_shared_names(entries: Iterable[Entry]) -> frozenset[str]:
    """File names that pictures in different folders have; a/b.jpg and b.jpg may be one picture."""
    places = defaultdict[str, set[tuple[str, ...]]](set)
    for entry in entries:
        parts = PurePosixPath(entry.path or entry.image).parts
        places[parts[-1] if parts else ""].add(parts)
    return frozenset(
        name for name, known in places.items() if any(max(known, key=len)[-len(each) :] != each for each in known)
    )


def unicode_forms(name: str) -> Iterable[str]:
    """The name as it is, and in the Unicode forms in which other systems write it."""
    if name.isascii():
        return (name,)
    return dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))


def _candidates(image: str, path: str) -> Iterator[str]:
    if image and not image.startswith("/"):
        yield image
    if not has_image_suffix(image):
        given = PurePosixPath(path).suffix
        yield from (image + suffix for suffix in dict.fromkeys((given, *_SUFFIXES)) if suffix)
    path = path or image
    parts = PurePosixPath(path).parts
    if path in {"", "."}:
        return
    yield path
    for start in range(1, len(parts)):
        yield "/".join(parts[start:])


def locate_images(
    entries: Iterable[Entry], root: ImageRoot, report: CleaningReport, shared: Set[str] = frozenset()
) -> Iterator[tuple[Entry, str | None]]:
    """Each entry with its picture's name below the root, or None."""
    finder = ImageFinder(root, shared)
    for entry in entries:
        name = finder.find(entry.image, entry.path)
        if name is not None and name != entry.image:
            change = f"{entry.image} as {name}"
            report.add("pictures found under a name that differs from the annotated one", names=[change])
        yield entry, name


def name_without_lookup(entry: Entry, shared: Set[str] = frozenset()) -> str:
    """The picture's name when no picture is looked for: with the suffix of its path, if it lacks one; its whole path
    where others have its name."""
    suffix = PurePosixPath(entry.path).suffix
    if PurePosixPath(entry.path).name in shared:
        return entry.path
    if has_image_suffix(entry.image) or not has_image_suffix(entry.path):
        return PurePosixPath(entry.image).name if entry.image.startswith("/") else entry.image
    return entry.image + suffix


def find_unreadable(names: Sequence[str], root: ImageRoot) -> dict[str, str]:
    """Decode every picture once; those that cannot be read, with the reason."""

    def reason(name: str) -> str | None:
        try:
            open_image(root.read(name))
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return {name: why for name, why in zip(names, pool.map(reason, names), strict=True) if why is not None}
