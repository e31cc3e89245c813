"""Small images, and their files."""

import io
from pathlib import Path

import pillow_heif
from PIL import ExifTags, Image, ImageDraw

from tests.support.commands import run

pillow_heif.register_heif_opener()  # Pillow then saves HEIF

PEAK_MEMORY = """
import re, sys
from pathlib import Path
from dcar_core.model.preprocess import Preprocess


def peak():  # of this program; getrusage counts from the parent's
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s*([0-9]+) kB", status)[1])


data = Path(sys.argv[1]).read_bytes()
fast = Preprocess(224, (0.5,) * 3, (0.5,) * 3).fast()
before = peak()
fast(data)
print(peak() - before)
"""


def draw(color: str, shape: str, side: int = 48) -> Image.Image:
    """Draw one of conftest's shapes on white."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    box = (8, 8, side - 8, side - 8)
    if shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "triangle":
        pen.polygon(
            [
                (side // 2, 8),
                (8, side - 8),
                (side - 8, side - 8),
            ],
            fill=color,
        )
    else:
        pen.line((8, 8, side - 8, side - 8), fill=color, width=8)
        pen.line((8, side - 8, side - 8, 8), fill=color, width=8)
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(taken: object, orientation: int = 1) -> Image.Exif:
    """Return the EXIF of a picture with the time that it was taken, such as 2024:07:01
    10:20:30.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    return exif


def png(color: str = "red", size: tuple[int, int] = (40, 40)) -> bytes:
    """Return a PNG file of one colour."""
    return encoded(Image.new("RGB", size, color))


def write_image(path: Path) -> Path:
    """Write an 8 px red image in the format of the path's suffix, creating parent
    folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def peak_memory(data: bytes, folder: Path) -> int:
    """Return the bytes that preprocessing a file adds to the peak memory of a
    process.
    """
    (folder / "image").write_bytes(data)
    done = run("-c", PEAK_MEMORY, folder / "image")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
