"""Decoding of image files and Pillow images to RGB, and thumbnails. Those of strangers
are decoded by `workers`.

- Pillow's own limit stays on for the process. Ours apply to one call: the decoder of
  the announced format is called directly, as `Image.open` applies it, and the size is
  checked between the header and the pixels.
- Orientation is applied, and transparency is blended with white, as people see images
  on a page.
- Colours are converted tile by tile: Pillow holds the interpreter lock while NumPy
  converts, so other threads wait for one tile at most, and memory holds the image and
  the result, not the steps between them.
"""

import io
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, PngImagePlugin
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dcar_core.images.formats import ALL_FORMATS, ImageFormat, sniff_format
from dcar_core.util.errors import DcarError, ImageError, ImageFault

MAX_PIXELS = 64_000_000
TILE_PIXELS = 2**18  # a few milliseconds
# above, an image that is needed small is averaged before its colours are converted
LARGE_PIXELS = 2**22
# of a colour profile, too: by default Pillow refuses those of 1 MB
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20

# Pillow's decoder, and bytes per pixel while it decodes, at most: the image, its
# copies, and the planes of the codec.
_DECODERS: dict[ImageFormat, tuple[Callable[[io.BytesIO], ImageFile], int]] = {
    ImageFormat.JPEG: (JpegImageFile, 4),
    ImageFormat.PNG: (PngImageFile, 5),
    ImageFormat.GIF: (GifImageFile, 6),
    ImageFormat.WEBP: (WebPImageFile, 17),
    ImageFormat.AVIF: (AvifImageFile, 22),
    ImageFormat.HEIF: (lambda file: _open_heif(file), 22),
    ImageFormat.TIFF: (TiffImageFile, 13),
    ImageFormat.BMP: (BmpImageFile, 5),
}
_COEFFICIENT_BYTES = 6  # per pixel of a progressive JPEG
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED_BY_DECODER = frozenset({ImageFormat.HEIF, ImageFormat.TIFF})

ThumbnailFormat = Literal["webp", "jpeg"]
_OPTIONS: dict[ThumbnailFormat, dict[str, Any]] = {
    "webp": {"quality": 78, "method": 4},
    "jpeg": {"quality": 82, "optimize": True, "progressive": True},
}
_MAX_UNCHANGED_BYTES = 32 * 2**10
# every browser shows them, and small drawings stay sharp
_UNCHANGED = frozenset({ImageFormat.PNG, ImageFormat.WEBP})


class OpenedImage:
    """An image file whose header has been read: width and height as they are stored.
    `open_image` decodes it once.
    """

    def __init__(self, data: bytes, formats: Set[ImageFormat] = ALL_FORMATS) -> None:
        """Read the header of a file of one of these formats. Raise ImageError for
        another one, and without a header.
        """
        self.data = data
        self.format = _accepted_format(data, formats)
        self.width, self.height = (
            _webp_size(data) if self.format == ImageFormat.WEBP else self.image.size
        )

    @cached_property
    def image(self) -> ImageFile:
        """Pillow's image. Raise ImageError if its decoder does not open the file."""
        with _broken():
            return _DECODERS[self.format][0](io.BytesIO(self.data))

    @property
    def _exif(self) -> Image.Exif:
        if self.format == ImageFormat.TIFF:
            return self.image.getexif()
        exif = Image.Exif()
        exif.load(self.image.info.get("exif", b""))
        return exif

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8, that is still to be applied; of some files it is
        known after decoding alone.
        """
        orientation = 1
        with suppress(Exception):  # damaged
            if self.format in _TURNED_BY_DECODER:
                orientation = 1
            else:
                orientation = self._exif.get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in _TURNS else 1

    @property
    def taken(self) -> str:
        """When the picture was taken, as 2024-07-01T10:20:30, or ""; of some files it
        is known after decoding alone.
        """
        with suppress(Exception):  # none, or damaged
            text = self._exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
            return datetime.strptime(text.strip(" \0"), "%Y:%m:%d %H:%M:%S").isoformat()
        return ""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height when it is upright."""
        if self.orientation > 4:
            return (self.height, self.width)
        return (self.width, self.height)

    @property
    def memory(self) -> int:
        """Bytes that decoding takes, about."""
        is_progressive = (
            self.format == ImageFormat.JPEG and "progressive" in self.image.info
        )
        return (
            self.width
            * self.height
            * (_DECODERS[self.format][1] + is_progressive * _COEFFICIENT_BYTES)
        )


ImageSource = Image.Image | OpenedImage | Path | str | bytes


def open_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
) -> Image.Image:
    """Return an image as RGB: orientation applied, alpha over white, 16-bit and CMYK
    converted.

    Args:
        at_least: pixels that the shorter side must keep. A JPEG is then decoded at the
            smallest scale that keeps them, and another large image is averaged down to
            it unless it is plain RGB and not turned.

    Raises:
        ImageError: not an image, truncated, empty, or of more than max_pixels pixels.
    """
    if isinstance(source, Image.Image):
        require_size(source, max_pixels)
        return _to_rgb(ImageOps.exif_transpose(source), at_least)
    if isinstance(source, OpenedImage):
        opened = source
    else:
        opened = OpenedImage(_bytes_of(source))
    require_size(opened, max_pixels)
    image = opened.image
    with _broken():
        if not isinstance(image, JpegImageFile):
            image.load()  # EXIF may stand behind the pixels
        elif at_least is not None:
            image.draft(None, (at_least, at_least))
        turn = _TURNS.get(opened.orientation)
        rgb = _to_rgb(image, at_least, is_turned=turn is not None)
        return rgb if turn is None else rgb.transpose(turn)


