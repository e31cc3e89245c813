"""From any picture file to RGB, and from a name to its bytes.

- What cannot be a picture is refused before it is decoded: the header gives the size, so a small file that
  unpacks into gigabytes costs nothing.
- Transparent pictures are put on white, as people see them on a page.
- What would be converted under the interpreter lock is converted tile by tile: another thread waits for a tile at most,
  and memory holds the picture and its result, not every step between.
- A JPEG that is much larger than what is wanted of it can be decoded at 1/2, 1/4 or 1/8 of its size, which skips most
  of the work: the decoder leaves out the fine frequencies instead of computing pixels that are averaged away again.
- Pictures lie in a folder or in an uncompressed tar; a tar is indexed once and then read by offset.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dcar_core.util.errors import DataError, ImageError

ImageSource = Image.Image | Path | str | bytes
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
MAX_PIXELS = 64_000_000
# What cameras and browsers make (MPO comes in by JPEG). Pillow knows more, and starts other programs for some of them.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
_HELD = {"WEBP": 4, "AVIF": 2}  # pictures of the size of the result that a decoder holds at a time, where more than one
_TILE = 2**18  # pixels, a few milliseconds
_BLOCK = 2**20  # bytes
_LARGE = 2**22  # pixels, from which on a picture that is wanted small is reduced before its colours are blended

Image.MAX_IMAGE_PIXELS = None  # our own check comes first, and says more


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """A picture as RGB: orientation applied, alpha over white, 16-bit and CMYK converted.

    Args:
        at_least: pixels that the shorter side must keep; a JPEG is then decoded at the smallest scale that keeps them,
            and a large picture that is transparent or of more than 8 bits averaged to it.

    Raises:
        ImageError: not a picture, truncated, empty, or of more than max_pixels pixels; the message is the reason.
    """
    if isinstance(source, bytes) and not source:
        raise ImageError("the file is empty")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_readable(source), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{width} x {height} pixels, at most {max_pixels:,} are accepted")
        if at_least is not None and isinstance(image, JpegImageFile):
            image.draft(None, (at_least, at_least))
        if image is source:
            image = ImageOps.exif_transpose(image)
        else:  # our own, so that no copy is needed
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, at_least)
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a kind that cannot be read") from None
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they like on broken bytes
        raise ImageError(f"broken or truncated: {error or type(error).__name__}") from error


def decoded_pixels(data: bytes, max_pixels: int) -> int:
    """How many pixels of 4 bytes a picture's file takes while it is decoded, as its header tells; 0 for no picture.

    A JPEG that is not progressive is reduced on the way (see `open_image`) and counted at a sixteenth.

    Raises:
        ImageError: more than `max_pixels`; the message has the size.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # decoding it will say what is wrong
        return 0
    held, most = image.width * image.height, max_pixels // _HELD.get(image.format or "", 1)
    if held > most:
        raise ImageError(f"{image.width} x {image.height} pixels, at most {most:,} are accepted as {image.format}")
    if isinstance(image, JpegImageFile) and "progressive" not in image.info:
        return held // 16
    return held * max_pixels // most


