"""Honest files of every format are decoded as Pillow does, and take the memory that is expected."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dcar_core.images import ImageFormat, OpenedImage, open_image, sniff_format
from dcar_core.util.errors import ImageError, ImageFault
from tests.support.hostile_images import png_of_size, png_with_profile
from tests.support.images import encoded
from tests.support.parts import needs
from tests.support.processes import peak_memory


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
    assert OpenedImage(data).upright_size == expected.size
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))
    assert sniff_format(data) == ImageFormat(kind.lower())


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        red, _, blue = open_image(data).getpixel((4, 4))  # type: ignore[misc]
        assert red > 200 > 50 > blue, kind


def test_a_large_colour_profile_is_honest() -> None:
    assert open_image(png_with_profile(8_000_000)).size == (16, 16)


def test_pillow_keeps_its_own_limit() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(png_of_size(60_000, 60_000)))


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
def test_decoding_takes_no_more_memory_than_expected(
    kind: str, mode: str, options: dict[str, object], tmp_path: Path
) -> None:
    small = np.random.default_rng(0).integers(0, 256, (375, 375, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(small).resize((3_000, 3_000)).convert(mode), kind, **options)
    assert peak_memory(data, "fast", tmp_path) < OpenedImage(data).memory + 2 * len(data) + 24 * 2**20


@needs("heic")
def test_heic_is_read_with_its_extra_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    import pillow_heif

    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((96, 64))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(image.rotate(90, expand=True)).save(buffer, quality=90, exif=exif.tobytes())
    data = buffer.getvalue()
    assert (OpenedImage(data).format, OpenedImage(data).upright_size) == (ImageFormat.HEIF, image.size)
    assert np.abs(np.asarray(open_image(data)).astype(int) - np.asarray(image)).mean() < 8
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"pip install 'dcar\[heic\]'") as caught:
        open_image(data)
    assert caught.value.fault == ImageFault.MISSING_DECODER
