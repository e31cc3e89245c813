"""TIFF structure, which EXIF shares: tags are read here, and only the tags of the image itself reach a decoder.

- Every tag may claim any amount of data, and Pillow writes a warning for each that is odd. So the list of tags is
  rewritten with known ones alone.
- A file may declare a small image in one huge tile, which the decoder then holds. So tile sizes are compared.
- Of a tag that is there twice, decoders take the first or the last. So there may be one alone.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dcar_core.images.formats import Container, ImageFormat, hostile
from dcar_core.util.errors import ImageError

MAX_TAGS = 1_000  # of a TIFF file; cameras and GIS programs write up to 200
MAX_VALUES = 2**18  # of one tag; a 16-bit colour map has 196,608
_FREE_TILE_PIXELS = 2**22
_BYTES_PER_PIXEL = 12.0  # the image, and one strip of 16-bit RGBA that may be as large

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _ORIENTATION = 256, 257, 322, 323, 274
_SIDES = frozenset({_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT})
_DECODED_TAGS = frozenset({
    254, _WIDTH, _HEIGHT, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 297, 317, 320, _TILE_WIDTH,
    _TILE_HEIGHT, 324, 325, 332, 336, 338, 339, 340, 341, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532,
})  # fmt: skip
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTE_TYPES = frozenset({1, 2, 6, 7})  # kept as bytes, however long
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q", 17: "q"}


@dataclass(frozen=True, slots=True)
class Tag:
    """One entry of a directory; position: of its 12 or 20 bytes."""

    number: int
    kind: int
    count: int
    position: int


class Directory(NamedTuple):
    """The first directory of a TIFF file.

    order: "<" or ">". position, entries: of the number of tags, and of the first one, which has `entry_bytes`.
    """

    order: str
    is_big: bool
    position: int
    tag_count: int
    entries: int
    entry_bytes: int


def inspect_tiff(data: bytes) -> Container:
    """Check the first image of a TIFF file and remove its metadata.

    Raises:
        ImageError: too many tags, one twice, too much data in them, sides that are no number, or a tile far larger than
            the image.
    """
    try:
        directory = _directory(data)
        if directory.tag_count > MAX_TAGS:
            raise hostile(f"a TIFF file with {directory.tag_count:,} tags; at most {MAX_TAGS:,} are read")
        tags = list(_tags(data, directory))
        values = {tag.number: _integer(data, directory, tag) for tag in tags if tag.count == 1}
    except struct.error as error:
        raise ImageError("broken or truncated: a TIFF file without a complete directory") from error
    kept = [tag for tag in tags if tag.number in _DECODED_TAGS]
    if len({tag.number for tag in kept}) < len(kept):
        raise hostile("a TIFF file with a tag that is there twice")
    if any(tag.number in _SIDES and values.get(tag.number, 0) < 1 for tag in kept):
        raise hostile("a TIFF file with a side that is not a number of pixels")
    if any(tag.count > MAX_VALUES and tag.kind not in _BYTE_TYPES for tag in kept):
        raise hostile(f"a TIFF file with a tag of more than {MAX_VALUES:,} values")
    if sum(tag.count * _SIZES.get(tag.kind, 1) for tag in kept) > len(data):
        raise hostile("a TIFF file with more data in its tags than it has")
    width, height = values.get(_WIDTH, 0), values.get(_HEIGHT, 0)
    tile_width, tile_height = values.get(_TILE_WIDTH, 0), values.get(_TILE_HEIGHT, 0)
    if tile_width * tile_height > max(_FREE_TILE_PIXELS, 2 * width * height):
        raise hostile(f"a TIFF file of {width} x {height} pixels in tiles of {tile_width} x {tile_height}")
    body = _with_tags(data, directory, kept)
    return Container(ImageFormat.TIFF, body, width, height, _BYTES_PER_PIXEL, _valid(values.get(_ORIENTATION, 1)))


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, that an EXIF block states; 1 where it states none or is damaged."""
    try:
        directory = _directory(exif)
        for tag in _tags(exif, directory):
            if tag.number == _ORIENTATION:
                return _valid(_integer(exif, directory, tag))
    except (struct.error, ImageError):
        pass
    return 1


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


def _directory(data: bytes) -> Directory:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ImageError("broken or truncated: no TIFF header")
    (version,) = struct.unpack_from(order + "H", data, 2)
    is_big = version == 43
    (position,) = struct.unpack_from(order + ("Q" if is_big else "L"), data, 8 if is_big else 4)
    if position > len(data):
        raise ImageError("broken or truncated: a TIFF file without its directory")
    (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, position)
    return Directory(order, is_big, position, count, position + (8 if is_big else 2), 20 if is_big else 12)


def _tags(data: bytes, directory: Directory) -> Iterator[Tag]:
    layout = directory.order + ("HHQ" if directory.is_big else "HHL")
    for number in range(directory.tag_count):
        position = directory.entries + number * directory.entry_bytes
        code, kind, count = struct.unpack_from(layout, data, position)
        yield Tag(code, kind, count, position)


def _integer(data: bytes, directory: Directory, tag: Tag) -> int:
    """Return the value of a tag that holds one integer; 0 of any other, or if it is elsewhere in the file."""
    if tag.kind not in _INTEGERS or (_SIZES[tag.kind] > 4 and not directory.is_big):
        return 0
    position = tag.position + (12 if directory.is_big else 8)
    (value,) = struct.unpack_from(directory.order + _INTEGERS[tag.kind], data, position)
    return int(value)


def _with_tags(data: bytes, directory: Directory, tags: list[Tag]) -> bytes:
    """Return the file with these tags alone in its directory, and no directory after it."""
    size, entries = directory.entry_bytes, directory.entries
    body = bytearray(data)
    body[directory.position : entries] = struct.pack(directory.order + ("Q" if directory.is_big else "H"), len(tags))
    for place, tag in enumerate(tags):
        body[entries + place * size : entries + (place + 1) * size] = data[tag.position : tag.position + size]
    end, pointer = entries + len(tags) * size, 8 if directory.is_big else 4
    body[end : end + pointer] = bytes(min(pointer, len(body) - end))
    return bytes(body)
