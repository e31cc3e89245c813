"""AVIF and HEIF structure: the index of the file is bounded, declared and coded sizes are read, EXIF is hidden.

- libavif and libheif look items up one after the other, so an index of millions of items takes them minutes.
- Entries of the index may take no bytes, and many may name the same stream. So every step of the check is counted.
- An index may name a thing twice, also in boxes that decoders skip. So all entries of a name count, wherever they are.
- An AV1 decoder allocates what the sequence header says, whatever the container declares. Items are found through
  `iloc` and `infe`, image sequences through the chunk offsets of their tracks. A frame of a video may exceed its
  header; the decoder's own limit of 16,384 x 16,384 pixels remains.
- Rotations are boxes of the container, so EXIF is not needed for them. libheif applies them, and Pillow reports those
  of AVIF.
"""

from collections.abc import Iterator, Sequence

from dcar_core.images.formats import Container, ImageFormat, hostile
from dcar_core.util.errors import ImageError

_MAX_INDEX_BYTES = {b"meta": 2**17, b"moov": 2**20}  # an image of 200 MP in 800 tiles takes 36 KB
_MAX_BOXES = 1_000  # at the top level
_MAX_STEPS = 100_000  # boxes, numbers in them and units of AV1 streams; about 0.1 s
_MAX_COPIES = 4  # items may share data, so all together may be larger than the file
_SEQUENCE_HEADER = 1
_COPIES = 9.0  # bytes per pixel beside the planes: the decoder's result, Pillow's copy of it, and the image

_Spans = list[tuple[int, int | None]]  # start and end; None for the end of the file


def inspect_isobmff(data: bytes, image_format: ImageFormat) -> Container:
    """Check the structure of an AVIF or HEIF file. Raise ImageError if its index is too large, or missing."""
    pieces, view, indexes = list[memoryview | bytes](), memoryview(data), dict[int, bytes]()
    for name, start, end in _boxes(data):
        if name not in _MAX_INDEX_BYTES:
            pieces.append(view[start:end])
            continue
        if end - start > _MAX_INDEX_BYTES[name]:
            raise hostile(f"an {image_format.upper()} file with an index of {end - start:,} bytes")
        indexes[start] = data[start:end].replace(b"Exif", b"none")  # the same length, so that offsets stay true
        pieces.append(indexes[start])
    if not indexes:
        raise ImageError(f"broken or truncated: an {image_format.upper()} file without an index")
    index, body = b"".join(indexes.values()), b"".join(pieces)
    sizes = list(_declared_sizes(index))
    if image_format == ImageFormat.AVIF:
        steps = _Steps()
        idats = [place + start for place, each in indexes.items() for start, _ in _contents(each, b"idat", steps)]
        sizes += coded_sizes(body, index, idats)
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
    for start, _ in _contents(index, b"ispe", _Steps()):
        yield int.from_bytes(index[start + 4 : start + 8]), int.from_bytes(index[start + 8 : start + 12])


def _plane_bytes(index: bytes) -> float:
    """Return bytes per pixel of the decoded planes: three without subsampling and alpha of 16 bits at most."""
    alpha = 1 if b"auxC" in index else 0
    flags = (index[start + 2 : start + 3] for start, _ in _contents(index, b"av1C", _Steps()))
    return max((_planes(each[0], alpha) for each in flags if each), default=8.0)


def _planes(flags: int, alpha: int) -> float:
    """Return bytes per pixel by the flags of `av1C`: high bit depth 0x40, monochrome 0x10, subsampling 0x08 in x and
    0x04 in y.
    """
    chroma = 0.0 if flags & 0x10 else 2 / ((2 if flags & 0x08 else 1) * (2 if flags & 0x04 else 1))
    return (1 + chroma + alpha) * (2 if flags & 0x40 else 1)


