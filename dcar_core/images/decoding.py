"""Decoding of image files and Pillow images to RGB, and thumbnails.

- Pillow's own limit stays on for the process. Ours apply to one call: the decoder of the announced format is called
  directly, after the check of the file's structure and size.
- Orientation is applied, and transparency is blended with white, as people see images on a page.
- A JPEG that is much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size, which skips most of the work.
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dcar_core.images.colours import to_rgb
from dcar_core.images.containers import inspect
from dcar_core.images.formats import Container, ImageFormat, too_large
from dcar_core.images.tiff import exif_orientation
from dcar_core.util.errors import DcarError, ImageError, ImageFault

ImageSource = Image.Image | Container | Path | str | bytes
MAX_PIXELS = 64_000_000

_DECODERS: dict[ImageFormat, Callable[[io.BytesIO], ImageFile]] = {
    ImageFormat.JPEG: JpegImageFile,
    ImageFormat.PNG: PngImageFile,
    ImageFormat.GIF: GifImageFile,
    ImageFormat.WEBP: WebPImageFile,
    ImageFormat.AVIF: AvifImageFile,
    ImageFormat.TIFF: TiffImageFile,
    ImageFormat.BMP: BmpImageFile,
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5  # orientations from which on width and height change places

ThumbnailFormat = Literal["webp", "jpeg"]

_OPTIONS: dict[ThumbnailFormat, dict[str, Any]] = {
    "webp": {"quality": 78, "method": 4},
    "jpeg": {"quality": 82, "optimize": True, "progressive": True},
}
_MAX_UNCHANGED_BYTES = 32 * 2**10
_UNCHANGED = frozenset({ImageFormat.PNG, ImageFormat.WEBP})  # every browser shows them, and small drawings stay sharp


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """Return an image as RGB: orientation applied, alpha over white, 16-bit and CMYK converted.

    Args:
        at_least: pixels that the shorter side must keep. A JPEG is then decoded at the smallest scale that keeps them,
            and another large image is averaged down to it unless it is plain RGB and not turned.

    Raises:
        ImageError: not an image, truncated, empty, hostile, or of more than max_pixels pixels.
    """
    if isinstance(source, Image.Image):
        _require_size(source, max_pixels)
        return to_rgb(ImageOps.exif_transpose(source), at_least)
    container = source if isinstance(source, Container) else inspect(_bytes_of(source))
    _require_size(container, max_pixels)
    try:
        image = _open(container)
        _require_size(image, max_pixels)
        if at_least is not None and isinstance(image, JpegImageFile):
            image.draft(None, (at_least, at_least))
        turn = _TURNS.get(_orientation(container, image))
        rgb = to_rgb(image, at_least, is_turned=turn is not None)
        return rgb if turn is None else rgb.transpose(turn)
    except DcarError:
        raise
    except Exception as error:  # decoders raise all kinds of errors on damaged bytes
        raise ImageError(f"broken or truncated: {error or type(error).__name__}") from error


def upright_size(container: Container) -> tuple[int, int]:
    """Return width and height of the upright image; 0 where only decoding would tell. AVIF and HEIF may be turned by
    their container, which their decoders read without decoding.

    Raises:
        ImageError: the extra that reads the format is missing.
    """
    (width, height), orientation = (container.width, container.height), container.orientation
    if container.format in (ImageFormat.AVIF, ImageFormat.HEIF):
        image = _open(container)
        (width, height), orientation = image.size, _orientation(container, image)
    return (height, width) if orientation >= _SIDEWAYS else (width, height)


def make_thumbnail(container: Container, side: int, thumbnail_format: ThumbnailFormat) -> bytes:
    """Return an image file whose longer side has at most `side` pixels; a small PNG or WebP stays as it is.

    Raises:
        ImageError: the image cannot be decoded.
    """
    shorter, longer = sorted((container.width, container.height))
    at_least = max(1, 2 * side * shorter // longer) if longer else None
    image = open_image(container, at_least=at_least)
    is_small = longer <= side and len(container.data) <= _MAX_UNCHANGED_BYTES
    if is_small and container.format in _UNCHANGED and container.orientation == 1:
        return container.data
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, thumbnail_format, **_OPTIONS[thumbnail_format])
    return buffer.getvalue()


def jpeg_data_uri(image: Image.Image, side: int) -> str:
    """Return an RGB image as a JPEG data URI with a longer side of at most `side` pixels."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bytes_of(source: Path | str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError("no such file", ImageFault.MISSING) from None
    except OSError as error:
        raise ImageError(error.strerror or str(error), ImageFault.UNREADABLE) from error


def _require_size(image: Image.Image | Container, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise too_large(image.width, image.height, max_pixels)


def _open(container: Container) -> ImageFile:
    """Call the decoder of the format itself: `Image.open` would apply the limit of the process."""
    data = io.BytesIO(container.data)
    if container.format in _DECODERS:
        return _DECODERS[container.format](data)
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        reason = "HEIC images need an optional dependency: pip install 'dcar[heic]'"
        raise ImageError(reason, ImageFault.MISSING_DECODER) from error
    image: ImageFile = HeifImageFile(data)
    return image


def _orientation(container: Container, image: Image.Image) -> int:
    """Return the EXIF orientation. AVIF states it as boxes, which Pillow translates; libheif applies them itself."""
    if container.format == ImageFormat.AVIF:
        return exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    return container.orientation
