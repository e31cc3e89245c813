"""Image files to RGB: formats, modes, transparency, tiles and memory; images in folders and tars."""

import io
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dcar_core.data.image_lookup import ImageFinder
from dcar_core.images import ImageFormat, ImageRoot, OpenedImage, colours, files, index_tar, open_image, sniff_format
from dcar_core.util.errors import DataError, ImageError, ImageFault
from tests.support.files import write_file
from tests.support.hostile_images import png_of_size, png_with_profile
from tests.support.images import encoded, peak_memory
from tests.support.parts import needs


def whole(image: Image.Image) -> np.ndarray:
    """Convert a transparent or deep image to RGB in one piece."""
    if image.mode in {"I;16", "I;16B", "I", "F"}:
        values = np.asarray(image, np.float64)
        top = 65535.0 if image.mode != "F" else max(1.0, float(np.nanmax(values)))
        gray = np.nan_to_num(np.clip(values / top, 0, 1)) * 255
        return np.repeat(gray.round()[:, :, None], 3, axis=2).astype(int)
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")).astype(int)


def deep_or_clear(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    deep = rng.integers(0, 65536, (height, width), dtype=np.uint16)
    if mode == "I;16":
        return Image.fromarray(deep)
    if mode == "I;16B":
        return Image.frombytes("I;16B", (width, height), deep.astype(">u2").tobytes())
    if mode == "I":
        return Image.fromarray(deep.astype(np.int32) * 2 - 30_000)
    if mode == "F":
        values = deep.astype(np.float32) / 20_000
        values[0, 0] = np.nan
        return Image.fromarray(values)
    if mode == "RGB":
        keyed = rgba.convert(mode)
        keyed.paste((1, 2, 3), (0, 0, width // 2, height))
        keyed.info["transparency"] = (1, 2, 3)
        return keyed
    if mode == "P":
        palette = rgba.convert("RGB").quantize(32)
        palette.info["transparency"] = bytes(range(0, 256, 8))
        return palette
    return rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "I;16"])
def test_the_transparent_colour_of_a_png_is_drawn_white(mode: str) -> None:
    drawn = np.zeros((64, 96), bool)
    drawn[8:24, 40:80] = True
    deep = np.where(drawn, 1000, 0).astype(np.uint16)
    image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(drawn).convert(mode)
    data = encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    expected = np.where(drawn & (mode == "I;16"), 1000 // 257 + 1, 255)
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (Path("none.png"), "no such file"),
        (b"", "empty"),
        (b"hello", "not an image"),
        (encoded(Image.effect_noise((64, 64), 50))[:-600], "broken or truncated"),
        (png_of_size(20_000, 20_000), "20000 x 20000 pixels"),
    ],
)
def test_unreadable_files_are_refused_with_the_reason(data: bytes | Path, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(data)


def test_images_are_read_from_folders_and_tars(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (4, 4), "red"))
    write_file(tmp_path / "sub" / "a.png", data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        member = tarfile.TarInfo("b.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        again = tarfile.TarInfo("./c.png")  # as tar packs a hard link
        again.type, again.linkname = tarfile.LNKTYPE, "b.png"
        tar.addfile(again)
    root = ImageRoot(tmp_path)
    assert root.read("sub/a.png") == root.read("b.png") == root.read("c.png") == data
    with pytest.raises(ImageError, match=r"no file d\.png"):
        root.read("d.png")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="uncompressed"):
        ImageRoot(tmp_path)


def test_members_that_several_tars_have_are_known_by_their_tar_alone(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes("1.png", f"{shard}.png", fill=shard.encode()))
    root = ImageRoot(tmp_path)
    assert root.names() == ["a.png", "a.tar/1.png", "b.png", "b.tar/1.png"]
    assert [name for name in ("1.png", "a.png", "a.tar/a.png", "b.tar/1.png") if name not in root] == ["1.png"]
    assert (root.read("a.tar/1.png")[:1], root.read("b.tar/1.png")[:1]) == (b"a", b"b")
    with pytest.raises(ImageError, match=r"no file 1\.png"):
        root.read("1.png")
    finder, names = ImageFinder(root, frozenset()), ("1.png", "other/1.png", "other/a.png", "b.tar/1.png")
    assert [finder.find(name) for name in names] == [None, None, "a.png", "b.tar/1.png"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize("tile", [2**18, 1000, 50])
def test_image_in_tiles_equals_the_one_in_one_piece(mode: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colours, "TILE_PIXELS", tile)
    for width, height in ((131, 97), (300, 1), (1, 300)):
        image = deep_or_clear(mode, width, height)
        np.testing.assert_array_equal(np.asarray(open_image(image)), whole(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16", "F"])
def test_large_image_is_averaged_when_reduced(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = deep_or_clear(mode, 131, 97)
    assert open_image(image, at_least=10).size == (131, 97)  # not large
    monkeypatch.setattr(colours, "LARGE_PIXELS", 131 * 97 - 1)
    monkeypatch.setattr(colours, "TILE_PIXELS", 1000)
    for at_least, factor in ((10, 9), (31, 3), (49, 1)):
        found = np.asarray(open_image(image, at_least=at_least)).astype(int)
        averaged = np.asarray(Image.fromarray(whole(image).astype(np.uint8)).reduce(factor))
        assert min(found.shape[:2]) >= at_least
        assert np.abs(found - averaged).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
@pytest.mark.parametrize(("mode", "own"), [("RGBA", 4), ("I;16", 2), ("F", 4)])
def test_large_image_is_in_memory_once(mode: str, own: int, tmp_path: Path) -> None:
    side = 4000
    plain = {
        "RGBA": Image.new("RGBA", (side, side), (1, 2, 3, 9)),
        "I;16": Image.fromarray(np.full((side, side), 30_000, np.uint16)),
        "F": Image.fromarray(np.full((side, side), 0.5, np.float32)),
    }
    data = encoded(plain[mode], "TIFF" if mode == "F" else "PNG")
    room = 30 * 2**20 + (len(data) if mode == "F" else 0)
    assert peak_memory(data, "fast", tmp_path) < own * side**2 + room
    assert peak_memory(data, "exact", tmp_path) < (own + 4) * side**2 + room


def tar_bytes(*names: str, fill: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 700  # with its header 1536 bytes
            tar.addfile(member, io.BytesIO(fill * 700))
    return buffer.getvalue()


TAR = tar_bytes(*(f"pic{i}.p" for i in range(5)))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TAR[:3082] + b"?" + TAR[3083:], r"t\.tar has data after pic1\.p, .* byte 3,072"),
        (TAR[: 3072 + 300], r"t\.tar has data after pic1\.p, .* byte 3,072"),
        (TAR[:3072] + bytes(512) + TAR[3584:], r"t\.tar has data after pic1\.p, .* byte 3,072"),
        (TAR + tar_bytes("more.p"), r"t\.tar has data after pic4\.p, .* byte 7,680.* two tars were concatenated"),
        (TAR[:4000], "unexpected end of data"),
    ],
)
def test_tar_with_data_after_its_end_is_refused(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(DataError, match=says):
        index_tar(tmp_path / "t.tar")
    with pytest.raises(DataError, match=says):
        index_tar("memory://t.tar", io.BytesIO(data))


def test_tar_with_sparse_files_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "4096"}  # as `tar -S` writes it
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match=r"t\.tar has a\.png as a sparse file; create it again without tar's option -S"):
        index_tar(tmp_path / "t.tar")


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.size": "zz"},
        {"GNU.sparse.map": "1,abc", "GNU.sparse.size": "3"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "abc"},
        {"size": "99999999999999999999"},
        {"size": "-5"},
    ],
    ids=str,
)
def test_tar_with_odd_headers_is_refused(headers: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.pax_headers, member.size = headers, 3
        tar.addfile(member, io.BytesIO(b"abc"))
    for file in (None, io.BytesIO((tmp_path / "t.tar").read_bytes())):
        with pytest.raises(DataError, match=r"t\.tar "):
            index_tar(tmp_path / "t.tar", file)


@pytest.mark.parametrize("end", [0, 512, 1024, 10_240, 3_000_000])
def test_a_tar_may_end_with_any_number_of_zeros(end: int, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(TAR[:7680] + bytes(end))
    assert list(index_tar(tmp_path / "t.tar")) == [f"pic{i}.p" for i in range(5)]


def peak_bytes(read: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_empty_members_are_listed_with_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "REPORTED", 1_000)
    monkeypatch.setattr(files, "BLOCK_BYTES", 512)
    tar = tmp_path / "t.tar"
    tar.write_bytes(b"".join(tarfile.TarInfo(f"{number}.jpg").tobuf() for number in range(3_000)) + bytes(1024))
    with tarfile.open(tar) as opened, caplog.at_level("INFO"):
        assert peak_bytes(lambda: index_tar(tar)) < peak_bytes(opened.getmembers) / 2
    assert caplog.messages == [f"listing {tar}: {number},000 members so far" for number in (1, 2, 3)]


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


def test_a_limit_above_pillows_own_applies() -> None:
    """Neither a warning, which would be an error here, nor Pillow's refusal; Pillow itself keeps its limit."""
    data = encoded(Image.new("1", (15_000, 12_500)), compress_level=1)
    assert open_image(data, max_pixels=200_000_000, at_least=100).size == (120, 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


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
