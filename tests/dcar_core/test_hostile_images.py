"""Files that would exhaust a decoder are refused at once, and metadata never costs anything."""

import io
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dcar_core.images import ALL_FORMATS, WEB_FORMATS, ImageFormat, inspect, open_image, sniff_format
from dcar_core.images.isobmff import coded_sizes
from dcar_core.images.jpeg import MAX_SCANS
from dcar_core.util.errors import ImageError, ImageFault
from tests.support import hostile_images as hostile
from tests.support.images import encoded
from tests.support.parts import needs
from tests.support.processes import peak_memory

REFUSED = {
    "scans": lambda: hostile.jpeg_with_scans(10_000),
    "exif segments": lambda: hostile.jpeg_with_segments(100_000),
    "comments": lambda: hostile.jpeg_with_segments(1_000_000, 0xFE, b""),
    "quantisation tables": lambda: hostile.jpeg_with_segments(1_900, 0xDB, b"\0" + bytes(64)),
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "png data": lambda: hostile.png_with_chunks(1_000_000),
    "png text": lambda: hostile.png_with_chunks(1_000_000, b"tEXt", b""),
    "gif comment": lambda: hostile.gif_with_comment_blocks(5_000_000),
    "gif frame": lambda: hostile.gif_of_frame(20_000, 20_000),
    "webp chunks": lambda: hostile.webp_with_chunks(1_000_000),
    "webp canvas": lambda: hostile.webp_of_size(9_000, 8_000),
    "avif index": lambda: hostile.avif_with_index(10_000_000),
    "avif frame": lambda: hostile.avif_of_frame(16_000, 16_000),
    "avif stream": lambda: hostile.avif_of_frame(16_000, 16_000, is_still=False),
    "avif extents": lambda: hostile.avif_of_extents(30),
    "avif chunks": lambda: hostile.avif_of_chunks(80),
    "avif streams": lambda: hostile.avif_of_streams(80),
    "avif headers": lambda: hostile.avif_of_headers(99_000),
    "tiff tile": lambda: hostile.tiff_with_tile(37_000),
    "tiff tags": lambda: hostile.tiff_with_tags(5_000),
    "bmp runs": lambda: hostile.bmp_of_runs(5_000_000),
    "pixels": lambda: hostile.png_of_size(60_000, 60_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_within_a_second(name: str) -> None:
    data = REFUSED[name]()
    started = time.thread_time()
    with pytest.raises(ImageError) as caught:
        open_image(data, at_least=560)
    assert time.thread_time() - started < 1.0  # the check takes 0.04 at most, decoders took 4 to 14
    assert caught.value.fault in {ImageFault.HOSTILE, ImageFault.TOO_LARGE, ImageFault.BROKEN}


def test_a_large_index_of_an_avif_file_is_refused_before_it_is_searched() -> None:
    with pytest.raises(ImageError, match="an AVIF file with an index of 10,000,") as caught:
        inspect(hostile.avif_with_index(10_000_000))
    assert caught.value.fault == ImageFault.HOSTILE


@pytest.mark.parametrize("name", ["avif extents", "avif chunks", "avif streams", "avif headers"])
def test_the_work_of_checking_an_avif_is_limited(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        inspect(REFUSED[name]())
    assert caught.value.fault == ImageFault.HOSTILE


@pytest.mark.parametrize("name", [b"ispe", b"infe", b"iloc", b"stco", b"co64"])
def test_boxes_of_an_avif_are_limited(name: bytes) -> None:
    assert inspect(hostile.avif_of_boxes(name, 1_000)).width == 0
    with pytest.raises(ImageError) as caught:
        inspect(hostile.avif_of_boxes(name, 200_000))
    assert caught.value.fault == ImageFault.HOSTILE


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it")
@pytest.mark.parametrize("name", ["gif comment", "tiff tile", "comments", "png text"])
@pytest.mark.slow
def test_a_hostile_file_takes_no_memory_beyond_its_own(name: str, tmp_path: Path) -> None:
    assert peak_memory(REFUSED[name](), "refused", tmp_path) < 32 * 2**20


@pytest.mark.parametrize(
    "make",
    [
        lambda: hostile.jpeg_with_exif(hostile.exif_of_large_tags(5_000, 60_000)[:65_000]),
        lambda: hostile.png_with_profile(1_000_000),
        lambda: hostile.png_with_chunks(900, b"zTXt", b"x\0\0" + bytes(20)),
        lambda: hostile.tiff_with_tags(900),
    ],
)
def test_metadata_is_not_parsed(make: Callable[[], bytes], capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_image(make()).size == (16, 16)
    assert not caught
    assert capfd.readouterr().err == ""


def test_a_jpeg_with_as_many_scans_as_are_accepted_is_read() -> None:
    data = hostile.jpeg_with_scans(MAX_SCANS - 10, side=64)
    assert open_image(data).size == (64, 64)
    with pytest.raises(ImageError, match="more than 100 scans"):
        open_image(hostile.jpeg_with_scans(MAX_SCANS, side=64))


def test_scans_are_counted_in_the_first_image_alone() -> None:
    """A trailer, such as the film of a moving photo, may hold anything."""
    assert open_image(encoded(Image.new("RGB", (16, 16)), "JPEG") + 500 * b"\xff\xda").size == (16, 16)


def noise(mode: str, side: int = 33) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side + 7, 4), dtype=np.uint8)
    return Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"quality": 95, "subsampling": 0, "comment": b"taken by hand"}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"restart_marker_blocks": 2}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("GIF", "P", {"comment": b"drawn by hand"}),
        ("WEBP", "RGB", {"lossless": True}),
        ("AVIF", "RGB", {"speed": 10}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("TIFF", "YCbCr", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"big_tiff": True, "compression": "zstd"}),
        ("BMP", "RGB", {}),
    ],
)
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_an_honest_file_is_decoded_as_pillow_does(
    kind: str, mode: str, options: dict[str, object], orientation: int | None
) -> None:
    if orientation is not None and kind not in {"GIF", "BMP"}:
        exif = Image.Exif()
        exif[0x010E], exif[0x0112] = "a description", orientation
        options = {**options, "exif": exif, "icc_profile": b"p" * 5_000}
    data = encoded(noise(mode), kind, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    container = inspect(data)
    assert (container.width, container.height) == noise(mode).size
    if kind != "AVIF":  # whose boxes state it
        assert container.orientation == (1 if kind in {"GIF", "BMP"} else orientation or 1)
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))
    assert sniff_format(data) == ImageFormat(kind.lower())


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        red, _, blue = open_image(data).getpixel((4, 4))  # type: ignore[misc]
        assert red > 200 > 50 > blue, kind


