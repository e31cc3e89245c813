"""WebP structure: the number of chunks, the size and the orientation. libwebp reads the rest."""

from dcar_core.images.formats import Container, ImageFormat, chunk_limit, hostile
from dcar_core.images.tiff import exif_orientation
from dcar_core.util.errors import ImageError

_BYTES_PER_PIXEL = 16.0  # the decoder holds two canvases beside its own planes and the image


def inspect_webp(data: bytes) -> Container:
    """Check a WebP file. Raise ImageError if it has too many chunks for its size, or a damaged header."""
    position, orientation, limit = 12, 1, chunk_limit(len(data))
    for _ in range(limit):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"EXIF" and orientation == 1:
            orientation = exif_orientation(data[position + 8 : position + 8 + size].removeprefix(b"Exif\0\0"))
        position += 8 + size + size % 2
        if position >= len(data):
            break
    else:
        raise hostile(f"a WebP file with more than {limit:,} chunks in {len(data):,} bytes")
    width, height = _size(data)
    return Container(ImageFormat.WEBP, data, width, height, _BYTES_PER_PIXEL, orientation)


def _size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) >= 30:
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise ImageError("broken or truncated: a WebP file without a header")
