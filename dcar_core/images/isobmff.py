"""AVIF and HEIF structure: the index of the file is bounded, declared and coded sizes are read, EXIF is hidden.

- libavif and libheif look items up one after the other, so an index of millions of items takes them minutes.
- Both apply rotations of the container by themselves; EXIF says nothing more about them.
"""

from collections.abc import Iterator

from dcar_core.images.av1 import coded_sizes
from dcar_core.images.formats import Container, ImageFormat, hostile
from dcar_core.util.errors import ImageError

_MAX_INDEX_BYTES = {b"meta": 2**17, b"moov": 2**20}  # an image of 200 MP in 800 tiles takes 36 KB
_MAX_BOXES = 1_000  # at the top level
_COPIES = 9.0  # bytes per pixel beside the planes: the decoder's result, Pillow's copy of it, and the image


def inspect_isobmff(data: bytes, image_format: ImageFormat) -> Container:
    """Check the structure of an AVIF or HEIF file.

    Raises:
        ImageError: its index is too large, or missing.
    """
    pieces, view, indexes = list[memoryview | bytes](), memoryview(data), list[bytes]()
    for name, start, end in _boxes(data):
        if name not in _MAX_INDEX_BYTES:
            pieces.append(view[start:end])
            continue
        if end - start > _MAX_INDEX_BYTES[name]:
            raise hostile(f"an {image_format.upper()} file with an index of {end - start:,} bytes")
        indexes.append(data[start:end].replace(b"Exif", b"none"))  # the same length, so that offsets stay true
        pieces.append(indexes[-1])
    if not indexes:
        raise ImageError(f"broken or truncated: an {image_format.upper()} file without an index")
    index, body = b"".join(indexes), b"".join(pieces)
    sizes = list(_declared_sizes(index))
    if image_format == ImageFormat.AVIF:
        sizes += coded_sizes(body, index, body.find(b"idat") + 4)
    width, height = max(sizes, default=(0, 0), key=lambda size: size[0] * size[1])
    return Container(image_format, body, width, height, _plane_bytes(index) + _COPIES)


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the boxes at the top level."""
    position = 0
    for _ in range(_MAX_BOXES):
        if position + 8 > len(data):
            return
        size = int.from_bytes(data[position : position + 4])
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16])
        end = min(len(data), position + size) if size >= 8 else len(data)
        yield data[position + 4 : position + 8], position, end
        position = end
    raise hostile(f"more than {_MAX_BOXES:,} boxes")


def _declared_sizes(index: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes of all images in the file: of tiles, thumbnails and the image itself."""
    position = index.find(b"ispe")
    while position >= 0:
        yield int.from_bytes(index[position + 8 : position + 12]), int.from_bytes(index[position + 12 : position + 16])
        position = index.find(b"ispe", position + 4)


def _plane_bytes(index: bytes) -> float:
    """Return bytes per pixel of the decoded planes: three without subsampling and alpha of 16 bits at most."""
    position = index.find(b"av1C")
    if position < 0 or position + 7 > len(index):
        return 8.0
    flags = index[position + 6]  # high bit depth 0x40, monochrome 0x10, subsampling in x 0x08 and in y 0x04
    chroma = 0.0 if flags & 0x10 else 2 / ((2 if flags & 0x08 else 1) * (2 if flags & 0x04 else 1))
    alpha = 1 if b"auxC" in index else 0
    return (1 + chroma + alpha) * (2 if flags & 0x40 else 1)
