"""Image files by name: in folders, and in uncompressed tars that are indexed once and then read by offset."""

import logging
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dcar_core.images.formats import has_image_suffix
from dcar_core.util.errors import DataError, ImageError, ImageFault

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
REPORTED = 100_000  # members of a tar, which take about five seconds


@dataclass(frozen=True, slots=True)
class TarSpan:
    """Offset and size in bytes of a member's content in its tar."""

    offset: int
    size: int


def index_tar(path: Path | str, file: BinaryIO | None = None) -> Mapping[str, TarSpan]:
    """Return member name -> span for the regular files of an uncompressed tar. file: the opened tar of a URL.

    Raises:
        DataError: not a tar, a compressed tar, one with sparse files, or one with more data behind its last member.
    """
    members: dict[str, TarSpan] = {}
    last, end = "", 0
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for count, member in enumerate(tar, 1):
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all, at a kilobyte each
                if count % REPORTED == 0:
                    logger.info("listing %s: %s members so far", path, f"{count:,}")
                last, end = member.name, tar.offset
                if member.issparse():
                    raise DataError(f"{path} has {last} as a sparse file; create it again without tar's option -S")
                if member.isreg():
                    members[last.removeprefix("./")] = TarSpan(member.offset_data, member.size)
                elif member.islnk() and (target := members.get(member.linkname.removeprefix("./"))):
                    members[last.removeprefix("./")] = target
            assert tar.fileobj is not None
            tar.fileobj.seek(end)  # tarfile takes a damaged header for the end
            if any(block.strip(b"\0") for block in iter(partial(tar.fileobj.read, BLOCK_BYTES), b"")):
                raise DataError(
                    f"{path} has data after {last or 'its start'}, the last that can be read (up to byte {end:,}): "
                    f"it is damaged, or two tars were concatenated; create it again"
                )
            return members
    except tarfile.TarError as error:
        if last:
            raise DataError(f"{path} is cut short or damaged after {last} ({error}); create it again") from error
        raise DataError(f"{path} is not an uncompressed tar ({error}); decompress it first") from error
    except (ValueError, OverflowError) as error:  # tarfile does not check the numbers of extended headers
        raise DataError(f"{path} has an odd header after {last or 'its start'} ({error}); create it again") from error


class ImageRoot:
    """The images of a data set by name: files below a folder, and members of the tars that lie in it.

    A member is known by "shard.tar/member", and by its own name unless several shards have it.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"the image root {path} does not exist")
        self.path = path
        tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        self.shards = {tar.name: (tar, index_tar(tar)) for tar in tars}
        shards = Counter(name for _, members in self.shards.values() for name in members)
        self._members = {
            name if shards[name] == 1 else f"{tar.name}/{name}": (tar, span)
            for tar, members in self.shards.values()
            for name, span in members.items()
        }

    def _member(self, name: str) -> tuple[Path, TarSpan] | None:
        if name in self._members:
            return self._members[name]
        shard, _, member = name.partition("/")
        tar, members = self.shards.get(shard, (None, {}))
        return (tar, members[member]) if tar is not None and member in members else None

    def __contains__(self, name: str) -> bool:
        try:
            return self._member(name) is not None or (self.path / name).is_file()
        except (OSError, ValueError):  # a name that is too long or contains NUL
            return False

    def names(self) -> list[str]:
        """Return every image, sorted: files at any depth, then tar members."""
        paths = self.path.rglob("*") if self.path.is_dir() else ()
        files = sorted(p.relative_to(self.path).as_posix() for p in paths if has_image_suffix(p.name) and p.is_file())
        return files + sorted(name for name in self._members if has_image_suffix(name))

    def locate(self, name: str) -> tuple[Path, int | None]:
        """Return the file that holds an image, and its offset in a tar; None for a file of its own, even if missing."""
        member = self._member(name)
        return (self.path / name, None) if member is None else (member[0], member[1].offset)

    def read(self, name: str) -> bytes:
        """Return the bytes of an image. Raise ImageError if there is no such file or member."""
        member = self._member(name)
        if member is not None:
            tar, span = member
            with tar.open("rb") as file:
                file.seek(span.offset)
                return file.read(span.size)
        try:
            return (self.path / name).read_bytes()
        except OSError:
            raise ImageError(f"no file {name} in {self.path}", ImageFault.MISSING) from None
