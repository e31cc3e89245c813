"""Image formats: names, file suffixes, first bytes, and the checked file that a decoder receives."""

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import PurePosixPath

from dcar_core.util.errors import ImageError, ImageFault


class ImageFormat(StrEnum):
    """A format that can be decoded. HEIF (.heic) needs the extra `heic`."""

    JPEG = "jpeg"
    PNG = "png"
    GIF = "gif"
    WEBP = "webp"
    AVIF = "avif"
    HEIF = "heif"
    TIFF = "tiff"
    BMP = "bmp"


ALL_FORMATS = frozenset(ImageFormat)
WEB_FORMATS = ALL_FORMATS - {ImageFormat.TIFF, ImageFormat.BMP}  # what browsers and phones send

HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# The suffixes of images that can be decoded here
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
}) | (HEIC_SUFFIXES if find_spec("pillow_heif") else frozenset())  # fmt: skip

_SIGNATURES = {
    ImageFormat.JPEG: (b"\xff\xd8\xff",),
    ImageFormat.PNG: (b"\x89PNG\r\n\x1a\n",),
    ImageFormat.GIF: (b"GIF87a", b"GIF89a"),
    ImageFormat.BMP: (b"BM",),
    ImageFormat.TIFF: (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # the last two of BigTIFF
}
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_FTYP_BYTES = 256  # enough for the brands of any real file
_FREE_CHUNKS, _BYTES_PER_CHUNK = 1_000, 1_024  # encoders write data chunks of 8 KB and more


@dataclass(frozen=True)
class Container:
    """An image file whose structure has been checked.

    data: the file, without the metadata that decoders would parse.
    width, height: pixels, as the header declares them; 0 where only the decoder knows.
    bytes_per_pixel: memory while it is decoded, about; of a JPEG at reduced scale.
    orientation: EXIF orientation, 1 to 8.
    """

    format: ImageFormat
    data: bytes
    width: int
    height: int
    bytes_per_pixel: float = 4.0
    orientation: int = 1

    @property
    def cost(self) -> int:
        """Memory while it is decoded, in pixels of four bytes."""
        return int(self.width * self.height * self.bytes_per_pixel / 4)

    def require_cost(self, max_pixels: int) -> None:
        """Raise ImageError for more pixels than `max_pixels`, or more memory than so many pixels of four bytes take."""
        most = int(max_pixels / max(1.0, self.bytes_per_pixel / 4))
        if self.width * self.height > most:
            raise too_large(self.width, self.height, most, self.format)


def sniff_format(data: bytes) -> ImageFormat | None:
    """Return the format that the first bytes announce. File names and declared types are not trusted."""
    for image_format, signatures in _SIGNATURES.items():
        if data.startswith(signatures):
            return image_format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImageFormat.WEBP
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), _FTYP_BYTES)
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, end - 3, 4))}  # major, then compatible ones
        if brands & _AVIF_BRANDS:
            return ImageFormat.AVIF
        if brands & _HEIF_BRANDS:
            return ImageFormat.HEIF
    return None


def has_image_suffix(name: str) -> bool:
    """Return whether a file name ends like an image's, in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def chunk_limit(size: int) -> int:
    """Return how many chunks a PNG or WebP file of `size` bytes may have."""
    return _FREE_CHUNKS + size // _BYTES_PER_CHUNK


def hostile(reason: str) -> ImageError:
    """Return the error for a structure that would cost far more to decode than the file's size suggests."""
    return ImageError(f"refused: {reason}", ImageFault.HOSTILE)


def too_large(width: int, height: int, most: int, image_format: ImageFormat | None = None) -> ImageError:
    name = f" as {image_format.upper()}" if image_format else ""
    return ImageError(f"{width} x {height} pixels; at most {most:,} are accepted{name}", ImageFault.TOO_LARGE)
