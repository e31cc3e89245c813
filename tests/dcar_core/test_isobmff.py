"""The check of AVIF files: sizes of items and tracks, contradicting indexes and exact limits, without any decoding."""

import itertools
import struct

import pytest
from PIL import Image

from dcar_core.images import inspect
from dcar_core.images.isobmff import coded_sizes
from dcar_core.util.errors import ImageError, ImageFault
from tests.support import hostile_images as hostile
from tests.support.hostile_images import refusal
from tests.support.images import encoded


def leb128(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def unit(kind: int, content: bytes, *, extended: bool = False, sized: bool = True) -> bytes:
    """Return a unit (OBU) of an AV1 stream."""
    head = kind << 3 | (4 if extended else 0) | (2 if sized else 0)
    return bytes([head]) + (b"\xff" if extended else b"") + (leb128(len(content)) if sized else b"") + content


def sequence_header(width: int, height: int, *optional: str, levels: tuple[int, ...] = (5,)) -> bytes:
    """Return a sequence header (AV1 specification, section 5.5); skipped fields are ones, so a misread one shows.

    optional: "timing", "interval", "decoder" and "delay", the parts that it has.
    """
    has = {name: name in optional for name in ("timing", "interval", "decoder", "delay")}
    bits = "1111" + "0"
    bits += f"1{64 * '1'}" if has["timing"] else "0"
    if has["timing"]:
        bits += "1" + "0001" + "111" if has["interval"] else "0"
        bits += f"1{9:05b}{42 * '1'}" if has["decoder"] else "0"
    bits += "1" if has["delay"] else "0"
    bits += f"{len(levels) - 1:05b}"
    for level in levels:
        bits += 12 * "1" + f"{level:05b}" + ("1" if level > 7 else "")
        bits += f"1{21 * '1'}" if has["timing"] and has["decoder"] else ""
        bits += "1" + 4 * "1" if has["delay"] else ""
    bits += f"{11:04b}{9:04b}{width - 1:012b}{height - 1:010b}"
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))


def stream_sizes(stream: bytes, before: bytes = b"") -> list[tuple[int, int]]:
    """Return the sizes in a stream that a track finds by the offset of its chunk."""
    index = hostile.box(b"stco", bytes(4) + struct.pack(">II", 1, len(before)))
    wide = hostile.box(b"co64", bytes(4) + struct.pack(">IQ", 1, len(before)))
    found = [list(coded_sizes(before + stream, each, [])) for each in (index, wide)]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("count", range(5))
def test_every_optional_part_of_a_sequence_header_is_skipped(count: int) -> None:
    for optional in itertools.combinations(("timing", "interval", "decoder", "delay"), count):
        for levels in ((5,), (7, 8), (8, 7, 31)):
            header = sequence_header(3_001, 777, *optional, levels=levels)
            assert stream_sizes(unit(1, header)) == [(3_001, 777)], (optional, levels)


def test_every_sequence_header_of_a_stream_is_read() -> None:
    one, two, three = (sequence_header(100 * n, 10 * n) for n in (1, 2, 3))
    stream = unit(2, b"") + unit(1, one) + unit(15, 300 * b"\xff") + unit(1, two, extended=True)
    stream += unit(6, 128 * b"x", extended=True) + unit(1, three, sized=False)
    assert stream_sizes(stream, b"before") == [(100, 10), (200, 20), (300, 30)]
    assert stream_sizes(unit(1, one) + b"\x8a" + unit(1, two)) == [(100, 10)], "a forbidden bit ends the stream"
    assert stream_sizes(b"\x0a") == []
    assert stream_sizes(b"") == []


def test_a_stream_of_too_many_units_is_refused() -> None:
    header = unit(1, sequence_header(64, 64))
    of_numbers = 20  # in the index and in the header
    assert stream_sizes((99_999 - of_numbers) * unit(2, b"") + header) == [(64, 64)]
    with pytest.raises(ImageError, match="an image file whose structure takes more than 100,000 steps to check"):
        stream_sizes(100_000 * unit(2, b"") + header)


