"""Image files to RGB and to a model's pixels: formats, tiles, memory, folders and tars;
decoders with limits.
"""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps

from dcar_core.data.image_lookup import ImageFinder
from dcar_core.images import (
    ImageFormat,
    ImageRoot,
    OpenedImage,
    decoding,
    index_tar,
    open_image,
    sniff_format,
    workers,
)
from dcar_core.images.decoding import make_thumbnail
from dcar_core.images.formats import WEB_FORMATS
from dcar_core.images.workers import DecodeWorker, LargeImageError, Limits
from dcar_core.model import preprocess
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import DataError, ImageError, ImageFault
from tests.support import conversions
from tests.support import hostile_images as hostile
from tests.support.files import tar_bytes, write_file, write_tar
from tests.support.images import encoded, exif_of, peak_memory
from tests.support.parts import needs
from tests.support.processes import children_of, is_alive

LONG = needs("time")
HALF = (0.5,) * 3


def whole(image: Image.Image) -> np.ndarray:
    """Convert a transparent or deep image to RGB in one piece."""
    if image.mode in {"I;16", "I;16B", "I"}:
        values = np.asarray(image, np.float64)
        gray = np.clip(values / 65535, 0, 1) * 255
        return np.repeat(gray.round()[:, :, None], 3, axis=2).astype(int)
    rgba = image.convert("RGBA")
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(
            "RGB"
        )
    ).astype(int)


