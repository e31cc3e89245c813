"""Small files that would take a decoder minutes or gigabytes."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.support.images import encoded


def _grain(side: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(
            0,
            256,
            (side, side),
            dtype=np.uint8,
        )
    )


def jpeg_with_scans(scans: int, side: int = 2_800) -> bytes:
    """Return a progressive JPEG whose last scan, without any data, is repeated."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    # one AC coefficient, first bits
    scan = struct.pack(">BBHBBBBBB", 0xFF, 0xDA, 8, 1, 1, 0, 1, 1, 0)
    empty = b"\xff\xc4\0\x14\x10\1" + bytes(16)  # a Huffman table: end of block alone
    return data[:-2] + empty + scans * scan + b"\xff\xd9"


def jpeg_with_segments(count: int) -> bytes:
    """Return a JPEG with many small EXIF segments before its image."""
    payload = b"Exif\0\0MM\0*\0\0\0\x08"
    segment = struct.pack(">BBH", 0xFF, 0xE1, 2 + len(payload)) + payload
    data = encoded(_grain(16), "JPEG")
    return data[:2] + count * segment + data[2:]


def png_chunk(name: bytes, data: bytes) -> bytes:
    """Return one chunk with its length and checksum."""
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
    )


def png_with_chunks(count: int, name: bytes = b"IDAT", data: bytes = b"") -> bytes:
    """Return a PNG with many chunks between its header and its image."""
    image = encoded(_grain(16))
    return image[:33] + count * png_chunk(name, data) + image[33:]


def png_with_profile(size: int) -> bytes:
    """Return a PNG with a colour profile of zeros."""
    return png_with_chunks(1, b"iCCP", b"x\0\0" + zlib.compress(bytes(size), 9))


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and holds next to nothing."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(b"\0"))
        + png_chunk(b"IEND", b"")
    )


def gif_with_comment_blocks(count: int) -> bytes:
    """Return a GIF with one comment in many blocks of one byte."""
    data = encoded(_grain(16).convert("P"), "GIF")
    head = 13 + (3 << (data[10] & 7) + 1)
    return data[:head] + b"\x21\xfe" + count * b"\1c" + b"\0" + data[head:]


def avif_of_frame(width: int, height: int) -> bytes:
    """Return an AVIF file of 64 x 64 pixels whose AV1 sequence header announces other
    ones; the frame is broken.
    """
    data = encoded(_grain(64).convert("RGB"), "AVIF", speed=10)
    header = f"000110000111111111{width - 1:016b}{height - 1:016b}"
    content = int(header.ljust(-(-len(header) // 8) * 8, "0"), 2).to_bytes(
        -(-len(header) // 8)
    )
    unit = b"\x0a" + bytes([len(content)]) + content
    start = data.index(b"mdat") + 4
    return data[:start] + unit + data[start + len(unit) :]


def tiff(tags: dict[int, tuple[int, int, bytes]], extra: bytes = b"") -> bytes:
    """Return a little-endian TIFF of number -> (type, count, value or offset in four
    bytes).
    """
    entries = b"".join(
        struct.pack("<HHL4s", n, kind, count, value)
        for n, (kind, count, value) in sorted(tags.items())
    )
    return struct.pack("<2sHLH", b"II", 42, 8, len(tags)) + entries + bytes(4) + extra


def _short(value: int) -> tuple[int, int, bytes]:
    return (4, 1, struct.pack("<L", value))


def tiff_with_tile(side: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels in one deflated tile of another size."""
    tile = zlib.compress(bytes(side) * min(side, 4_000), 9)
    tags = {
        256: _short(16),
        257: _short(16),
        258: _short(8),
        259: _short(8),
        262: _short(1),
        277: _short(1),
        322: _short(side),
        323: _short(side),
        324: _short(8 + 2 + 10 * 12 + 4),
        325: _short(len(tile)),
    }
    return tiff(tags, tile)


def mutants(count: int) -> Iterator[bytes]:
    """Yield files of every format in which bytes were changed, cut out or repeated."""
    draw = np.random.default_rng(0)
    picture = _grain(48).convert("RGB")
    kinds = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"]
    files = [
        encoded(picture.convert("P") if kind == "GIF" else picture, kind)
        for kind in kinds
    ]
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for place in draw.integers(
            12,
            len(data),
            draw.integers(1, 12),
        ):
            data[place] = draw.integers(0, 256)
        start, end = sorted(draw.integers(12, len(data), 2))
        if number % 3 == 1:
            del data[start:end]
        elif number % 3 == 2:
            data[start:start] = data[start:end] * int(draw.integers(1, 1_000))
        yield bytes(data)
