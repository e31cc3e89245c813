"""AV1 frame sizes in AVIF files: decoders allocate what the sequence header says, whatever the container declares.

- Items are found through `iloc` and `infe`, image sequences through the chunk offsets of their tracks.
- A frame of a video stream may exceed its sequence header; the decoder's own limit of 16,384 x 16,384 pixels remains.
"""

from collections.abc import Iterator

from dcar_core.images.formats import hostile

_MAX_UNITS = 100_000  # of one stream, about 50 ms
_MAX_COPIES = 4  # items may share data, so all together may be larger than the file
_SEQUENCE_HEADER = 1


def coded_sizes(data: bytes, index: bytes, idat: int) -> Iterator[tuple[int, int]]:
    """Yield width and height of every AV1 sequence header in the items and tracks of a file.

    Args:
        index: the boxes `meta` and `moov`.
        idat: the position in the file of the data that the index holds itself.

    Raises:
        ImageError: the items repeat the same data many times, or have too many units.
    """
    kinds, budget = dict(_item_kinds(index)), _MAX_COPIES * len(data)
    for item, spans in _item_spans(index, idat):
        if kinds.get(item) == b"av01":
            stream = [memoryview(data)[start:end] for start, end in spans]
            budget -= sum(map(len, stream))
            if budget < 0:
                raise hostile("an AVIF file whose items overlap")
            yield from _stream_sizes(b"".join(stream))
    for name, size in ((b"stco", 4), (b"co64", 8)):
        for position in _positions(index, name):
            chunk = _Reader(index, position + 12).bytes(size)  # behind version, flags and the number of chunks
            yield from _stream_sizes(data[chunk:])


def _positions(index: bytes, name: bytes) -> Iterator[int]:
    position = index.find(name)
    while position >= 0:
        yield position
        position = index.find(name, position + 4)


def _item_kinds(index: bytes) -> Iterator[tuple[int, bytes]]:
    for position in _positions(index, b"infe"):
        id_bytes = 4 if index[position + 4 : position + 5] == b"\3" else 2
        kind = position + 10 + id_bytes
        yield _Reader(index, position + 8).bytes(id_bytes), index[kind : kind + 4]


def _item_spans(index: bytes, idat: int) -> Iterator[tuple[int, list[tuple[int, int | None]]]]:
    """Yield the number of every item and the spans of the file that hold it."""
    for position in _positions(index, b"iloc"):
        box = _Reader(index, position + 4)
        version, _, sizes, more = box.bytes(1), box.bytes(3), box.bytes(1), box.bytes(1)
        id_bytes = 4 if version == 2 else 2
        for _ in range(min(box.bytes(id_bytes), len(index))):
            item, is_inside = box.bytes(id_bytes), version > 0 and box.bytes(2) & 15 == 1
            _, base = box.bytes(2), box.bytes(more >> 4)
            spans = list[tuple[int, int | None]]()
            for _ in range(min(box.bytes(2), len(index))):
                _ = box.bytes(more & 15 if version else 0)
                start = base + box.bytes(sizes >> 4) + (idat if is_inside else 0)
                spans.append((start, start + length if (length := box.bytes(sizes & 15)) else None))
            yield item, spans


def _stream_sizes(stream: bytes) -> Iterator[tuple[int, int]]:
    """Walk the units of a stream (OBUs) and yield the size in each sequence header."""
    position = 0
    for _ in range(_MAX_UNITS):
        if position + 1 >= len(stream) or stream[position] & 0x80:
            return
        unit = stream[position]
        position += 2 if unit & 4 else 1  # an extension takes a byte
        size = 0 if unit & 2 else len(stream)
        for shift in range(0, 56 if unit & 2 else 0, 7):
            size |= (stream[position] & 127) << shift if position < len(stream) else 0
            position += 1
            if position > len(stream) or stream[position - 1] < 128:
                break
        if unit >> 3 & 15 == _SEQUENCE_HEADER:
            yield _sequence_size(_Reader(stream[position : position + min(size, 512)], 0))
        position += size
    raise hostile(f"an AV1 stream of more than {_MAX_UNITS:,} units")


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

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._bit = data, 8 * position

    def bytes(self, count: int) -> int:
        return self.bits(8 * count)

    def bits(self, count: int) -> int:
        start, end = self._bit, self._bit + count
        self._bit = end
        part = self._data[start // 8 : -(-end // 8)].ljust(-(-end // 8) - start // 8, b"\0")
        return int.from_bytes(part) >> -end % 8 & (1 << count) - 1
