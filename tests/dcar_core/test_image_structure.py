"""The check of an image file's structure: sizes, kept parts and exact limits, without any decoding."""

import io
import struct

import pytest
from PIL import Image

from dcar_core.images import inspect, open_image
from dcar_core.images.jpeg import MAX_SEGMENTS
from dcar_core.images.tiff import MAX_TAGS, MAX_VALUES, exif_orientation
from dcar_core.util.errors import ImageFault
from tests.support import hostile_images as hostile
from tests.support.hostile_images import refusal
from tests.support.images import encoded


@pytest.mark.parametrize(
    ("mode", "options", "bytes_per_pixel"),
    [
        ("RGB", {}, 0.25),
        ("RGB", {"progressive": True, "subsampling": 0}, 0.25 + 2 * 3),
        ("RGB", {"progressive": True, "subsampling": 2}, 0.25 + 2 * 1.5),
        ("L", {"progressive": True}, 0.25 + 2),
    ],
)
def test_memory_of_a_jpeg_follows_its_coefficients(
    mode: str, options: dict[str, object], bytes_per_pixel: float
) -> None:
    assert inspect(encoded(Image.new(mode, (40, 33)), "JPEG", **options)).bytes_per_pixel == bytes_per_pixel


def test_a_sequential_jpeg_of_several_scans_holds_its_coefficients() -> None:
    data = encoded(Image.new("RGB", (40, 33)), "JPEG", subsampling=0)
    scan = data.index(b"\xff\xda")
    first = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    assert inspect(data[:scan] + first + data[scan + 14 :]).bytes_per_pixel == 0.25 + 2 * 3


def test_segments_of_a_jpeg_are_limited() -> None:
    assert inspect(hostile.jpeg_with_segments(MAX_SEGMENTS - 10, 0xE5, b"x")).width == 16
    fault, told = refusal(hostile.jpeg_with_segments(MAX_SEGMENTS, 0xFE, b"x"))
    assert (fault, told) == (ImageFault.HOSTILE, "refused: a JPEG with more than 2,000 segments before its image data")
    tables = [hostile.jpeg_with_segments(count, 0xDB, b"\0" + bytes(64)) for count in (940, 950)]  # of 69 bytes each
    assert inspect(tables[0]).width == 16
    assert refusal(tables[1]) == (ImageFault.HOSTILE, "refused: a JPEG with more than 64 KB of tables")
    data = encoded(Image.new("L", (16, 16)), "JPEG")
    comment = b"\xff\xfe\0\x03x"
    assert inspect(data[:-2] + (MAX_SEGMENTS - 3) * comment + data[-2:]).width == 16
    fault, told = refusal(data[:-2] + MAX_SEGMENTS * comment + data[-2:])
    assert (fault, told) == (ImageFault.HOSTILE, "refused: a JPEG with more than 2,000 segments between its scans")


def test_a_jpeg_is_read_around_fill_bytes_and_rubbish() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (40, 33)), "JPEG", exif=exif.tobytes(), comment=b"by hand")
    container = inspect(data[:2] + b"\xff\xff\xff\x01rubbish\xff\xd0" + data[2:])
    plain = inspect(data)
    assert (container.data, container.width, container.height) == (plain.data, 40, 33)
    assert (container.orientation, plain.orientation) == (6, 6)
    assert b"by hand" not in plain.data
    assert b"Exif" not in plain.data
    assert b"JFIF" in inspect(encoded(Image.new("RGB", (40, 33)), "JPEG")).data
    assert b"Adobe" in inspect(encoded(Image.new("CMYK", (40, 33)), "JPEG")).data


def test_a_jpeg_without_image_data_or_frame_is_broken() -> None:
    data = encoded(Image.new("RGB", (40, 33)), "JPEG")
    scan, frame = data.index(b"\xff\xda"), data.index(b"\xff\xc0")
    for cut in (data[:scan], data[: scan + 3], data[:scan] + b"\xff\xd9", data[:scan] + b"\xff\xff"):
        assert refusal(cut) == (ImageFault.BROKEN, "broken or truncated: a JPEG without image data")
    assert inspect(data[: scan + 4]).width == 40, "the decoder finds the rest missing"
    without = data[:frame] + data[frame + 2 + int.from_bytes(data[frame + 2 : frame + 4]) :]
    assert refusal(without) == (ImageFault.BROKEN, "broken or truncated: a JPEG without a frame header")