def deep_or_clear(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(
        rng.integers(
            0,
            256,
            (height, width, 4),
            dtype=np.uint8,
        )
    )
    deep = rng.integers(
        0,
        65536,
        (height, width),
        dtype=np.uint16,
    )
    if mode[0] == "I":
        values = {
            "I;16": deep,
            "I;16B": deep.astype(">u2"),
            "I": deep.astype(np.int32) * 2 - 30_000,
        }
        return Image.frombytes(
            mode,
            (width, height),
            values[mode].tobytes(),
        )
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
    if mode == "I;16":
        image = Image.fromarray(deep)
    else:
        image = Image.fromarray(drawn).convert(mode)
    data = encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    expected = np.where(
        drawn & (mode == "I;16"),
        1000 // 257 + 1,
        255,
    )
    np.testing.assert_array_equal(
        np.asarray(open_image(data)), np.repeat(expected[:, :, None], 3, axis=2)
    )


def test_images_are_read_from_folders_and_tars(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (4, 4), "red"))
    write_file(tmp_path / "sub" / "a.png", data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        member = tarfile.TarInfo("b.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        again = tarfile.TarInfo("./c.png")  # as tar packs a hard link
        again.type = tarfile.LNKTYPE
        again.linkname = "b.png"
        tar.addfile(again)
    root = ImageRoot(tmp_path)
    assert root.read("sub/a.png") == root.read("b.png") == root.read("c.png") == data
    with pytest.raises(ImageError, match=r"no file d\.png"):
        root.read("d.png")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="uncompressed"):
        ImageRoot(tmp_path)


def test_members_that_several_tars_have_are_known_by_their_tar_alone(
    tmp_path: Path,
) -> None:
    for shard in ("a", "b"):
        write_tar(
            tmp_path / f"{shard}.tar",
            dict.fromkeys(("1.png", f"{shard}.png"), shard.encode()),
        )
    root = ImageRoot(tmp_path)
    assert root.names() == ["a.png", "a.tar/1.png", "b.png", "b.tar/1.png"]
    assert [
        name
        for name in ("1.png", "a.png", "a.tar/a.png", "b.tar/1.png")
        if name not in root
    ] == ["1.png"]
    assert root.read("a.tar/1.png") == b"a"
    assert root.read("b.tar/1.png") == b"b"
    with pytest.raises(ImageError, match=r"no file 1\.png"):
        root.read("1.png")
    finder = ImageFinder(root, frozenset())
    names = ("1.png", "other/1.png", "other/a.png", "b.tar/1.png")
    assert [finder.find(name) for name in names] == [None, None, "a.png", "b.tar/1.png"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16", "I;16B", "I"])
@pytest.mark.parametrize("tile", [2**18, 1000, 50])
def test_image_in_tiles_equals_the_one_in_one_piece(
    mode: str,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "TILE_PIXELS", tile)
    for width, height in (
        (131, 97),
        (300, 1),
        (1, 300),
    ):
        image = deep_or_clear(mode, width, height)
        np.testing.assert_array_equal(np.asarray(open_image(image)), whole(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_large_image_is_averaged_when_reduced(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = deep_or_clear(mode, 131, 97)
    assert open_image(image, at_least=10).size == (131, 97)  # not large
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 131 * 97 - 1)
    monkeypatch.setattr(decoding, "TILE_PIXELS", 1000)
    for at_least, factor in (
        (10, 9),
        (31, 3),
        (49, 1),
    ):
        found = np.asarray(open_image(image, at_least=at_least)).astype(int)
        averaged = np.asarray(
            Image.fromarray(whole(image).astype(np.uint8)).reduce(factor)
        )
        assert min(found.shape[:2]) >= at_least
        assert np.abs(found - averaged).max() <= 1


# with its header 1536 bytes each
TAR = tar_bytes({f"pic{i}.p": b"x" * 700 for i in range(5)})
SPARSE = tarfile.TarInfo("a.png")
SPARSE.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "4096"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TAR[:3082] + b"?" + TAR[3083:], r"at pic1\.p: more data after byte 3,072"),
        (TAR[: 3072 + 300], r"at pic1\.p: more data after byte 3,072"),
        (
            TAR[:3072] + bytes(512) + TAR[3584:],
            r"at pic1\.p: more data after byte 3,072",
        ),
        (
            TAR + tar_bytes({"more.p": b"x"}),
            r"at pic4\.p: more data after byte 7,680.* two tars were concatenated",
        ),
        (TAR[:4000], "unexpected end of data"),
        (SPARSE.tobuf() + bytes(512), r"at a\.png: it is a sparse file"),
    ],
)
def test_damaged_and_odd_tars_are_refused(
    data: bytes,
    says: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "t.tar").write_bytes(data)
    for file in (None, io.BytesIO(data)):
        with pytest.raises(DataError, match=says):
            index_tar(tmp_path / "t.tar", file)


def test_many_members_take_little_memory_and_any_number_of_zeros_may_follow(
    tmp_path: Path,
) -> None:
    tar = tmp_path / "t.tar"
    for end in (0, 512, 1024, 10_240, 3_000_000):
        tar.write_bytes(TAR[:7680] + bytes(end))
        assert list(index_tar(tar)) == [f"pic{i}.p" for i in range(5)]
    tar.write_bytes(
        b"".join(tarfile.TarInfo(f"{number}.jpg").tobuf() for number in range(3_000))
        + bytes(1024)
    )
    tracemalloc.start()
    assert len(index_tar(tar)) == 3_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(
            0,
            256,
            (height, width, 3),
            dtype=np.uint8,
        )
    )


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"quality": 95, "subsampling": 0, "comment": b"taken by hand"}),
        ("JPEG", "CMYK", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("GIF", "P", {"comment": b"drawn by hand"}),
        ("WEBP", "RGB", {"lossless": True}),
        ("AVIF", "RGB", {"speed": 10}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"big_tiff": True, "compression": "zstd"}),
        ("BMP", "RGB", {}),
    ],
)
@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_an_honest_file_is_decoded_as_pillow_does(
    kind: str,
    mode: str,
    options: dict[str, object],
    orientation: int | None,
) -> None:
    if orientation is not None and kind not in {"GIF", "BMP"}:
        exif = exif_of("2024:07:01 10:20:30", orientation)
        exif[0x010E] = "a description"
        options = {**options, "exif": exif, "icc_profile": b"p" * 5_000}
    data = encoded(noisy(40, 33).convert(mode), kind, **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    opened = OpenedImage(data)
    assert opened.upright_size == expected.size
    np.testing.assert_array_equal(np.asarray(open_image(opened)), np.asarray(expected))
    is_kept = "exif" in options and kind != "TIFF"
    assert opened.taken == ("2024-07-01T10:20:30" if is_kept else "")
    assert sniff_format(data) == ImageFormat(kind.lower())


def test_a_tiff_file_has_a_time() -> None:
    exif = exif_of("2024:07:01 10:20:30")
    exif.load(exif.tobytes())  # else Pillow leaves it out
    opened = OpenedImage(encoded(noisy(8, 8), "TIFF", exif=exif))
    open_image(opened)
    assert opened.taken == "2024-07-01T10:20:30"


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is damaged
def test_a_damaged_time_is_none() -> None:
    for text in (
        "",
        "    :  :     :  :  ",
        "0000:00:00 00:00:00",
        "2024:13:01 10:20:30",
        "2024",
        "x" * 60_000,
        7,
    ):
        assert (
            OpenedImage(encoded(noisy(8, 8), "JPEG", exif=exif_of(text))).taken == ""
        ), text
    valid = encoded(noisy(8, 8), "JPEG", exif=exif_of("2024:07:01 10:20:30"))
    rng = np.random.default_rng(0)
    for at in rng.integers(
        valid.index(b"Exif"),
        valid.index(b"2024:07:01") - 2,
        300,
    ).tolist():
        assert OpenedImage(valid[:at] + rng.bytes(2) + valid[at + 2 :]).taken in {
            "",
            "2024-07-01T10:20:30",
        }, at


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        data = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            duration=100,
        )
        red, _, blue = open_image(data).getpixel((4, 4))  # type: ignore[misc]
        assert red > 200 > 50 > blue, kind


