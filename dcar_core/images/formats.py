"""Image formats: names, file suffixes and first bytes."""

from enum import StrEnum
from importlib.util import find_spec
from pathlib import PurePosixPath


class ImageFormat(StrEnum):
    """A format that can be decoded. HEIF (.heic) needs pillow-heif, which has no wheels
    for some machines.
    """

    JPEG = "jpeg"
    PNG = "png"
    GIF = "gif"
    WEBP = "webp"
    AVIF = "avif"
    HEIF = "heif"
    TIFF = "tiff"
    BMP = "bmp"


ALL_FORMATS = frozenset(ImageFormat)
# what browsers and phones send
WEB_FORMATS = ALL_FORMATS - {ImageFormat.TIFF, ImageFormat.BMP}

HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".pjpeg",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
    }
) | (HEIC_SUFFIXES if find_spec("pillow_heif") else frozenset())

_SIGNATURES = {
    ImageFormat.JPEG: (b"\xff\xd8\xff",),
    ImageFormat.PNG: (b"\x89PNG\r\n\x1a\n",),
    ImageFormat.GIF: (b"GIF87a", b"GIF89a"),
    ImageFormat.BMP: (b"BM",),
    # the last two of BigTIFF
    ImageFormat.TIFF: (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
)
_FTYP_BYTES = 256  # enough for the brands of any real file


def sniff_format(data: bytes) -> ImageFormat | None:
    """Return the format that the first bytes announce. File names and declared types
    are not trusted.
    """
    for image_format, signatures in _SIGNATURES.items():
        if data.startswith(signatures):
            return image_format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImageFormat.WEBP
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), _FTYP_BYTES)
        # major, then compatible ones
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, end - 3, 4))}
        if brands & _AVIF_BRANDS:
            return ImageFormat.AVIF
        if brands & _HEIF_BRANDS:
            return ImageFormat.HEIF
    return None


def has_image_suffix(name: str) -> bool:
    """Return whether a file name ends like an image's, in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
