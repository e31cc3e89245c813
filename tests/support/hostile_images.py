"""Small files that would take a decoder minutes or gigabytes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dcar_core.images import inspect
from dcar_core.util.errors import ImageError, ImageFault
from tests.support.images import encoded


def _grain(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8))


def jpeg_with_scans(scans: int, side: int = 2_800) -> bytes:
    """Return a progressive JPEG whose last scan, without any data, is repeated."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    scan = struct.pack(">BBHBBBBBB", 0xFF, 0xDA, 8, 1, 1, 0, 1, 1, 0)  # one AC coefficient, first bits
    empty = (
        b"\xff\xc4" + struct.pack(">H", 20) + b"\x10" + b"\1" + bytes(15) + b"\0"
    )  # Huffman table: end of block alone
    return data[:-2] + empty + scans * scan + b"\xff\xd9"


def jpeg_with_segments(count: int, marker: int = 0xE1, payload: bytes = b"Exif\0\0MM\0*\0\0\0\x08") -> bytes:
    """Return a JPEG with many small segments before its image; EXIF by default."""
    segment = struct.pack(">BBH", 0xFF, marker, 2 + len(payload)) + payload
    data = encoded(_grain(16), "JPEG")
    return data[:2] + count * segment + data[2:]


def jpeg_with_exif(exif: bytes) -> bytes:
    """Return a JPEG with this EXIF block."""
    return jpeg_with_segments(1, payload=b"Exif\0\0" + exif)


def exif_of_large_tags(count: int, size: int) -> bytes:
    """Return an EXIF block in which every tag claims the same bytes."""
    tags = b"".join(struct.pack("<HHLL", 40_000 + i, 7, size, 8) for i in range(count))
    block = struct.pack("<2sHLH", b"II", 42, 8, count) + tags
    return block + bytes(max(0, size + 8 - len(block)))


def png_chunk(name: bytes, data: bytes) -> bytes:
    """Return one chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


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
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")


def gif_with_comment_blocks(count: int) -> bytes:
    """Return a GIF with one comment in many blocks of one byte."""
    data = encoded(_grain(16).convert("P"), "GIF")
    head = 13 + (3 << (data[10] & 7) + 1)
    return data[:head] + b"\x21\xfe" + count * b"\1c" + b"\0" + data[head:]


def gif_of_frame(width: int, height: int) -> bytes:
    """Return a GIF whose screen is small and whose first frame declares a size of its own."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0x80, 0, 0) + bytes(6) + frame + b";"


def webp_with_chunks(count: int) -> bytes:
    """Return a WebP file with many empty chunks behind its image."""
    body = encoded(_grain(16).convert("RGB"), "WEBP")[8:] + count * (b"junk" + bytes(4))
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_of_size(width: int, height: int) -> bytes:
    """Return a lossy WebP file that declares a size and holds 16 x 16 pixels."""
    data = encoded(_grain(16).convert("RGB"), "WEBP")
    return data[:26] + struct.pack("<HH", width, height) + data[30:]


def avif_with_index(size: int) -> bytes:
    """Return an AVIF file whose index is padded to a size."""
    data = encoded(_grain(16).convert("RGB"), "AVIF", speed=10)
    start = data.index(b"meta") - 4
    length = int.from_bytes(data[start : start + 4])
    padding = struct.pack(">I", size) + b"free" + bytes(size - 8)
    meta = struct.pack(">I", length + size) + data[start + 4 : start + length] + padding
    return data[:start] + meta + data[start + length :]