def test_limits_leave_honest_files_alone() -> None:
    """Neither a warning, which would be an error here, nor Pillow's refusal; Pillow
    itself keeps its limit.
    """
    assert open_image(hostile.png_with_profile(8_000_000)).size == (16, 16)
    data = encoded(Image.new("1", (15_000, 12_500)), compress_level=1)
    assert open_image(data, max_pixels=200_000_000, at_least=100).size == (120, 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="measures memory as Linux reports it"
)
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
        pytest.param("PNG", "RGBA", {"compress_level": 1}, marks=LONG),
        pytest.param(
            "WEBP",
            "RGBA",
            {"quality": 50, "method": 0},
            marks=LONG,
        ),
        ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
        pytest.param(
            "HEIF",
            "RGBA",
            {"quality": 50, "chroma": "444", "enc_params": {"preset": "ultrafast"}},
            marks=LONG,
        ),
    ],
)
def test_decoding_stays_in_expected_memory(
    kind: str,
    mode: str,
    options: dict[str, object],
    tmp_path: Path,
) -> None:
    small = np.random.default_rng(0).integers(
        0,
        256,
        (94, 94, 4),
        dtype=np.uint8,
    )
    data = encoded(
        Image.fromarray(small).resize((3_000, 3_000)).convert(mode),
        kind,
        **options,
    )
    assert (
        peak_memory(data, tmp_path)
        < OpenedImage(data).memory + 2 * len(data) + 24 * 2**20
    )


def test_heic_is_read_with_its_package_and_named_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = noisy(12, 8).resize((96, 64))
    data = encoded(
        image.rotate(90, expand=True),
        "HEIF",
        quality=90,
        exif=exif_of("2024:07:01 10:20:30", 6).tobytes(),
    )
    opened = OpenedImage(data)
    assert opened.format == ImageFormat.HEIF
    assert opened.upright_size == image.size
    assert opened.taken == "2024-07-01T10:20:30"
    assert (
        np.abs(np.asarray(open_image(data)).astype(int) - np.asarray(image)).mean() < 8
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="the package pillow-heif") as caught:
        open_image(data)
    assert caught.value.fault == ImageFault.MISSING_DECODER


