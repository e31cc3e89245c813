"""From any picture file to RGB, and from a name to its bytes.

- What cannot be a picture is refused before it is decoded: the header gives the size, so a small file that
  unpacks into gigabytes costs nothing.
- Transparent pictures are put on white, as people see them on a page.
- A JPEG that is much larger than what is wanted of it can be decoded at 1/2, 1/4 or 1/8 of its size, which skips most
  of the work: the decoder leaves out the fine frequencies instead of computing pixels that are averaged away again.
- Pictures lie in a folder or in an uncompressed tar; a tar is indexed once and then read by offset.
"""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from dcar_core.errors import DataError, ImageError

ImageSource = Image.Image | Path | str | bytes
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
MAX_PIXELS = 64_000_000
# What cameras and browsers make (MPO comes in by JPEG). Pillow knows more, and starts other programs for some of them.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")

Image.MAX_IMAGE_PIXELS = None  # our own check comes first, and says more


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """A picture as RGB: orientation applied, alpha over white, 16-bit and CMYK converted.

    Args:
        at_least: pixels that the shorter side must keep; a JPEG is then decoded at the smallest scale that keeps them.

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
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a kind that cannot be read") from None
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they like on broken bytes
        raise ImageError(f"broken or truncated: {error or type(error).__name__}") from error


def _readable(source: Path | str | bytes) -> Path | str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else max(1.0, float(np.nanmax(values, initial=0.0)))
        gray = np.nan_to_num(np.clip(values / top, 0, 1)) * 255
        return Image.fromarray(gray.round().astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class TarSpan:
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


def index_tar(path: Path | str, file: BinaryIO | None = None) -> Mapping[str, TarSpan]:
    """Member name -> span, for the regular files of an uncompressed tar; `file` is the tar opened, when path is a URL.

    Raises:
        DataError: not a tar, or a compressed one, whose members cannot be read by offset.
    """
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            return {m.name.removeprefix("./"): TarSpan(m.offset_data, m.size) for m in tar if m.isreg()}
    except tarfile.TarError as error:
        raise DataError(f"{path} is not an uncompressed tar ({error}); unpack a compressed one first") from error


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
