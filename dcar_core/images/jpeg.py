"""JPEG structure: headers are rebuilt without metadata, scans are counted.

- Pillow parses every metadata segment in Python, some in quadratic time, and libjpeg walks all blocks of the image once
  per scan. So metadata never reaches them, and the number of scans is limited.
- Everything after the first scan is passed on unchanged: libjpeg alone reads it.
"""

import re

import numpy as np
from numpy.typing import NDArray

from dcar_core.images.formats import Container, ImageFormat, hostile
from dcar_core.images.tiff import exif_orientation
from dcar_core.util.errors import ImageError

MAX_SCANS = 100  # encoders write about ten
MAX_SEGMENTS = 2_000  # before the first scan; XMP of 20 MB takes 320
MAX_TABLE_BYTES = 2**16  # before the first scan; four quantisation and eight Huffman tables take 3 KB

_SOI, _SOS, _EOI, _APP0, _APP1, _APP14, _COM = 0xD8, 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x00, 0x01, _SOI, *range(0xD0, 0xD8)})
_FILL = re.compile(rb"\xff*")
_BLOCK = 2**16
_REDUCED = 0.25  # bytes per pixel of the result, at 1/4 of the size or less


def inspect_jpeg(data: bytes) -> Container:
    """Check a JPEG and remove its metadata. Raise ImageError if it has too many segments or scans, or no frame."""
    kept: dict[int, bytes] = {}  # JFIF and Adobe headers, which decide about colours
    tables: list[bytes] = []
    frame, exif, position = b"", b"", 2
    for _ in range(MAX_SEGMENTS):
        marker, start = _next_marker(data, position)
        if marker in _WITHOUT_LENGTH:
            position = start
            continue
        if marker == _EOI or start + 2 > len(data):
            raise ImageError("broken or truncated: a JPEG without image data")
        position = start + int.from_bytes(data[start : start + 2])
        segment = data[start - 2 : position]
        if marker == _SOS:
            break
        if marker == _APP1:
            exif = exif or (segment[10:] if segment[4:10] == b"Exif\0\0" else b"")
        elif marker in {_APP0, _APP14}:
            kept[marker] = b"\xff" + segment[1:]
        elif marker != _COM and not 0xE0 <= marker <= 0xEF:
            tables.append(b"\xff" + segment[1:])
            frame = segment if marker in _FRAME_HEADERS else frame
    else:
        raise hostile(f"a JPEG with more than {MAX_SEGMENTS:,} segments before its image data")
    if sum(map(len, tables)) > MAX_TABLE_BYTES:
        raise hostile(f"a JPEG with more than {MAX_TABLE_BYTES >> 10} KB of tables")
    if len(frame) < 10:
        raise ImageError("broken or truncated: a JPEG without a frame header")
    scan = start - 2
    _require_few_scans(data, scan)
    body = b"".join([b"\xff\xd8", *kept.values(), *tables, memoryview(data)[scan:]])
    return Container(
        ImageFormat.JPEG,
        body,
        width=int.from_bytes(frame[7:9]),
        height=int.from_bytes(frame[5:7]),
        bytes_per_pixel=_bytes_per_pixel(frame, data[start + 2 : start + 3]),
        orientation=exif_orientation(exif),
    )


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """Return the next marker and the position behind it. Bytes between segments are skipped, as libjpeg does."""
    start = data.find(b"\xff", position)
    fill = _FILL.match(data, start) if start >= 0 else None
    if fill is None or fill.end() == len(data):
        raise ImageError("broken or truncated: a JPEG without image data")
    return data[fill.end()], fill.end() + 1


def _require_few_scans(data: bytes, position: int) -> None:
    """Walk the segments from the first scan at `position` to the end of the image."""
    values, scans = np.frombuffer(data, np.uint8), 0
    for _ in range(MAX_SEGMENTS):
        scans += data[position + 1] == _SOS
        if scans > MAX_SCANS:
            raise hostile(f"a JPEG with more than {MAX_SCANS} scans")
        position = _marker_in_scan(values, position + 2 + int.from_bytes(data[position + 2 : position + 4]))
        if position < 0 or data[position + 1] == _EOI:
            return
    raise hostile(f"a JPEG with more than {MAX_SEGMENTS:,} segments between its scans")


def _marker_in_scan(values: NDArray[np.uint8], position: int) -> int:
    """Return the position of the next marker, -1 if there is none; restarts and stuffed bytes are no markers."""
    for start in range(position, len(values) - 1, _BLOCK):
        block = values[start : start + _BLOCK + 1]
        starts = np.flatnonzero(block[:-1] == 0xFF)
        codes = block[starts + 1]
        found = starts[(codes > 0x01) & (codes < 0xFF) & ((codes < 0xD0) | (codes > 0xD7))]
        if len(found):
            return start + int(found[0])
    return -1


def _bytes_per_pixel(frame: bytes, scan_components: bytes) -> float:
    """Return the memory per pixel of a decode at reduced scale.

    libjpeg holds all coefficients, two bytes each, of progressive files and of files with several scans.
    """
    if frame[1] in _SEQUENTIAL and scan_components == frame[9:10]:
        return _REDUCED
    factors = [(byte >> 4 or 1, byte & 15 or 1) for byte in frame[11 : 11 + 3 * frame[9] : 3]]
    most = max((h for h, _ in factors), default=1) * max((v for _, v in factors), default=1)
    return _REDUCED + 2 * sum(h * v for h, v in factors) / most
