"""Image files by name: in folders, and in uncompressed tars that are indexed once and
then read by offset.
"""

import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dcar_core.images.formats import has_image_suffix
from dcar_core.util.errors import DataError, ImageError, ImageFault

BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class TarSpan:
    offset: int  # of a member's content in its tar, in bytes
    size: int


def index_tar(path: Path | str, file: BinaryIO | None = None) -> Mapping[str, TarSpan]:
    """Return member name -> span for the regular files of an uncompressed tar. file:
    the opened tar of a URL.

    Raises:
        DataError: not a tar, a compressed tar, one with sparse files, or one with more
            data behind its last member.
    """
    members = dict[str, TarSpan]()
    last = "its start"
    end = 0
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all, at a kilobyte each
                last = member.name
                end = tar.offset
                if member.issparse():
                    raise tarfile.ReadError(
                        "it is a sparse file, as tar's option -S makes them"
                    )
                if member.isreg():
                    members[last.removeprefix("./")] = TarSpan(
                        member.offset_data, member.size
                    )
                elif member.islnk() and (
                    target := members.get(member.linkname.removeprefix("./"))
                ):
                    members[last.removeprefix("./")] = target
            assert tar.fileobj is not None
            tar.fileobj.seek(end)  # tarfile takes a damaged header for the end
            if any(
                block.strip(b"\0")
                for block in iter(partial(tar.fileobj.read, BLOCK_BYTES), b"")
            ):
                raise tarfile.ReadError(
                    f"more data after byte {end:,}: it is damaged, or two tars were"
                    " concatenated"
                )
            return members
    except (tarfile.TarError, ValueError, OverflowError) as error:
        # tarfile does not check all numbers
        reason = f"{path} is not a whole uncompressed tar, at {last}: {error}"
        raise DataError(f"{reason}; decompress it, or create it again") from error


class ImageRoot:
    """The images of a data set by name: files below a folder, and members of the tars
    that lie in it.

    A member is known by "shard.tar/member", and by its own name unless several shards
    have it.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"the image root {path} does not exist")
        self.path = path
        tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        members = [
            (tar, name, span) for tar in tars for name, span in index_tar(tar).items()
        ]
        shards = Counter(name for _, name, _ in members)
        self._names = [
            name if shards[name] == 1 else f"{tar.name}/{name}"
            for tar, name, _ in members
        ]
        self._members = {
            f"{tar.name}/{name}": (tar, span) for tar, name, span in members
        }
        self._members |= {
            name: (tar, span) for tar, name, span in members if shards[name] == 1
        }

    def __contains__(self, name: str) -> bool:
        try:
            return name in self._members or (self.path / name).is_file()
        except (OSError, ValueError):  # a name that is too long or contains NUL
            return False

    def names(self) -> list[str]:
        """Return every image, sorted: files at any depth, then tar members."""
        paths = self.path.rglob("*") if self.path.is_dir() else ()
        files = sorted(
            p.relative_to(self.path).as_posix()
            for p in paths
            if has_image_suffix(p.name) and p.is_file()
        )
        return files + sorted(filter(has_image_suffix, self._names))

    def locate(self, name: str) -> tuple[Path, int | None]:
        """Return the file that holds an image, and its offset in a tar; None for a file
        of its own, even if missing.
        """
        member = self._members.get(name)
        if member is None:
            return (self.path / name, None)
        return (member[0], member[1].offset)

    def read(self, name: str) -> bytes:
        """Return the bytes of an image. Raise ImageError if there is no such file or
        member.
        """
        if name in self._members:
            tar, span = self._members[name]
            with tar.open("rb") as file:
                file.seek(span.offset)
                return file.read(span.size)
        try:
            return (self.path / name).read_bytes()
        except OSError:
            raise ImageError(
                f"no file {name} in {self.path}", ImageFault.MISSING
            ) from None
