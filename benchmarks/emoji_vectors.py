"""Vectors of a trained encoder for index benchmarks: images drawn from the bundled emoji, and captions as queries.

Synthetic clusters flatter inverted lists: real queries are texts, and lie in another region than image vectors.

- Every emoji of both styles is drawn as often as needed, each time moved, rotated, scaled and coloured differently, and
  encoded by the adapted checkpoint of one style.
- Queries are the captions: each alone first, then random pairs of captions.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from dcar_core import Encoder
from dcar_core.images import open_image
from dcar_core.util.arrays import Floats
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import open_image as open_file

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji"
STYLES = ("twemoji", "openmoji")
BATCH = 256


def load_encoder() -> Encoder:
    """Load the encoder that makes all vectors."""
    return Encoder.load(EMOJI / STYLES[0] / "checkpoint", device="cpu")


def captions(count: int) -> list[str]:
    """Return `count` query texts."""
    unique = list(dict.fromkeys(scan(EMOJI / STYLES[0]).table["caption"].to_pylist()))
    rng = np.random.default_rng(5)
    order = [unique[i] for i in rng.permutation(len(unique))]
    pairs = (f"{order[i]}, {order[j]}" for i, j in rng.integers(len(order), size=(count, 2)))
    return list(itertools.islice(itertools.chain(order, pairs), count))


def vectors(model: Encoder, count: int) -> Iterator[Floats]:
    """Yield blocks (m, E) of L2-normalized vectors, `count` in total."""
    files = (data for style in STYLES for data in _image_files(EMOJI / style))
    images = [open_image(data) for data in itertools.islice(files, count)]
    variants = (_variant(images[i % len(images)], i) if i >= len(images) else images[i] for i in range(count))
    while batch := list(itertools.islice(variants, BATCH)):
        yield model.encode_images(batch, batch_size=BATCH)


def _image_files(directory: Path) -> Iterator[bytes]:
    gallery = scan(directory)
    for row in gallery.table.select(["location", "offset", "size"]).to_pylist():
        file, size = open_file(gallery.root, row["location"], row["offset"], row["size"])
        with file:
            yield file.read(size)


def _variant(image: Image.Image, seed: int) -> Image.Image:
    """Rotate, scale, move and recolour an image at random."""
    rng = np.random.default_rng([11, seed])
    rotated = image.rotate(rng.normal(0, 12), Image.Resampling.BILINEAR, fillcolor="white")
    side = int(image.width * rng.uniform(0.6, 1))
    canvas = Image.new("RGB", image.size, tuple(rng.integers(200, 256, 3).tolist()))
    place = tuple(rng.integers(0, image.width - side + 1, 2).tolist())
    canvas.paste(rotated.resize((side, side)), place)
    return ImageEnhance.Color(canvas).enhance(rng.uniform(0.3, 1.6))