def test_formats_that_are_not_accepted_are_named() -> None:
    data = encoded(Image.new("RGB", (4, 4)), "TIFF")
    assert inspect(data, ALL_FORMATS).format == ImageFormat.TIFF
    with pytest.raises(ImageError, match="TIFF images are not accepted here; convert it to one of AVIF, GIF") as caught:
        inspect(data, WEB_FORMATS)
    assert caught.value.fault == ImageFault.UNSUPPORTED


def test_pillow_keeps_its_own_limit() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(hostile.png_of_size(60_000, 60_000)))


def test_a_limit_above_pillows_own_applies() -> None:
    """Neither a warning, which would be an error here, nor Pillow's refusal."""
    data = encoded(Image.new("1", (15_000, 12_500)), compress_level=1)
    assert 2 * Image.MAX_IMAGE_PIXELS < 15_000 * 12_500  # type: ignore[operator]
    assert open_image(data, max_pixels=200_000_000, at_least=100).size == (120, 100)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it")
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
        ("PNG", "RGBA", {"compress_level": 1}),
        ("GIF", "P", {}),
        ("WEBP", "RGBA", {"quality": 50, "method": 0}),
        ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
        ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_decoding_takes_no_more_memory_than_estimated(
    kind: str, mode: str, options: dict[str, object], tmp_path: Path
) -> None:
    small = np.random.default_rng(0).integers(0, 256, (375, 375, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(small).resize((3_000, 3_000)).convert(mode), kind, **options)
    assert peak_memory(data, "fast", tmp_path) < 4 * inspect(data).cost + 2 * len(data) + 24 * 2**20


@needs("heic")
def test_heic_is_read_with_its_extra_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import pillow_heif

    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((96, 64))
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    data = buffer.getvalue()
    assert inspect(data).format == ImageFormat.HEIF
    assert np.abs(np.asarray(open_image(data)).astype(int) - np.asarray(image)).mean() < 8
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"pip install 'dcar\[heic\]'") as caught:
        open_image(data)
    assert caught.value.fault == ImageFault.MISSING_DECODER


def test_the_coded_frame_of_an_avif_counts_if_it_is_larger_than_the_declared_size() -> None:
    data = encoded(Image.new("RGB", (300, 200)), "AVIF", speed=10)
    declared = data.index(b"ispe") + 8
    small = data[:declared] + 2 * (16).to_bytes(4) + data[declared + 8 :]
    assert (inspect(small).width, inspect(small).height) == (300, 200)
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    moving = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert list(coded_sizes(moving, moving, []))[:1] == [(30, 20)]