def avif_of_frame(width: int, height: int, *, is_still: bool = True) -> bytes:
    """Return an AVIF file of 64 x 64 pixels whose AV1 sequence header announces other ones; the frame is broken."""
    data = encoded(_grain(64).convert("RGB"), "AVIF", speed=10)
    flags = "000" + "11" + "00001" if is_still else "000" + "00" + "00" + "00000" + "0" * 12 + "01000" + "0"
    header = f"{flags}11111111{width - 1:016b}{height - 1:016b}"
    content = int(header.ljust(-(-len(header) // 8) * 8, "0"), 2).to_bytes(-(-len(header) // 8))
    unit = b"\x0a" + bytes([len(content)]) + content
    start = data.index(b"mdat") + 4
    return data[:start] + unit + data[start + len(unit) :]


def avif_of_two_kinds(width: int, height: int) -> bytes:
    """Return the file of `avif_of_frame` with a second kind of its item, in a box that decoders skip."""
    data = avif_of_frame(width, height)
    start, entry = data.index(b"meta") - 4, data.index(b"infe")
    other = box(b"free", box(b"infe", data[entry + 4 : entry + 10] + b"\0\0none"))
    size = int.from_bytes(data[start : start + 4])
    offset = data.index(b"mdat") + 4
    index = data[start + 4 : start + size].replace(struct.pack(">I", offset), struct.pack(">I", offset + len(other)))
    return data[:start] + struct.pack(">I", size + len(other)) + index + other + data[start + size :]


def box(name: bytes, content: bytes = b"") -> bytes:
    """Return a box of an AVIF file."""
    return struct.pack(">I4s", 8 + len(content), name) + content


def avif(index: bytes, media: bytes = b"") -> bytes:
    """Return an AVIF file of these boxes, with its media at byte `AVIF_MEDIA`."""
    return box(b"ftyp", b"avif" + bytes(4) + b"avifmif1") + box(b"mdat", media) + index


AVIF_MEDIA = 32  # where `avif` puts its media
_EMPTY_UNIT = b"\x12\0"


def avif_of_extents(items: int) -> bytes:
    """Return an AVIF file of items with as many extents as can be, which take no bytes of the index."""
    located = b"".join(struct.pack(">HHH", item, 0, 65_535) for item in range(items))
    iloc = box(b"iloc", bytes(6) + struct.pack(">H", items) + located)
    return avif(box(b"meta", bytes(4) + iloc + box(b"free", bytes(65_535))))


def avif_of_chunks(chunks: int, units: int = 99_990) -> bytes:
    """Return an AVIF file whose tracks all begin at the same long stream."""
    offset = box(b"stco", bytes(4) + struct.pack(">II", 1, AVIF_MEDIA))
    return avif(box(b"moov", chunks * offset), units * _EMPTY_UNIT)


def avif_of_streams(items: int, units: int = 99_990) -> bytes:
    """Return an AVIF file whose items are all the same long stream."""
    numbers, media = range(1, items + 1), units * _EMPTY_UNIT
    located = b"".join(struct.pack(">HHHII", item, 0, 1, AVIF_MEDIA, len(media)) for item in numbers)
    kinds = b"".join(box(b"infe", b"\2\0\0\0" + struct.pack(">HH", item, 0) + b"av01") for item in numbers)
    iloc = box(b"iloc", bytes(4) + b"\x44\0" + struct.pack(">H", items) + located)
    return avif(box(b"meta", bytes(4) + iloc + kinds), media + bytes(items * len(media) // 4))


def avif_of_headers(headers: int) -> bytes:
    """Return an AVIF file with one stream of sequence headers, each of 32 operating points."""
    return avif(box(b"moov", box(b"stco", bytes(4) + struct.pack(">II", 1, AVIF_MEDIA))), headers * b"\x0a\2\x01\xf0")


def avif_of_boxes(name: bytes, count: int) -> bytes:
    """Return an AVIF file with many empty boxes of a kind, in several indexes."""
    return avif(10 * box(b"moov", count // 10 * box(name, bytes(12))))


def tiff(tags: dict[int, tuple[int, int, bytes]], extra: bytes = b"") -> bytes:
    """Return a little-endian TIFF of number -> (type, count, value or offset in four bytes)."""
    entries = b"".join(struct.pack("<HHL4s", n, kind, count, value) for n, (kind, count, value) in sorted(tags.items()))
    return struct.pack("<2sHLH", b"II", 42, 8, len(tags)) + entries + bytes(4) + extra


def _short(value: int) -> tuple[int, int, bytes]:
    return (4, 1, struct.pack("<L", value))


def tiff_with_tile(side: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels in one deflated tile of another size."""
    tile = zlib.compress(bytes(side) * min(side, 4_000), 9)
    tags = {256: _short(16), 257: _short(16), 258: _short(8), 259: _short(8), 262: _short(1), 277: _short(1),
            322: _short(side), 323: _short(side), 324: _short(8 + 2 + 10 * 12 + 4), 325: _short(len(tile))}  # fmt: skip
    return tiff(tags, tile)


def tiff_with_tags(count: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels with many private tags, each of them damaged."""
    pixels = bytes(256)
    tags = {256: _short(16), 257: _short(16), 258: _short(8), 259: _short(1), 262: _short(1), 277: _short(1)}
    tags |= {40_000 + i: (2, 1_000, struct.pack("<L", 2**31)) for i in range(count - 9)}
    tags |= {278: _short(16), 279: _short(256), 273: _short(8 + 2 + count * 12 + 4)}
    return tiff(tags, pixels)


def bmp_of_runs(size: int) -> bytes:
    """Return a run-length encoded BMP of many short runs."""
    buffer = io.BytesIO()
    _grain(64).convert("P").save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[30:34] = struct.pack("<I", 1)
    return bytes(data) + bytes(size)


def refusal(data: bytes) -> tuple[ImageFault, str]:
    """Return the fault and the message with which the check refuses a file."""
    with pytest.raises(ImageError) as caught:
        inspect(data)
    return caught.value.fault, str(caught.value)
