"""Limits on the images that a service reads from a gallery.

A gallery can change after indexing: a file becomes a link to another one, and a list may name any path or URL. The
index records the gallery's root, and a service reads nothing beyond it unless its operator allows more.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from index_jobs.gallery.storage import REMOTE_SCHEMES, WHOLE_FILE, is_url, join_location

_LOCAL_SCHEMES = frozenset({"file", "local"})


@dataclass(frozen=True, slots=True)
class ImageAccess:
    """Limits of one service.

    roots: directories that may be read in addition to the gallery's root. hosts: hosts, or buckets, that rows with a
    URL may name. max_bytes: largest image file.
    """

    roots: tuple[Path, ...] = ()
    hosts: frozenset[str] = frozenset()
    max_bytes: int = 64 * 2**20

    def resolve(self, root: str, location: str, offset: int, size: int, roots: Sequence[str] = ()) -> str:
        """Return the location to read an image from, with links resolved.

        Args:
            root, location, offset, size: as for `open_image`.
            roots: further folders or URLs of the index, for absolute locations.

        Raises:
            OSError: the location may not be read, or the file is too large.
        """
        if is_url(location):
            url, folder = urlsplit(location), location.rpartition("/")[0] + "/"
            if ".." not in location.split("/") and any(folder.startswith(each.rstrip("/") + "/") for each in roots):
                return location
            if url.scheme not in REMOTE_SCHEMES or "::" in location or url.hostname not in self.hosts:
                raise PermissionError(errno.EACCES, "its host is not in DCAR_IMAGE_HOSTS", location)
            return location
        if urlsplit(root).scheme in _LOCAL_SCHEMES:
            root = urlsplit(root).path
        joined = join_location(root, location)
        if is_url(joined):
            if ".." in location.split("/"):
                raise PermissionError(errno.EACCES, "outside of the gallery", location)
            return location
        resolved = Path(os.path.realpath(joined))
        bases = [Path(base) for base in (root, *roots) if base and not is_url(base)]
        if not any(resolved.is_relative_to(os.path.realpath(base)) for base in (*bases, *self.roots)):
            raise PermissionError(errno.EACCES, "outside of the gallery and DCAR_IMAGE_ROOTS", location)
        if (resolved.stat().st_size if offset == WHOLE_FILE else size) > self.max_bytes:
            raise OSError(errno.EFBIG, "the image file is too large", location)
        return str(resolved)
