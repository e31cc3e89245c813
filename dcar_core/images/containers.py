"""The check of an image file before any decoder sees it.

- A small file can take gigabytes or minutes in a decoder: by its dimensions, by thousands of scans, segments or tags,
  or by tiles larger than the image. Each format's module reads the structure alone, in milliseconds for 20 MB.
- Decoders receive the file without metadata, so the metadata cannot cost anything.
"""

from collections.abc import Callable, Set

from dcar_core.images.formats import ALL_FORMATS, Container, ImageFormat, hostile, sniff_format
from dcar_core.images.gif import inspect_gif
from dcar_core.images.isobmff import inspect_isobmff
from dcar_core.images.jpeg import inspect_jpeg
from dcar_core.images.png import inspect_png
from dcar_core.images.tiff import inspect_tiff
from dcar_core.images.webp import inspect_webp
from dcar_core.util.errors import ImageError, ImageFault

_MAX_RLE_BYTES = 2**20  # Pillow unpacks run lengths in Python


def inspect(data: bytes, formats: Set[ImageFormat] = ALL_FORMATS) -> Container:
    """Check an image file without decoding it.

    Args:
        formats: the formats that are accepted.

    Raises:
        ImageError: empty, not an image, of another format, damaged, or built to exhaust a decoder.
    """
    if not data:
        raise ImageError("the file is empty", ImageFault.EMPTY)
    image_format = sniff_format(data)
    if image_format is None:
        raise ImageError("not an image, or of a format that cannot be read", ImageFault.NOT_AN_IMAGE)
    if image_format not in formats:
        accepted = ", ".join(sorted(name.upper() for name in formats))
        reason = f"{image_format.upper()} images are not accepted here; convert it to one of {accepted}"
        raise ImageError(reason, ImageFault.UNSUPPORTED)
    return _INSPECTORS[image_format](data)


def _inspect_bmp(data: bytes) -> Container:
    is_short = data[14:18] == b"\x0c\0\0\0"  # the header of OS/2: sides of two bytes, and no run lengths
    if len(data) < (26 if is_short else 34):
        raise ImageError("broken or truncated: a BMP file without a header")
    if is_short:
        width, height = int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
        return Container(ImageFormat.BMP, data, width, height)
    if int.from_bytes(data[30:34], "little") in {1, 2} and len(data) > _MAX_RLE_BYTES:
        raise hostile(f"a run-length encoded BMP file of more than {_MAX_RLE_BYTES >> 20} MB")
    width, height = int.from_bytes(data[18:22], "little"), abs(int.from_bytes(data[22:26], "little", signed=True))
    return Container(ImageFormat.BMP, data, width, height)


_INSPECTORS: dict[ImageFormat, Callable[[bytes], Container]] = {
    ImageFormat.JPEG: inspect_jpeg,
    ImageFormat.PNG: inspect_png,
    ImageFormat.GIF: inspect_gif,
    ImageFormat.WEBP: inspect_webp,
    ImageFormat.AVIF: lambda data: inspect_isobmff(data, ImageFormat.AVIF),
    ImageFormat.HEIF: lambda data: inspect_isobmff(data, ImageFormat.HEIF),
    ImageFormat.TIFF: inspect_tiff,
    ImageFormat.BMP: _inspect_bmp,
}