def items_index(version: int, spans: dict[int, list[tuple[int, int]]], *, inside: bool = False, base: int = 3) -> bytes:
    """Return `iloc` with items of these starts and lengths. The numbers of items take more bytes in version 2."""
    number = ">I" if version == 2 else ">H"
    box = bytes([version]) + bytes(3) + b"\x44" + (b"\x42" if version else b"\x40")
    box += struct.pack(number, len(spans))
    for item, extents in spans.items():
        box += struct.pack(number, item) + (struct.pack(">H", inside) if version else b"")
        box += struct.pack(">HIH", 7, base, len(extents))  # data reference, base, number of extents
        for start, length in extents:
            box += (b"\xff\xff" if version else b"") + struct.pack(">II", start - base, length)
    return hostile.box(b"iloc", box)


def item_kind(item: int, kind: bytes, version: int = 2) -> bytes:
    number = struct.pack(">I" if version == 3 else ">H", item)
    return hostile.box(b"infe", bytes([version]) + bytes(3) + number + b"\0\0" + kind)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_items_are_found_by_their_spans(version: int, inside: bool) -> None:
    stream = unit(2, b"") + unit(1, sequence_header(1_000, 500))
    place = 20 if inside and version else 0
    data = bytes(place) + b"abcde" + stream[:4] + b"gap" + stream[4:]
    spans = {5: [(5, 4), (12, len(stream) - 4)], 6: [(5, 4), (12, 0)], 7: [(5, 0)]}
    kinds = item_kind(5, b"av01") + item_kind(6, b"av01", 3) + item_kind(7, b"Exif")
    index = items_index(version, spans, inside=inside) + kinds
    assert list(coded_sizes(data, index, [20])) == 2 * [(1_000, 500)]
    assert list(coded_sizes(data, items_index(version, spans, inside=inside), [20])) == [], "of no known kind"


@pytest.mark.parametrize("kinds", [(b"none", b"av01"), (b"av01", b"none")])
def test_an_item_that_is_listed_twice_counts_with_any_of_its_kinds(kinds: tuple[bytes, bytes]) -> None:
    stream = unit(1, sequence_header(1_000, 500))
    index = items_index(0, {5: [(0, len(stream))]}, base=0) + b"".join(item_kind(5, kind) for kind in kinds)
    assert list(coded_sizes(stream, index, [])) == [(1_000, 500)]
    assert inspect(hostile.avif_of_two_kinds(16_000, 12_000)).width == 16_000


def test_items_are_looked_up_in_every_place_of_data_in_the_index() -> None:
    stream = unit(1, sequence_header(1_000, 500))
    index = items_index(1, {5: [(0, len(stream))]}, inside=True, base=0) + item_kind(5, b"av01")
    assert list(coded_sizes(b"fake" + stream, index, [0, 4])) == [(1_000, 500)]
    media = hostile.box(b"idat", stream)
    file = hostile.avif(hostile.box(b"meta", bytes(4) + hostile.box(b"free", b"idat") + index + media), b"idat")
    assert (inspect(file).width, inspect(file).height) == (1_000, 500)


@pytest.mark.parametrize("name", [b"iloc", b"infe", b"stco", b"ispe"])
def test_boxes_with_a_long_size_are_read(name: bytes) -> None:
    def widened(data: bytes) -> bytes:
        start = data.index(name) - 4
        size = int.from_bytes(data[start : start + 4])
        return data[:start] + struct.pack(">I4sQ", 1, name, size + 8) + data[start + 8 :]

    place, stream = hostile.AVIF_MEDIA, unit(1, sequence_header(1_000, 500))
    index = items_index(0, {5: [(place, len(stream))]}) + item_kind(5, b"av01")
    if name == b"stco":
        index = hostile.box(b"stco", bytes(4) + struct.pack(">II", 1, place))
    elif name == b"ispe":
        index = hostile.box(b"ispe", bytes(4) + struct.pack(">II", 1_000, 500))
    container = inspect(hostile.avif(hostile.box(b"moov", widened(index)), stream))
    assert (container.width, container.height) == (1_000, 500)


