"""Hostile image files for `attack.py`, beside those of `tests/support/hostile_images.py`."""

import io
import struct

from PIL import Image

from tests.support.hostile_images import png_chunk, tiff


def encoded(kind: str, side: int, **options: object) -> bytes:
    """Return an image of one colour: few bytes, many pixels."""
    buffer = io.BytesIO()
    Image.new("L" if kind in ("TIFF", "BMP", "GIF") else "RGB", (side, side)).save(buffer, kind, **options)
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
    """Return a PNG of one pixel by its first header, and of side x side by its second."""
    data = encoded("PNG", side)
    return data[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)) + data[8:]


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


FTYP = box(b"ftyp", b"avif" + bytes(4) + b"avifmif1")


def many_extents(items: int) -> bytes:
    """Return an AVIF of items with 65,535 extents each, which take no bytes."""
    located = b"".join(struct.pack(">HHH", item, 0, 65_535) for item in range(items))
    iloc = box(b"iloc", bytes(6) + struct.pack(">H", items) + located)
    return FTYP + box(b"meta", bytes(4) + iloc + box(b"free", bytes(130_000 - len(iloc))))


def many_tracks(count: int) -> bytes:
    """Return an AVIF whose tracks all begin at the same stream of 99,990 units."""
    offset = box(b"stco", bytes(4) + struct.pack(">II", 1, len(FTYP) + 8))
    return FTYP + box(b"mdat", b"\x12\0" * 99_990) + box(b"moov", offset * count)


def two_kinds(side: int) -> bytes:
    """Return an AVIF of side x side that declares 16 x 16, and whose item has a second kind in a box to be skipped."""
    data = encoded("AVIF", side)
    start, entry, declared = (data.index(name) for name in (b"meta", b"infe", b"ispe"))
    end = start - 4 + int.from_bytes(data[start - 4 : start])
    other = box(b"free", box(b"infe", data[entry + 4 : entry + 10] + b"\0\0none"))
    index = data[start : declared + 8] + struct.pack(">II", 16, 16) + data[declared + 16 : end]
    place = data.index(b"mdat") + 4
    index = index.replace(struct.pack(">I", place), struct.pack(">I", place + len(other)))
    return data[: start - 4] + struct.pack(">I", end - start + 4 + len(other)) + index + other + data[end:]
