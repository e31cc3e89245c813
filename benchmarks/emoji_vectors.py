"""Make image vectors and text queries for `index_kinds.py` with a bundled model, from
both galleries of the example.

    python benchmarks/emoji_vectors.py emoji --count 1000000 --encoded 250000
    python benchmarks/index_kinds.py emoji

- The images of both styles come first. Then each comes again and again: cut, turned, in
  other colours, on other grounds, and half of them beside another one.
- Beyond `--encoded`, vectors are copies, each moved by a part of the difference between
  two other images of its emoji.
- Queries are captions, categories, what people typed (`examples/emoji/queries`), common
  words, and further images. Each kind is a file of vectors in a random order.
- One core encodes about 240 images per second. A stopped run continues.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from tqdm import tqdm

from dcar_core import Encoder
from dcar_core.model.tokenizer import common_words
from dcar_core.util.arrays import Floats

EXAMPLES = Path(__file__).resolve().parents[1] / "examples/emoji"
STYLES = ("twemoji", "openmoji")
PART = 1_000  # images
MOVED = 0.3  # of a difference between two vectors
WORDS = 1_000
# rows of images that are queries
HELD_OUT_FROM = 10**9
HELD_OUT = 2_000


def galleries() -> list[Image.Image]:
    """Return the images of both styles."""
    images = []
    for style in STYLES:
        with tarfile.open(EXAMPLES / style / "gallery.tar") as tar:
            for name in tar.getnames():
                images.append(
                    Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGBA")
                )  # type: ignore[union-attr]
    return images


def picture(images: list[Image.Image], row: int) -> Image.Image:
    """Return the image of a row, which is always the same."""
    image = images[row % len(images)]
    if row < len(images):
        return over(image, (255, 255, 255))
    draw = np.random.default_rng([5, row])
    if draw.random() < 0.5:
        other = images[draw.integers(len(images))]
        size = image.size
        pair = Image.new("RGBA", (2 * size[0], 2 * size[1]))
        pair.paste(image, (0, int(draw.integers(size[1]))))
        pair.paste(other, (size[0], int(draw.integers(size[1]))))
        image = pair
    image = image.rotate(draw.uniform(-30, 30), Image.Resampling.BILINEAR)
    side = draw.uniform(0.6, 1.0) * image.width
    left, top = draw.uniform(0, image.width - side, size=2)
    image = image.crop((int(left), int(top), int(left + side), int(top + side)))
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    turned = int(draw.normal(0, 20)) % 256
    coloured = Image.merge(
        "HSV", (hue.point(lambda x: (x + turned) % 256), saturation, value)
    ).convert("RGB")
    coloured.putalpha(image.getchannel("A"))
    if draw.random() < 0.7:
        ground = tuple(draw.integers(256, size=3))
    else:
        ground = (255, 255, 255)
    return ImageEnhance.Brightness(over(coloured, ground)).enhance(
        draw.uniform(0.6, 1.3)
    )


def over(image: Image.Image, ground: tuple[int, ...]) -> Image.Image:
    whole = Image.new("RGB", image.size, ground)
    whole.paste(image, mask=image.getchannel("A"))
    return whole


def texts() -> dict[str, list[str]]:
    """Return the distinct texts of each kind of query."""
    items = [
        json.loads(line)
        for style in STYLES
        for line in (EXAMPLES / style / "metadata.jsonl").open()
    ]
    typed = [
        line.split("\t")[1]
        for file in sorted((EXAMPLES / "queries").glob("*.tsv"))
        for line in file.open()
    ]
    return {
        "captions": sorted({item["caption"] for item in items}),
        "categories": sorted({item["category"] for item in items}),
        "typed": sorted(set(typed)),
        "words": common_words(WORDS),
    }


def grown(encoded: list[Floats], count: int, items: int) -> Iterator[Floats]:
    """Yield blocks of `count` vectors: those that were encoded, of which r shows item r
    % items, then moved copies.
    """
    vectors = np.concatenate(encoded)
    rounds = len(vectors) // items
    yield vectors[:count]
    for start in range(len(vectors), count, PART):
        rows = np.arange(start, min(start + PART, count)) % len(vectors)
        first, further = (
            np.random.default_rng([13, start])
            .integers((rounds, rounds - 1), size=(len(rows), 2))
            .T
        )
        first, second = (
            rows % items + items * (turn % rounds)
            for turn in (first, first + 1 + further)
        )
        block = vectors[rows]
        block += MOVED * (vectors[first] - vectors[second])
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=100_000, help="of vectors")
    parser.add_argument(
        "--encoded",
        type=int,
        default=100_000,
        help="of them from images",
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    encoder = Encoder.load(EXAMPLES / "twemoji/checkpoint", runtime="auto", threads=1)
    images = galleries()

    def encode(rows: range) -> Floats:
        return encoder.encode_images([picture(images, row) for row in rows])

    queries = {name: encoder.encode_text(named) for name, named in texts().items()}
    queries["images"] = encode(range(HELD_OUT_FROM, HELD_OUT_FROM + HELD_OUT))
    for name, vectors in queries.items():
        np.save(
            given.out / f"{name}.npy", np.random.default_rng(3).permutation(vectors)
        )
    parts = []
    for start in tqdm(
        range(0, min(given.encoded, given.count), PART),
        "encoding",
        unit=f"x {PART}",
    ):
        part = given.out / f"part-{start}.npy"
        if not part.exists():
            np.save(part, encode(range(start, start + PART)))
        parts.append(np.load(part, mmap_mode="r"))
    written = np.lib.format.open_memmap(
        given.out / "vectors.npy",
        "w+",
        np.float32,
        (given.count, encoder.dim),
    )
    start = 0
    for block in grown(parts, given.count, len(images)):
        written[start : start + len(block)] = block
        start += len(block)
    written.flush()


if __name__ == "__main__":
    main()
