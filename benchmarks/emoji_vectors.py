"""Vectors of a trained encoder for benchmarks of indexes: images drawn from the bundled emoji, texts as queries.

- Synthetic clusters flatter inverted lists. Here queries are texts, whose vectors lie elsewhere than those of images.
- Every emoji of both styles is drawn until the count is reached, each time moved, rotated, scaled and coloured
  differently, and encoded by the adapted checkpoint of one style.
- Queries are the captions, each alone once, then in pairs, so that there are enough to tune and to measure.
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
from index_jobs.gallery.storage import read_image

EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji"
STYLES = ("twemoji", "openmoji")
BATCH = 256


def encoder() -> Encoder:
    return Encoder.load(EMOJI / STYLES[0] / "checkpoint", device="cpu")


def captions(count: int) -> list[str]:
    """Return `count` texts: captions, then pairs of captions."""
    alone = list(dict.fromkeys(scan(EMOJI / STYLES[0]).table["caption"].to_pylist()))
    draw = np.random.default_rng(5)
    order = [alone[i] for i in draw.permutation(len(alone))]
    pairs = (f"{order[i]}, {order[j]}" for i, j in draw.integers(len(order), size=(count, 2)))
    return list(itertools.islice(itertools.chain(order, pairs), count))


def vectors(model: Encoder, count: int) -> Iterator[Floats]:
    """Yield float32 (m, E), L2-normalised, `count` rows in all."""
    files = (data for style in STYLES for data in _files(EMOJI / style))
    images = [open_image(data) for data in itertools.islice(files, count)]
    drawn = (_varied(images[i % len(images)], i, i < len(images)) for i in range(count))
    while batch := list(itertools.islice(drawn, BATCH)):
        yield model.encode_images(batch, batch_size=BATCH)


def _files(place: Path) -> Iterator[bytes]:
    gallery = scan(place)
    for row in gallery.table.select(["location", "offset", "size"]).to_pylist():
        yield read_image(gallery.root, row["location"], row["offset"], row["size"])


def _varied(image: Image.Image, seed: int, unchanged: bool) -> Image.Image:
    if unchanged:
        return image
    draw = np.random.default_rng([11, seed])
    turned = image.rotate(draw.normal(0, 12), Image.Resampling.BILINEAR, fillcolor="white")
    side = int(image.width * draw.uniform(0.6, 1))
    canvas = Image.new("RGB", image.size, tuple(draw.integers(200, 256, 3).tolist()))
    place = tuple(draw.integers(0, image.width - side + 1, 2).tolist())
    canvas.paste(turned.resize((side, side)), place)
    return ImageEnhance.Color(canvas).enhance(draw.uniform(0.3, 1.6))