def test_preprocess_equals_open_clips_transform() -> None:
    # of 35 pixels, 32 are cut out from the second on
    for height, width in (
        (57, 83),
        (64, 70),
        (70, 64),
    ):
        picture = noisy(width, height)
        for mode, interpolation in product(
            ("squash", "shortest", "longest"), ("bicubic", "bilinear")
        ):
            config = PreprocessCfg(
                32,
                "RGB",
                (0.4, 0.5, 0.6),
                (0.2, 0.3, 0.4),
                interpolation,
                mode,
                114,
            )
            ours = Preprocess.from_open_clip(asdict(config))
            theirs = image_transform_v2(config, is_train=False)(picture)
            np.testing.assert_allclose(
                ours.standardize(ours(picture)[None])[0],
                theirs.numpy(),
                atol=2e-6,
            )
    line = Preprocess(32, HALF, HALF, resize="longest")(
        Image.new("RGB", (200, 1), "white")
    )
    # a side never rounds to nothing
    assert (line.reshape(3, -1) == 255).sum() == 3 * 32


def test_jpeg_is_decoded_at_the_smallest_sufficient_size() -> None:
    file = encoded(noisy(1400, 960), "JPEG")
    assert open_image(file).size == (1400, 960)
    # an eighth would be 175 x 120
    assert open_image(file, at_least=121).size == (350, 240)
    assert open_image(file, at_least=120).size == (175, 120)
    assert open_image(file, at_least=961).size == (1400, 960)
    assert open_image(Image.new("RGB", (900, 900)), at_least=10).size == (900, 900)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pytorch_resizes_as_pillow_does_and_small_images_are_equal_in_both_modes(
    mode: Any, interpolation: Any
) -> None:
    exact = Preprocess(48, HALF, HALF, interpolation, mode)
    by_torch = exact.fast(torch=True)
    if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
        assert by_torch.resizer == "torch"
    for width, height in (
        (110, 70),
        (97, 131),
        (48, 48),
        (30, 20),
        (251, 250),
        (1, 1),
    ):
        picture = noisy(width, height)
        before = exact(picture).astype(int)
        after = by_torch(picture)
        assert after.shape == before.shape
        assert after.flags.c_contiguous
        assert np.abs(before - after).max() <= 2
        assert np.abs(before - after).mean() < 0.05
        # of 255
        assert width > 200 or np.abs(before - exact.fast()(picture)).mean() < 0.5


def test_a_models_own_settings_are_followed_and_are_in_the_hash() -> None:
    own = {"size": (48, 48), "mean": HALF, "std": HALF}
    usual = Preprocess.from_open_clip(own)
    assert usual.interpolation == "bicubic"
    assert usual.resize == "shortest"
    assert usual.fill == 0
    changes = {
        "size": 24,
        "mean": (0.1, 0.5, 0.5),
        "std": (0.5, 0.5, 0.1),
        "interpolation": "bilinear",
    }
    others = [
        Preprocess.from_open_clip(own | {key: value}) for key, value in changes.items()
    ]
    padded = Preprocess.from_open_clip(
        {
            **own,
            "interpolation": "bilinear",
            "resize_mode": "longest",
            "fill_color": 127,
        }
    )
    others += [
        usual,
        padded,
        replace(padded, fill=0),
        replace(padded, resize="squash"),
        usual.fast(),
    ]
    assert len(set(others)) == len(others)
    assert padded.interpolation == "bilinear"
    assert padded.resize == "longest"
    assert padded.fill == 127
    for how in (padded, padded.fast(torch=True)):
        pixels = how(Image.new("RGB", (96, 32), "white"))
        assert (pixels[:, :16] == 127).all()
        assert (pixels[:, 16:32] == 255).all()
        assert how(Image.new("RGB", (4000, 8), "white")).shape == (
            3,
            48,
            48,
        ), "a line keeps a pixel"


def test_long_image_is_cropped_while_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Preprocess(48, HALF, HALF)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(90, 160, size, dtype=np.uint8))
        for size in ((3, 500, 3), (700, 20, 3))
    ]
    before = [exact(picture).astype(int) for picture in pictures]
    monkeypatch.setattr(preprocess, "MAX_SCALED_PIXELS", 48 * 48)
    assert (
        max(
            np.abs(one - exact(picture)).max()
            for one, picture in zip(before, pictures, strict=True)
        )
        <= 1
    )


