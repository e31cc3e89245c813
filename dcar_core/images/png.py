"""PNG structure: only the chunks that make the image are kept, and tiny data chunks are refused.

Pillow reads every chunk in Python and unpacks compressed metadata, a megabyte for a kilobyte. So metadata is removed.
It takes the size from the last header, so there may be one alone.
"""

from dcar_core.images.formats import Container, ImageFormat, chunk_limit, hostile
from dcar_core.images.tiff import exif_orientation
from dcar_core.util.errors import ImageError

_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def inspect_png(data: bytes) -> Container:
    """Check a PNG and remove its metadata. Raise ImageError for no header, two, or too many chunks for its size."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageError("broken or truncated: a PNG without a header")
    view, spans, exif, position = memoryview(data), [(0, 8)], b"", 8
    limit = chunk_limit(len(data))
    for _ in range(limit):
        name, end = data[position + 4 : position + 8], position + 12 + int.from_bytes(data[position : position + 4])
        if name == b"IHDR" and position > 8:
            raise hostile("a PNG with a second header")
        if name in _KEPT:
            spans.append((position, end))
        elif name == b"eXIf":
            exif = exif or data[position + 8 : end - 4]
        position = end
        if name == b"IEND" or position >= len(data):
            break
    else:
        raise hostile(f"a PNG with more than {limit:,} chunks in {len(data):,} bytes")
    body = b"".join(view[start:end] for start, end in spans)
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return Container(ImageFormat.PNG, body, width, height, orientation=exif_orientation(exif))