def test_chunks_of_a_png_and_a_webp_are_limited_by_size() -> None:
    assert inspect(hostile.png_with_chunks(950)).width == 16
    assert refusal(hostile.png_with_chunks(1_020))[1].startswith("refused: a PNG with more than 1,01")
    assert inspect(hostile.png_with_chunks(1_500, data=bytes(1_100))).width == 16, "of a kilobyte each"
    assert inspect(hostile.webp_with_chunks(950)).width == 16
    assert refusal(hostile.webp_with_chunks(1_020))[1].startswith("refused: a WebP file with more than 1,00")


def test_a_png_with_a_second_header_is_refused() -> None:
    data, large = encoded(Image.new("RGB", (40, 33))), hostile.png_of_size(2_000, 2_000)[8:33]
    for place in (33, len(data) - 12):  # before and behind the image data
        told = "refused: a PNG with a second header"
        assert refusal(data[:place] + large + data[place:]) == (ImageFault.HOSTILE, told)
    assert inspect(data + large).data == data, "nothing behind the end is read"


def test_metadata_of_a_png_is_removed_and_its_first_orientation_read() -> None:
    six, three = Image.Exif(), Image.Exif()
    six[0x0112], three[0x0112] = 6, 3
    data = encoded(Image.new("RGB", (40, 33)))
    chunks = b"".join(hostile.png_chunk(b"eXIf", each.tobytes()[6:]) for each in (six, three))
    container = inspect(data[:33] + chunks + data[33:] + b"trailer")
    assert (container.data, container.orientation) == (data, 6)
    assert refusal(data[:32]) == (ImageFault.BROKEN, "broken or truncated: a PNG without a header")
    assert refusal(data[:12] + b"JUNK" + data[16:])[1] == "broken or truncated: a PNG without a header"


def test_headers_of_a_webp_that_are_cut_off_are_broken() -> None:
    for options in ({"lossless": True}, {}, {"exif": b"Exif\0\0II*\0"}):
        data = encoded(Image.new("RGB", (40, 33)), "WEBP", **options)
        assert (inspect(data).width, inspect(data).height) == (40, 33)
        assert refusal(data[:24])[0] == ImageFault.BROKEN
        assert refusal(data[:12] + b"VP9 " + data[16:])[0] == ImageFault.BROKEN


def test_the_canvas_of_a_gif_holds_its_first_frame() -> None:
    colour = bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 5, 7, 300, 20, 0) + b"\x02\x02\x44\x01\0;"
    head = b"GIF89a" + struct.pack("<HHBBB", 16, 400, 0x80, 0, 0) + colour
    control, comment = b"\x21\xf9\x04\x01\0\0\0\0", b"\x21\xfe\x03one\x02is\0"
    container = inspect(head + comment + control + comment + frame)
    assert container.data == head + control + frame
    assert (container.width, container.height) == (305, 400)
    plain = b"GIF89a" + struct.pack("<HHBBB", 500, 16, 0, 0, 0)
    assert (inspect(plain + frame).width, inspect(plain + frame).height) == (500, 27)
    assert refusal(head[:12]) == (ImageFault.BROKEN, "broken or truncated: a GIF without a header")
    assert refusal(head + comment + frame[:9]) == (ImageFault.BROKEN, "broken or truncated: a GIF without a frame")
    assert inspect(head + b"\x21\xfe" + 9_999 * b"\x01c" + b"\0" + frame).width == 305
    many = "refused: a GIF with more than 10,000 blocks before its first frame"
    assert refusal(head + b"\x21\xfe" + 10_000 * b"\x01c" + b"\0" + frame) == (ImageFault.HOSTILE, many)
    assert refusal(head + 10_001 * b"\0" + frame) == (ImageFault.HOSTILE, many)