def _readable(source: Path | str | bytes) -> Path | str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _to_rgb(image: Image.Image, at_least: int | None) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    width, height = image.size
    factor = max(1, min(width, height) // at_least) if at_least and width * height > _LARGE else 1
    if image.mode.startswith("I;16") or image.mode == "I":
        return _by_tiles(image, factor, lambda tile: _of_16_bits(tile).reduce(factor))
    if image.mode == "F":
        tops = (np.nanmax(np.asarray(image.crop(box)), initial=0.0) for box in _tiles(image.size, 1))
        top = max(1.0, *map(float, tops))
        return _by_tiles(image, factor, lambda tile: _of_floats(tile, top).reduce(factor))
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        return _by_tiles(image, factor, lambda tile: _on_white(tile.convert("RGBA"), factor))
    return image.convert("RGB")


def _tiles(size: tuple[int, int], factor: int) -> Iterator[tuple[int, int, int, int]]:
    width, height = size
    across = min(width, max(1, _TILE // factor**2) * factor)
    down = max(1, _TILE // (across * factor)) * factor
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _by_tiles(image: Image.Image, factor: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    width, height = image.size
    page = Image.new("RGB", (-(-width // factor), -(-height // factor)), None)
    for box in _tiles(image.size, factor):
        page.paste(convert(image.crop(box)), (box[0] // factor, box[1] // factor))
    return page


def _of_16_bits(tile: Image.Image) -> Image.Image:
    values = np.clip(np.asarray(tile, np.int32), 0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # rounds value / 65535 * 255


def _of_floats(tile: Image.Image, top: float) -> Image.Image:
    gray = np.nan_to_num(np.clip(np.asarray(tile, np.float64) / top, 0, 1)) * 255
    return Image.fromarray(gray.round().astype(np.uint8))


def _on_white(tile: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB")
    *colours, alpha = tile.convert("RGBa").reduce(factor).split()  # premultiplied, so that averages are those on white
    white = ImageChops.invert(alpha)
    return Image.merge("RGB", [ImageChops.add(colour, white) for colour in colours])


@dataclass(frozen=True)
class TarSpan:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


def index_tar(path: Path | str, file: BinaryIO | None = None) -> Mapping[str, TarSpan]:
    """Member name -> span, for the regular files of an uncompressed tar; `file` is the tar opened, when path is a URL.

    Raises:
        DataError: not a tar, or a compressed one, whose members cannot be read by offset, or one that goes on where its
            members end.
    """
    members: dict[str, TarSpan] = {}
    last = ""
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for member in tar:
                last = member.name
                if member.isreg():
                    members[last.removeprefix("./")] = TarSpan(member.offset_data, member.size)
                elif member.islnk() and (of := members.get(member.linkname.removeprefix("./"))):
                    members[last.removeprefix("./")] = of  # the same file under another name
            _require_end(path, tar, last)
            return members
    except tarfile.TarError as error:
        raise DataError(f"{path} is not an uncompressed tar ({error}); unpack a compressed one first") from error


def _require_end(path: Path | str, tar: tarfile.TarFile, last: str) -> None:
    """Refuse a tar with more behind its members than zeros: tarfile takes a damaged header for the end."""
    assert tar.fileobj is not None
    at = end = tar.offset
    tar.fileobj.seek(end)
    while block := tar.fileobj.read(_BLOCK):
        if rest := block.lstrip(b"\0"):
            at += len(block) - len(rest)
            if at < end + tarfile.BLOCKSIZE:
                raise DataError(
                    f"{path} is damaged or cut off at byte {end:,}, behind {last}: what follows cannot be read; make "
                    f"or copy it anew"
                )
            raise DataError(
                f"{path} ends at byte {end:,}, behind {last}, and goes on at byte {at:,}, as two tars put together do; "
                f"unpack it with `tar -xi` and make it anew, or use the two as they were"
            )
        at += len(block)


def has_image_suffix(name: str) -> bool:
    """Whether a name ends like a picture's, in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


class ImageRoot:
    """The pictures of a data set by name: files below a folder, and members of the tars that lie in it.

    A member is known by its own name and by "shard.tar/member", which stays unique when shards repeat names.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"the image root {path} does not exist")
        self.path = path
        tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        self.shards = {tar.name: (tar, index_tar(tar)) for tar in tars}
        self._members = {name: (tar, span) for tar, members in self.shards.values() for name, span in members.items()}

    def _member(self, name: str) -> tuple[Path, TarSpan] | None:
        if name in self._members:
            return self._members[name]
        shard, _, member = name.partition("/")
        tar, members = self.shards.get(shard, (None, {}))
        return (tar, members[member]) if tar is not None and member in members else None

    def __contains__(self, name: str) -> bool:
        try:
            return self._member(name) is not None or (self.path / name).is_file()
        except (OSError, ValueError):  # longer than a name may be, or with a NUL
            return False

    def names(self) -> list[str]:
        """Every picture, sorted: files at any depth, then members."""
        below = self.path.rglob("*") if self.path.is_dir() else ()
        files = sorted(p.relative_to(self.path).as_posix() for p in below if has_image_suffix(p.name) and p.is_file())
        return files + sorted(name for name in self._members if has_image_suffix(name))

    def locate(self, name: str) -> tuple[Path, int | None]:
        """The file that holds a picture, and where it begins in it; None for a file of its own, there or not."""
        member = self._member(name)
        return (self.path / name, None) if member is None else (member[0], member[1].offset)

    def read(self, name: str) -> bytes:
        """The bytes of one picture.

        Raises:
            ImageError: there is no such file or member.
        """
        member = self._member(name)
        if member is not None:
            tar, span = member
            with tar.open("rb") as file:
                file.seek(span.offset)
                return file.read(span.size)
        try:
            return (self.path / name).read_bytes()
        except OSError:
            raise ImageError(f"no file {name} in {self.path}") from None
