import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar_core.errors import DataError, ImageError
from dcar_core.images import ImageRoot, open_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_every_mode_becomes_rgb() -> None:
    gray = Image.new("L", (4, 4), 128)
    for image in (gray, gray.convert("1"), gray.convert("P"), gray.convert("CMYK"), gray.convert("LA")):
        assert open_image(image).mode == "RGB"
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert open_image(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)


def test_transparent_pictures_lie_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = clear.quantize(4)
    assert open_image(encoded(palette)).getpixel((0, 0)) == (255, 255, 255)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert open_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (encoded(Image.effect_noise((64, 64), 50))[:-600], "broken or truncated"),
        (huge_png(20_000, 20_000), "20000 x 20000 pixels"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(data)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "none.png")


def test_pictures_in_folders_and_tars(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (4, 4), "red"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        member = tarfile.TarInfo("b.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    root = ImageRoot(tmp_path)
    assert root.read("sub/a.png") == root.read("b.png") == data
    with pytest.raises(ImageError, match=r"no file c\.png"):
        root.read("c.png")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="uncompressed"):
        ImageRoot(tmp_path)