def coded_sizes(data: bytes, index: bytes, idats: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield width and height of every AV1 sequence header in the items and tracks of a file.

    Args:
        index: the boxes `meta` and `moov`.
        idats: the positions in the file of the data that the index holds itself.

    Raises:
        ImageError: the items repeat the same data many times, or the index and the streams take too many steps.
    """
    steps, copies = _Steps(), _MAX_COPIES * len(data)
    coded = {item for item, kind in _item_kinds(index, steps) if kind == b"av01"}
    for item, spans in _item_spans(index, idats, steps):
        if item in coded:
            stream = [memoryview(data)[start:end] for start, end in spans]
            copies -= sum(map(len, stream))
            if copies < 0:
                raise hostile("an AVIF file whose items overlap")
            yield from _stream_sizes(memoryview(b"".join(stream)), steps)
    for name, size in ((b"stco", 4), (b"co64", 8)):
        for start, _ in _contents(index, name, steps):
            chunk = _Reader(index, start + 8, steps).bytes(size)  # behind version, flags and the number of chunks
            yield from _stream_sizes(memoryview(data)[chunk:], steps)


class _Steps:
    """Counts the steps of a check, and ends one that takes too many."""

    def __init__(self) -> None:
        self._left = _MAX_STEPS

    def take(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise hostile(f"an image file whose structure takes more than {_MAX_STEPS:,} steps to check")


def _contents(index: bytes, name: bytes, steps: _Steps) -> Iterator[tuple[int, int]]:
    """Yield start and end of the contents of every box of a name, at any depth."""
    position = index.find(name)
    while position >= 0:
        steps.take()
        start, size = position + 4, int.from_bytes(index[max(0, position - 4) : position])
        if size == 1:  # eight bytes behind the name hold it
            start, size = position + 12, int.from_bytes(index[position + 4 : position + 12])
        yield start, position - 4 + size
        position = index.find(name, position + 4)


def _item_kinds(index: bytes, steps: _Steps) -> Iterator[tuple[int, bytes]]:
    for start, _ in _contents(index, b"infe", steps):
        id_bytes = 4 if index[start : start + 1] == b"\3" else 2
        kind = start + 6 + id_bytes
        yield _Reader(index, start + 4, steps).bytes(id_bytes), index[kind : kind + 4]


def _item_spans(index: bytes, idats: Sequence[int], steps: _Steps) -> Iterator[tuple[int, _Spans]]:
    """Yield the number of every item and the spans of the file that hold it, or that may."""
    for start, end in _contents(index, b"iloc", steps):
        box = _Reader(index, start, steps)
        version, _, sizes, more = box.bytes(1), box.bytes(3), box.bytes(1), box.bytes(1)
        id_bytes, number_bytes = 4 if version == 2 else 2, more & 15 if version else 0
        extent_bytes = number_bytes + (sizes >> 4) + (sizes & 15)
        for _ in range(box.bytes(id_bytes)):
            item, is_inside = box.bytes(id_bytes), version > 0 and box.bytes(2) & 15 == 1
            _, base, extents = box.bytes(2), box.bytes(more >> 4), box.bytes(2)
            if box.position + extents * extent_bytes > end or (extents > 1 and not extent_bytes):
                raise hostile("an AVIF file with more parts of items than its index has room for")
            spans = _Spans()
            for _ in range(extents):
                _ = box.bytes(number_bytes)
                first = base + box.bytes(sizes >> 4)
                spans.append((first, first + length if (length := box.bytes(sizes & 15)) else None))
            for place in idats if is_inside else [0]:
                steps.take(1 + len(spans))
                yield item, [(place + first, None if last is None else place + last) for first, last in spans]


def _stream_sizes(stream: memoryview, steps: _Steps) -> Iterator[tuple[int, int]]:
    """Walk the units of a stream (OBUs) and yield the size in each sequence header."""
    position = 0
    while position + 1 < len(stream) and not stream[position] & 0x80:
        steps.take()
        unit = stream[position]
        position += 2 if unit & 4 else 1  # an extension takes a byte
        size = 0 if unit & 2 else len(stream)
        for shift in range(0, 56 if unit & 2 else 0, 7):
            size |= (stream[position] & 127) << shift if position < len(stream) else 0
            position += 1
            if position > len(stream) or stream[position - 1] < 128:
                break
        if unit >> 3 & 15 == _SEQUENCE_HEADER:
            yield _sequence_size(_Reader(bytes(stream[position : position + min(size, 512)]), 0, steps))
        position += size


def _sequence_size(header: "_Reader") -> tuple[int, int]:
    """Return the largest frame size of a sequence header (AV1 specification, section 5.5)."""
    bits = header.bits
    _, is_reduced = bits(4), bits(1)  # profile and still_picture; reduced_still_picture_header
    if is_reduced:
        bits(5)
    else:
        delay_bits = 0
        if bits(1):  # timing_info_present_flag
            bits(64)
            if bits(1):  # equal_picture_interval, then an Exp-Golomb number
                zeros = 0
                while zeros < 32 and not bits(1):
                    zeros += 1
                bits(zeros)
            if bits(1):  # decoder_model_info_present_flag
                delay_bits = bits(5) + 1
                bits(42)
        has_display_delay = bits(1)
        for _ in range(bits(5) + 1):  # operating points
            bits(12)
            bits(1 if bits(5) > 7 else 0)
            if delay_bits and bits(1):
                bits(2 * delay_bits + 1)
            bits(4 if has_display_delay and bits(1) else 0)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    return bits(width_bits) + 1, bits(height_bits) + 1


class _Reader:
    """Reads big-endian integers in turn; zeros behind the end."""

    def __init__(self, data: bytes, position: int, steps: _Steps) -> None:
        self._data, self._bit, self._steps = data, 8 * position, steps

    @property
    def position(self) -> int:
        return self._bit // 8

    def bytes(self, count: int) -> int:
        return self.bits(8 * count)

    def bits(self, count: int) -> int:
        self._steps.take()
        start, end = self._bit, self._bit + count
        self._bit = end
        part = self._data[start // 8 : -(-end // 8)].ljust(-(-end // 8) - start // 8, b"\0")
        return int.from_bytes(part) >> -end % 8 & (1 << count) - 1
