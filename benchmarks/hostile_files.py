"""Hostile image files for `attack.py`, beside those of
`tests/support/hostile_images.py`.
"""

import io
import struct

from PIL import Image

from tests.support.hostile_images import png_chunk, tiff


def encoded(kind: str, side: int, **options: object) -> bytes:
    """Return an image of one colour: few bytes, many pixels."""
    buffer = io.BytesIO()
    Image.new("L" if kind in ("TIFF", "BMP", "GIF") else "RGB", (side, side)).save(
        buffer,
        kind,
        **options,
    )
    return buffer.getvalue()


def many_tags(count: int) -> bytes:
    """Return a TIFF with many tags."""
    return tiff({700 + number: (4, 1, bytes(4)) for number in range(count)})


def heif_bomb(side: int) -> bytes:
    """Return an AVIF under the names of HEIF that declares side x side pixels."""
    data = encoded("AVIF", 64).replace(b"avif", b"heic").replace(b"av01", b"hvc1")
    size = data.index(b"ispe") + 8
    return data[:size] + struct.pack(">II", side, side) + data[size + 8 :]


def two_headers(side: int) -> bytes:
    """Return a PNG of one pixel by its first header, and of side x side by its
    second.
    """
    data = encoded("PNG", side)
    return (
        data[:8]
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + data[8:]
    )


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


FTYP = box(b"ftyp", b"avif" + bytes(4) + b"avifmif1")


def many_extents(items: int) -> bytes:
    """Return an AVIF of items with 65,535 extents each, which take no bytes."""
    located = b"".join(struct.pack(">HHH", item, 0, 65_535) for item in range(items))
    iloc = box(b"iloc", bytes(6) + struct.pack(">H", items) + located)
    return FTYP + box(
        b"meta", bytes(4) + iloc + box(b"free", bytes(130_000 - len(iloc)))
    )