def test_items_that_share_their_data_too_often_are_refused() -> None:
    stream = unit(1, sequence_header(64, 64))
    kinds = b"".join(item_kind(item, b"av01") for item in range(5))
    four, five = (items_index(0, {item: [(0, len(stream))] for item in range(n)}, base=0) for n in (4, 5))
    assert list(coded_sizes(stream, four + kinds, [])) == 4 * [(64, 64)]
    with pytest.raises(ImageError, match="an AVIF file whose items overlap"):
        list(coded_sizes(stream, five + kinds, []))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_parts_of_items_need_room_in_the_index(version: int) -> None:
    stream = unit(1, sequence_header(64, 64))
    located = items_index(version, {7: [(0, 4), (4, len(stream) - 4)]}, base=0)
    assert list(coded_sizes(stream, located + item_kind(7, b"av01"), [])) == [(64, 64)]
    short = struct.pack(">I", len(located) - 1) + located[4:]
    with pytest.raises(ImageError, match="an AVIF file with more parts of items than its index has room for"):
        list(coded_sizes(stream, short + item_kind(7, b"av01"), []))
    for extents in (1, 2):  # of no bytes
        number = ">I" if version == 2 else ">H"
        items = struct.pack(number, 1) + struct.pack(number, 7) + (b"\0\0" if version else b"")
        index = hostile.box(b"iloc", bytes([version]) + bytes(5) + items + struct.pack(">HH", 0, extents))
        if extents == 1:
            assert list(coded_sizes(stream, index + item_kind(7, b"av01"), [])) == [(64, 64)]
        else:
            with pytest.raises(ImageError, match="an AVIF file with more parts of items than its index has room for"):
                list(coded_sizes(stream, index + item_kind(7, b"av01"), []))


@pytest.mark.parametrize(
    ("mode", "subsampling", "planes"),
    [
        ("RGB", "4:2:0", 1.5),
        ("RGB", "4:2:2", 2.0),
        ("RGB", "4:4:4", 3.0),
        ("RGBA", "4:4:4", 4.0),
        ("RGB", "4:0:0", 1.0),
    ],
)
def test_memory_of_an_avif_follows_its_planes(mode: str, subsampling: str, planes: float) -> None:
    data = encoded(Image.new(mode, (40, 33)), "AVIF", speed=10, subsampling=subsampling)
    assert inspect(data).bytes_per_pixel == planes + 9
    deep = data.index(b"av1C") + 6
    assert inspect(data[:deep] + bytes([data[deep] | 0x40]) + data[deep + 1 :]).bytes_per_pixel == 2 * planes + 9
    assert inspect(data.replace(b"av1C", b"none")).bytes_per_pixel == 8 + 9
    start = data.index(b"meta") - 4
    gray = hostile.box(b"meta", bytes(4) + hostile.box(b"av1C", b"\x81\0\x1c\0"))
    assert inspect(data[:start] + gray + data[start:]).bytes_per_pixel == planes + 9, "the largest counts"


def test_boxes_of_any_form_are_passed_on() -> None:
    data = encoded(Image.new("RGB", (40, 33)), "AVIF", speed=10)
    wide = struct.pack(">I4sQ", 1, b"free", 24) + 8 * b"w"
    to_the_end = bytes(4) + b"free" + b"rest"
    container = inspect(data + wide + struct.pack(">I4s", 8, b"free") + to_the_end)
    assert container.data == data + wide + struct.pack(">I4s", 8, b"free") + to_the_end
    assert (container.width, container.height) == (40, 33)
    boxes = struct.pack(">I4s", 8, b"free")
    count = data.count(b"ftyp") + data.count(b"meta") + data.count(b"mdat")
    assert inspect(data + (999 - count) * boxes).width == 40
    assert refusal(data + 1_000 * boxes) == (ImageFault.HOSTILE, "refused: more than 1,000 boxes")
    assert refusal(data.replace(b"meta", b"free"))[1] == "broken or truncated: an AVIF file without an index"


@pytest.mark.parametrize("declared", [(500, 100), (100, 400), (301, 200)])
def test_the_size_of_an_avif_is_that_of_most_pixels(declared: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", (300, 200)), "AVIF", speed=10)
    place = data.index(b"ispe") + 8
    other = data[:place] + struct.pack(">II", *declared) + data[place + 8 :]
    assert (inspect(other).width, inspect(other).height) == max(
        declared, (300, 200), key=lambda size: size[0] * size[1]
    )
    unknown = data.replace(b"ispe", b"none").replace(b"infe", b"none")
    assert (inspect(unknown).width, inspect(unknown).height) == (0, 0)