def test_an_empty_extension_of_a_gif_hides_no_frame() -> None:
    def frame(side: int) -> bytes:
        return b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\0"

    small, large = frame(1).ljust(45, b"x") + b"\0", frame(2_000)  # 0x2c, the mark of a frame, is also a length of 44
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    assert inspect(head + b"\x21\xf9\0" + small + large + b";").data == head + small + large + b";"


def _long(value: int) -> tuple[int, int, bytes]:
    return (4, 1, struct.pack("<L", value))


def test_tags_of_a_tiff_are_limited() -> None:
    size = {256: _long(40), 257: _long(33)}
    private = {40_000 + i: _long(i) for i in range(MAX_TAGS)}
    container = inspect(hostile.tiff(size | {k: private[k] for k in list(private)[: MAX_TAGS - 2]}))
    assert (container.width, container.height) == (40, 33)
    assert struct.unpack_from("<H", container.data, 8) == (2,), "the private ones are removed"
    assert refusal(hostile.tiff(size | private))[1].startswith("refused: a TIFF file with 1,002 tags")
    many = (3, MAX_VALUES + 1, bytes(4))
    assert refusal(hostile.tiff(size | {273: many}))[1] == "refused: a TIFF file with a tag of more than 262,144 values"
    room = bytes(2 * MAX_VALUES + 100)
    assert inspect(hostile.tiff(size | {273: (3, MAX_VALUES, bytes(4))}, room)).width == 40
    assert inspect(hostile.tiff(size | {347: (7, MAX_VALUES + 1, bytes(4))}, room)).width == 40, "bytes stay bytes"
    assert refusal(hostile.tiff(size | {273: (12, 100, bytes(4))}))[1].endswith("more data in its tags than it has")
    assert inspect(hostile.tiff(size | {50_000: many})).width == 40, "no decoder reads it"


def test_tiles_of_a_tiff_may_be_a_little_larger_than_the_image() -> None:
    def tiled(side: int, tile: int) -> bytes:
        return hostile.tiff({256: _long(side), 257: _long(side), 322: _long(tile), 323: _long(tile)})

    assert inspect(tiled(16, 2_048)).width == 16, "any of four megapixels"
    told = "refused: a TIFF file of 16 x 16 pixels in tiles of 2049 x 2049"
    assert refusal(tiled(16, 2_049)) == (ImageFault.HOSTILE, told)
    assert inspect(tiled(3_000, 4_242)).width == 3_000
    assert refusal(tiled(3_000, 4_243))[0] == ImageFault.HOSTILE


@pytest.mark.parametrize(("kind", "layout"), [(3, "<H"), (4, "<L"), (8, "<h"), (9, "<l"), (13, "<L")])
def test_tiles_of_a_tiff_are_compared_whatever_their_type(kind: int, layout: str) -> None:
    side = (kind, 1, struct.pack(layout, 12_000).ljust(4, b"\0"))
    told = "refused: a TIFF file of 16 x 16 pixels in tiles of 12000 x 12000"
    assert refusal(hostile.tiff({256: _long(16), 257: _long(16), 322: side, 323: side}))[1] == told


@pytest.mark.parametrize("number", [256, 257, 322, 323])
def test_a_side_of_a_tiff_is_one_positive_integer(number: int) -> None:
    told = "refused: a TIFF file with a side that is not a number of pixels"
    sides = {side: _long(16) for side in (256, 257, 322, 323)}
    for kind, count, value in ((4, 2, 16), (11, 1, 16), (16, 1, 16), (17, 1, 16), (4, 1, 0), (9, 1, 2**32 - 16)):
        other = (kind, count, struct.pack("<L", value))
        assert refusal(hostile.tiff(sides | {number: other}, bytes(64))) == (ImageFault.HOSTILE, told)
    for kind in (1, 3, 4, 6, 8, 9, 13):
        assert inspect(hostile.tiff(sides | {number: (kind, 1, b"\x10\0\0\0")})).width == 16


