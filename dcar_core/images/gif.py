"""GIF structure: the first frame is kept with its transparency; comments and other extensions are removed.

Pillow joins the blocks of a comment one by one, which takes quadratic time.
"""

from dcar_core.images.formats import Container, ImageFormat, hostile
from dcar_core.util.errors import ImageError

_MAX_BLOCKS = 10_000  # before the first frame
_EXTENSION, _FRAME, _GRAPHIC_CONTROL = 0x21, 0x2C, 0xF9


def inspect_gif(data: bytes) -> Container:
    """Check a GIF up to its first frame and remove extensions. Raise ImageError for too many blocks or no frame."""
    if len(data) < 13:
        raise ImageError("broken or truncated: a GIF without a header")
    position = head = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    control, blocks = b"", 0
    while position < len(data) and data[position] != _FRAME:
        blocks += 1
        if data[position] == _EXTENSION:
            start, position = position, position + 2
            while position < len(data) and data[position] and blocks <= _MAX_BLOCKS:
                position += 1 + data[position]
                blocks += 1
            is_filled = position > start + 2  # behind an empty one Pillow takes the next bytes for its data
            if is_filled and data[start + 1 : start + 2] == bytes([_GRAPHIC_CONTROL]):
                control = data[start : position + 1]
        if blocks > _MAX_BLOCKS:
            raise hostile(f"a GIF with more than {_MAX_BLOCKS:,} blocks before its first frame")
        position += 1
    if position + 10 > len(data):
        raise ImageError("broken or truncated: a GIF without a frame")
    left, top, width, height = (int.from_bytes(data[position + i : position + i + 2], "little") for i in (1, 3, 5, 7))
    screen = (int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"))
    body = b"".join([memoryview(data)[:head], control, memoryview(data)[position:]])
    return Container(ImageFormat.GIF, body, max(screen[0], left + width), max(screen[1], top + height))