def make_thumbnail(
    opened: OpenedImage,
    side: int,
    thumbnail_format: ThumbnailFormat,
) -> bytes:
    """Return an image file whose longer side has at most `side` pixels; a small PNG or
    WebP stays as it is.
    """
    shorter, longer = sorted((opened.width, opened.height))
    image = open_image(
        opened, at_least=max(1, 2 * side * shorter // longer) if longer else None
    )
    is_small = longer <= side and len(opened.data) <= _MAX_UNCHANGED_BYTES
    if is_small and opened.format in _UNCHANGED and opened.orientation == 1:
        return opened.data
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, thumbnail_format, **_OPTIONS[thumbnail_format])
    return buffer.getvalue()


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (DcarError, MemoryError):
        raise
    except Exception as error:  # decoders raise all kinds of them on damaged bytes
        raise ImageError(
            f"broken or truncated: {error or type(error).__name__}"
        ) from error


def _bytes_of(source: Path | str | bytes) -> bytes:
    try:
        return source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            fault = ImageFault.MISSING
        else:
            fault = ImageFault.UNREADABLE
        raise ImageError((error.strerror or str(error)).lower(), fault) from error


def _accepted_format(data: bytes, formats: Set[ImageFormat]) -> ImageFormat:
    if not data:
        raise ImageError("the file is empty", ImageFault.EMPTY)
    if (image_format := sniff_format(data)) is None:
        raise ImageError(
            "not an image, or of a format that cannot be read", ImageFault.NOT_AN_IMAGE
        )
    if image_format not in formats:
        accepted = ", ".join(sorted(name.upper() for name in formats))
        reason = (
            f"{image_format.upper()} images are not accepted here; convert it to one of"
            f" {accepted}"
        )
        raise ImageError(reason, ImageFault.UNSUPPORTED)
    return image_format


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height by the header; Pillow's decoder takes the memory of both
    canvases to tell them.
    """
    kind = data[12:16]
    bits = int.from_bytes(data[21:25], "little")
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(
            data[27:30], "little"
        )
    if kind == b"VP8L":
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return (
        int.from_bytes(data[26:28], "little") & 0x3FFF,
        int.from_bytes(data[28:30], "little") & 0x3FFF,
    )


def require_size(image: Image.Image | OpenedImage, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        reason = (
            f"{image.width} x {image.height} pixels; at most {max_pixels:,} are"
            " accepted"
        )
        raise ImageError(reason, ImageFault.TOO_LARGE)


def _open_heif(file: io.BytesIO) -> ImageFile:
    try:
        from pillow_heif import HeifImageFile, options
    except ImportError as error:
        raise ImageError(
            "HEIC images need the package pillow-heif", ImageFault.MISSING_DECODER
        ) from error
    options.DECODE_THREADS = 1  # whoever decodes several images has threads of its own
    image: ImageFile = HeifImageFile(file)
    return image


def _to_rgb(
    image: Image.Image,
    at_least: int | None = None,
    *,
    is_turned: bool = False,
) -> Image.Image:
    """Return the image in mode RGB; `at_least` as in `open_image`. is_turned: the
    caller rotates the result.
    """
    width, height = image.size
    is_large = at_least is not None and width * height > LARGE_PIXELS
    factor = max(1, min(width, height) // at_least) if is_large and at_least else 1
    # the colour that is transparent
    if image.mode == "RGB" and not isinstance(image.info.get("transparency"), tuple):
        if factor == 1 or not is_turned:
            image.load()
            return image
        return _convert_tiles(image, factor, lambda tile: tile.reduce(factor))
    if image.mode.startswith("I;16") or image.mode == "I":
        return _convert_tiles(
            image, factor, lambda tile: _from_16_bits(tile).reduce(factor)
        )
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        return _convert_tiles(
            image, factor, lambda tile: _over_white(tile.convert("RGBA"), factor)
        )
    return _convert_tiles(
        image, factor, lambda tile: tile.convert("RGB").reduce(factor)
    )


def _tiles(size: tuple[int, int], factor: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes that cover an image, with sides that the factor divides."""
    width, height = size
    across = min(width, max(1, TILE_PIXELS // factor**2) * factor)
    down = max(1, TILE_PIXELS // (across * factor)) * factor
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _convert_tiles(
    image: Image.Image,
    factor: int,
    convert: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    width, height = image.size
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)), None)
    for box in _tiles(image.size, factor):
        result.paste(convert(image.crop(box)), (box[0] // factor, box[1] // factor))
    return result


def _from_16_bits(tile: Image.Image) -> Image.Image:
    values = np.clip(np.asarray(tile, np.int32), 0, 65535)
    gray = ((values + 128) // 257).astype(np.uint8)  # rounds value / 65535 * 255
    if (key := tile.info.get("transparency")) is not None:
        gray[values == key] = 255
    return Image.fromarray(gray)


def _over_white(tile: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return Image.alpha_composite(
            Image.new("RGBA", tile.size, "white"), tile
        ).convert("RGB")
    # premultiplied: averages are those over white
    *colours, alpha = tile.convert("RGBa").reduce(factor).split()
    white = ImageChops.invert(alpha)
    return Image.merge("RGB", [ImageChops.add(colour, white) for colour in colours])