@pytest.mark.parametrize("number", [256, 257, 277, 322, 323])
def test_a_tag_of_a_tiff_that_is_there_twice_is_refused(number: int) -> None:
    tags = [256, 257, 258, 277, 322, 323]
    entries = [struct.pack("<HHLL", tag, 4, 1, 16) for tag in sorted([*tags, number])]
    data = struct.pack("<2sHLH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    assert refusal(data) == (ImageFault.HOSTILE, "refused: a TIFF file with a tag that is there twice")
    private = hostile.tiff({256: _long(40), 257: _long(33), 50_000: _long(1), 50_001: _long(1)})
    assert inspect(private.replace(struct.pack("<H", 50_001), struct.pack("<H", 50_000))).width == 40


def test_broken_directories_of_a_tiff_are_named() -> None:
    whole = hostile.tiff({256: _long(40), 257: _long(33)})
    assert refusal(whole[:30])[1] == "broken or truncated: a TIFF file without a complete directory"
    beyond = whole[:4] + struct.pack("<L", len(whole) + 1) + whole[8:]
    assert refusal(beyond)[1] == "broken or truncated: a TIFF file without its directory"
    for order, mark in (("<", b"II"), (">", b"MM")):
        big = mark + struct.pack(order + "HHHQQ", 43, 8, 0, 16, 2)
        big += struct.pack(order + "HHQL4x", 256, 4, 1, 40) + struct.pack(order + "HHQQ", 257, 16, 1, 33)
        container = inspect(big + bytes(8))
        assert (container.width, container.height) == (40, 33)


@pytest.mark.parametrize(("stated", "read"), [(1, 1), (8, 8), (0, 1), (9, 1)])
def test_only_known_orientations_count(stated: int, read: int) -> None:
    assert exif_orientation(hostile.tiff({271: (2, 4, b"abc\0"), 274: (3, 1, struct.pack("<HH", stated, 0))})) == read
    for kind in (1, 3, 4, 13):
        assert exif_orientation(hostile.tiff({274: (kind, 1, b"\6\0\0\0")})) == 6
    assert exif_orientation(b"none") == 1
    assert exif_orientation(hostile.tiff({274: (2, 1, b"\6\0\0\0")})) == 1, "a text is no number"


def test_a_bmp_of_os_2_is_read() -> None:
    rows = b"".join(bytes([10 * row] * 15).ljust(16, b"\1") for row in range(3))
    data = struct.pack("<2sIHHI", b"BM", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, 5, 3, 1, 24) + rows
    assert (inspect(data).width, inspect(data).height) == (5, 3)
    assert [open_image(data).getpixel((4, row)) for row in range(3)] == [(20, 20, 20), (10, 10, 10), (0, 0, 0)]
    assert inspect(data[:26]).width == 5
    assert refusal(data[:25]) == (ImageFault.BROKEN, "broken or truncated: a BMP file without a header")
    assert inspect(data[:30] + b"\1\0\0\0" + bytes(2**20)).width == 5, "it has no run lengths"


def test_run_lengths_of_a_bmp_are_limited() -> None:
    buffer = io.BytesIO()
    Image.new("P", (40, 33)).save(buffer, "BMP")
    data = buffer.getvalue()
    assert (inspect(data).width, inspect(data).height) == (40, 33)
    top_down = data[:22] + struct.pack("<i", -33) + data[26:]
    assert inspect(top_down).height == 33
    assert inspect(data[:34]).width == 40
    assert refusal(data[:33]) == (ImageFault.BROKEN, "broken or truncated: a BMP file without a header")
    for kind, refused in ((0, False), (1, True), (2, True), (3, False)):
        packed = data[:30] + struct.pack("<I", kind) + data[34:]
        assert inspect(packed.ljust(2**20, b"\0")).width == 40
        large = packed.ljust(2**20 + 1, b"\0")
        if refused:
            assert refusal(large) == (ImageFault.HOSTILE, "refused: a run-length encoded BMP file of more than 1 MB")
        else:
            assert inspect(large).width == 40