FAST = Preprocess(32, (0.5,) * 3, (0.5,) * 3).fast()
LIMITS = Limits(64 * 2**20, seconds=0.5, seconds_per_pixel=0.0)
PNG = encoded(Image.new("RGB", (5, 3), "red"))

needs_limits = pytest.mark.skipif(
    sys.platform != "linux", reason="the system does not limit the memory of a process"
)

BOMBS = {
    "scans": lambda: hostile.jpeg_with_scans(10_000),
    "exif segments": lambda: hostile.jpeg_with_segments(100_000),
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "png text": lambda: hostile.png_with_chunks(1_000_000, b"tEXt", b""),
    "png profile": lambda: hostile.png_with_profile(200_000_000),
    "gif comment": lambda: hostile.gif_with_comment_blocks(5_000_000),
    "avif frame": lambda: hostile.avif_of_frame(16_000, 16_000),
    "tiff tile": lambda: hostile.tiff_with_tile(37_000),
    "pixels": lambda: hostile.png_of_size(60_000, 60_000),
    "heif": lambda: encoded(
        Image.new("RGB", (3_000, 3_000)),
        "HEIF",
        enc_params={"preset": "ultrafast"},
    ),
    "canvas": lambda: encoded(Image.new("RGB", (7_900, 7_900)), "WEBP"),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[DecodeWorker]:
    with closing(DecodeWorker()) as worker:
        yield worker


def refusal(
    worker: DecodeWorker,
    convert: Callable[[OpenedImage], bytes],
    data: bytes = PNG,
) -> tuple[ImageFault, str]:
    with pytest.raises(ImageError) as caught:
        worker.run(convert, data, LIMITS)
    return caught.value.fault, str(caught.value)


def process_of(worker: DecodeWorker) -> int:
    worker.start()
    assert worker.process is not None
    return worker.process.pid


@pytest.mark.slow
@needs_limits
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_the_limits(name: str, worker: DecodeWorker) -> None:
    used = os.times()
    with pytest.raises(ImageError) as caught:
        worker.run(
            FAST.decoder(),
            BOMBS[name](),
            LIMITS,
        )
    assert caught.value.fault in {
        ImageFault.HOSTILE,
        ImageFault.TOO_LARGE,
        ImageFault.BROKEN,
    }
    assert os.times().children_user - used.children_user < 2, (
        "of processor time, with the start of a process"
    )
    status = Path(f"/proc/{process_of(worker)}/status").read_text()
    assert int(status.split("VmHWM:")[1].split()[0]) < 200 * 2**10, "KB"
    assert worker.run(FAST.decoder(), PNG, LIMITS)[1:3] == (
        5,
        3,
    ), "the next image is not affected"


def test_pixels_sizes_and_thumbnails_are_those_of_this_process(
    worker: DecodeWorker,
) -> None:
    picture = Image.effect_noise((300, 200), 80).convert("RGB")
    data = encoded(picture, "JPEG", exif=exif_of("2024:07:01 10:20:30", 6))
    pixels, *about = worker.run(FAST.decoder(), data, LIMITS)
    np.testing.assert_array_equal(pixels, FAST(data))
    assert (
        about
        == [200, 300, "2024-07-01T10:20:30"]
        == [*open_image(data).size, OpenedImage(data).taken]
    )
    thumbnail = partial(make_thumbnail, side=64, thumbnail_format="jpeg")
    assert worker.run(thumbnail, data, LIMITS).result == thumbnail(OpenedImage(data))


def test_what_this_process_would_say_is_said(worker: DecodeWorker) -> None:
    limits = Limits(64 * 2**20, max_pixels=14, formats=WEB_FORMATS)
    for data, fault, reason in (
        (PNG, ImageFault.TOO_LARGE, "5 x 3 pixels; at most 14 are accepted"),
        (PNG[:-20], ImageFault.BROKEN, "broken or truncated"),
        (
            encoded(Image.new("L", (2, 2)), "TIFF"),
            ImageFault.UNSUPPORTED,
            "TIFF images are not accepted here",
        ),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            worker.run(
                FAST.decoder(),
                data,
                limits if fault != ImageFault.BROKEN else LIMITS,
            )
        assert caught.value.fault == fault
    with pytest.raises(LargeImageError):
        worker.run(
            FAST.decoder(),
            PNG,
            Limits(64 * 2**20, expected=5 * 15 - 1),
        )
    assert worker.run(
        FAST.decoder(),
        PNG,
        Limits(64 * 2**20, expected=5 * 15),
    )[1:3] == (5, 3)


@needs_limits
@pytest.mark.parametrize(
    ("convert", "fault", "says"),
    [
        (conversions.spin, ImageFault.HOSTILE, "refused: decoding it takes too long"),
        (
            conversions.fill,
            ImageFault.HOSTILE,
            "refused: decoding it takes more than 64 MiB",
        ),
        (conversions.crash, ImageFault.HOSTILE, "refused: it ends its decoder"),
        (conversions.fail, ImageFault.BROKEN, "ZeroDivisionError: in a decoder"),
        (
            conversions.vanish,
            ImageFault.UNREADABLE,
            "its decoder was killed, perhaps out of memory; try again",
        ),
    ],
)
def test_a_conversion_that_misbehaves_fails_one_image(
    worker: DecodeWorker,
    convert: Callable[[OpenedImage], bytes],
    fault: ImageFault,
    says: str,
) -> None:
    before = process_of(worker)
    assert refusal(worker, convert) == (fault, says)
    assert (process_of(worker) == before) == (
        convert in {conversions.fill, conversions.fail}
    )
    assert worker.run(FAST.decoder(), PNG, LIMITS)[1:3] == (5, 3)


def test_half_an_answer_is_never_that_of_the_next_image(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = workers.read_exactly
    sizes = list[int]()

    def fails_once(pipe: Any, size: int) -> bytearray:
        sizes.append(size)
        if len(sizes) == 3:  # the lengths, the words, and now the pixels
            raise MemoryError
        return read(pipe, size)

    monkeypatch.setattr(workers, "read_exactly", fails_once)
    with pytest.raises(MemoryError):
        worker.run(FAST.decoder(), PNG, LIMITS)
    blue = encoded(Image.new("RGB", (4, 4), "blue"))
    np.testing.assert_array_equal(
        worker.run(FAST.decoder(), blue, LIMITS).result, FAST(blue)
    )


def test_a_process_that_hangs_is_ended_by_the_clock_and_one_that_was_killed_replaced(
    worker: DecodeWorker,
) -> None:
    with pytest.raises(ImageError, match="refused: decoding it takes too long"):
        worker.run(conversions.wait, PNG, replace(LIMITS, seconds=0.1))
    os.kill(process_of(worker), signal.SIGKILL)
    time.sleep(0.1)
    assert worker.run(FAST.decoder(), PNG, LIMITS)[1:3] == (5, 3)


def test_closing_ends_a_process_at_work() -> None:
    worker = DecodeWorker()
    process = process_of(worker)
    thread = threading.Thread(target=refusal, args=(worker, conversions.wait))
    thread.start()
    time.sleep(0.5)
    worker.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not is_alive(process)
    assert refusal(worker, conversions.sleep)[0] == ImageFault.UNREADABLE


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds processes in /proc"
)
def test_a_worker_ends_with_a_killed_parent_and_needs_no_torch() -> None:
    code = (
        "from tests.support.conversions import *; from dcar_core.images.workers import"
        " *; import sys, time\n"
    )
    code += (
        "worker = DecodeWorker(); worker.start(); print(flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    (child,) = children_of(parent.pid)
    while b"numpy" not in (mapped := Path(f"/proc/{child}/maps").read_bytes()):
        time.sleep(0.05)
    assert b"torch" not in mapped
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while is_alive(child):
        time.sleep(0.05)
