"""Share of true queries that the calibrated cut-off (`min_score: "auto"`) keeps, and of
nonsense that it rejects.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/cutoff.py data/index/twemoji --validation examples/emoji/twemoji
    --drawings data/index/openmoji

- True queries are the validation texts, in two halves; each half is judged by the
  cut-off of the other. Kept: the share whose own image reaches the cut-off.
- Nonsense queries describe things that no emoji shows, or are random letters. Rejected:
  the share without any result.
- Told: the share for which the search page says "nothing fits well", because its words
  are in no item and its best score is no strong one, or because nothing reaches the
  cut-off.
- Remaining results: the number of items that reach the cut-off for a validation text,
  median and 90th percentile.
- Pictures: of items, changed; of the same items in another style (`--drawings`); of
  something else, which are those with the item's `meta_category` left out of the
  gallery, and the files of `--others`. Told: no result is likely.

The test split of texts is not read. PyTorch encodes on one thread.
"""

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dcar_core import Encoder
from index_jobs.gallery.scan import scan
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.lexical import spread_rows
from index_jobs.index.versions import open_current
from index_jobs.jobs import gate

UNRELATED_TEXTS = (
    "quarterly tax report",
    "how do I reset my password",
    "stainless steel hex bolt M8",
    "kernel panic stack trace",
    "two people signing a contract",
    "lorem ipsum dolor sit amet",
    "refund policy for annual subscription",
    "python list comprehension",
    "concrete mixer rental price",
    "portrait of a baroque nobleman",
    "satellite image of a harbour",
    "mri scan of a human knee",
    "circuit board close up",
    "beige vintage wallpaper",
    "terms and conditions apply",
    "gothic cathedral interior",
    "second derivative of a function",
    "kitchen tap part",
    "minutes of the board meeting",
    "proof of residence document",
    "scratched hardwood floor",
    "a pump's wiring plan",
    "mortgage interest rates",
    "aerial view of farmland",
    "electron microscope picture of pollen",
)
FOREIGN_TEXTS = (
    "weinende Katze",
    "roter Apfel",
    "Flagge von Japan",
    "glückliches Gesicht",
    "Frau läuft",
    "Geburtstagskuchen",
    "blaues Herz",
    "schlafender Hund",
    "gelbes Auto",
    "chat qui pleure",
    "pomme rouge",
    "drapeau du japon",
    "visage heureux",
    "femme qui court",
    "gâteau d'anniversaire",
    "coeur bleu",
    "chien endormi",
    "voiture jaune",
    "gato llorando",
    "manzana roja",
    "bandera de japón",
    "cara feliz",
    "mujer corriendo",
    "pastel de cumpleaños",
    "corazón azul",
    "perro durmiendo",
    "coche amarillo",
    "泣いている猫",
    "赤いりんご",
    "日本の旗",
    "走る女性",
    "плачущая кошка",
    "красное яблоко",
    "флаг японии",
    "собака спит",
    "哭泣的猫",
    "红苹果",
    "قطة تبكي",
    "تفاحة حمراء",
)
RANDOM_TEXTS = 200
FAMILIAR = 0.5  # as in app/ui/list.js


def random_texts(count: int) -> list[str]:
    """Return texts of two random words."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 9))
        )

    return [f"{word()} {word()}" for _ in range(count)]


def crop(picture: Image.Image) -> Image.Image:
    """Return four fifths of each side."""
    width, height = picture.size
    return picture.crop(
        (width // 10, height // 10, width - width // 10, height - height // 10)
    )


def compress(picture: Image.Image) -> Image.Image:
    """Return the picture as JPEG."""
    picture.save(file := io.BytesIO(), "JPEG", quality=30)
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "cropped to 80 %": crop,
    "mirrored": ImageOps.mirror,
    "JPEG of quality 30": compress,
    "turned by 15 degrees": lambda picture: picture.rotate(15, fillcolor="white"),
}


def pictures_of(index: IndexVersion, rows: np.ndarray) -> list[Image.Image]:
    """Return images of items on white."""
    found = [
        Image.open(io.BytesIO(index.image_bytes(row))).convert("RGBA")
        for row in rows.tolist()
    ]
    return [
        Image.alpha_composite(Image.new("RGBA", each.size, "white"), each).convert(
            "RGB"
        )
        for each in found
    ]


def print_pictures(
    opened: IndexVersion,
    encoder: Encoder,
    drawings: IndexVersion | None,
    others: Path | None,
) -> None:
    """Print the figures of queries by a picture."""
    calibrated = gate.cutoff_of_images(opened.parts[0].vectors)
    possible = calibrated["min_score"]
    likely = calibrated["strong_score"]
    print(f"  pictures: possible from {possible:.3f} on, likely from {likely:.3f} on")
    gallery = opened.vectors(np.arange(opened.rows))
    rows = spread_rows(opened.rows)
    kinds = np.array(opened.column("meta_category").to_pylist())

    def print_shares(name: str, cosines: np.ndarray, own: np.ndarray) -> None:
        scores = cosines[np.arange(len(own)), own]
        is_first = cosines.argmax(1) == own
        best = cosines.max(1)
        left_out = np.where(kinds[own][:, None] == kinds, -1, cosines).max(1)
        shares = (
            (scores >= likely).mean(),
            (scores >= possible).mean(),
            is_first[best >= likely].mean(),
        )
        told = (left_out < likely).mean()
        print(
            f"    {name:21} own item likely {shares[0]:.1%}, possible {shares[1]:.1%},"
            f" first where any is likely {shares[2]:.1%}; category left out: told"
            f" {told:.1%}"
        )

    for name, change in CHANGES.items():
        vectors = encoder.encode_images(
            [change(picture) for picture in pictures_of(opened, rows)]
        )
        print_shares(name, vectors @ gallery.T, rows)
    if drawings is not None:
        same = [
            (drawings.row_of(opened.item(row).id), row) for row in range(opened.rows)
        ]
        drawn, own = np.array([pair for pair in same if pair[0] is not None]).T
        print_shares(
            "another drawing",
            encoder.encode_images(pictures_of(drawings, drawn)) @ gallery.T,
            own,
        )
    if others is not None:
        files = sorted(
            path for path in others.rglob("*") if path.suffix in (".jpg", ".png")
        )
        best = (encoder.encode_images(files) @ gallery.T).max(1)
        told = (best < likely).mean()
        none = (best < possible).mean()
        print(
            f"    {len(files)} pictures of {others}: told {told:.1%}, without any"
            f" possible result {none:.1%}"
        )


def main() -> None:
    """Print the figures of one index."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path, help="a published index")
    parser.add_argument(
        "--validation",
        type=Path,
        required=True,
        help="data set; its validation pairs are the queries",
    )
    parser.add_argument(
        "--drawings",
        type=Path,
        help="an index of the same items in another style",
    )
    parser.add_argument(
        "--others",
        type=Path,
        help="a folder of pictures that show no item",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_current(args.index)
    encoder = Encoder.load(opened.checkpoint, device="cpu")
    pairs = gate.find_pairs(scan(opened.manifest.spec.gallery), args.validation)
    assert pairs is not None  # --validation is required
    queries = [
        (text, opened.row_of(item_id))
        for text, item_id in zip(pairs.texts, pairs.ids, strict=True)
    ]
    rows = np.array([row for _, row in queries if row is not None])
    # [N, E]
    texts = encoder.encode_text([text for text, row in queries if row is not None])
    scores = np.einsum("ne,ne->n", texts, opened.vectors(rows))
    calibrated = gate.compute_cutoff(scores)
    halves = np.array_split(np.random.default_rng(0).permutation(scores), 2)
    kept = [
        half >= gate.compute_cutoff(rest)["min_score"]
        for half, rest in zip(halves, halves[::-1], strict=True)
    ]
    min_score = calibrated["min_score"]
    count = opened.manifest.count
    print(
        f"{args.index}: cut-off {min_score:.3f} from {calibrated['pairs']} validation"
        " pairs"
    )
    print(
        f"  true queries kept, by halves      {100 * np.concatenate(kept).mean():.1f} %"
    )
    for name, nonsense in (
        ("unrelated things", UNRELATED_TEXTS),
        ("random letters", random_texts(RANDOM_TEXTS)),
    ):
        best, _ = opened.search(encoder.encode_text(list(nonsense)), 1)
        rejected = 100 * float((best[:, 0] < min_score).mean())
        print(f"  {len(nonsense)} queries rejected: {name:20}{rejected:.1f} %")
    lexical = opened.lexical
    queries_told = {
        "validation": [text for text, row in queries if row is not None],
        "other languages": FOREIGN_TEXTS,
    }
    queries_told |= {
        "unrelated things": UNRELATED_TEXTS,
        "random letters": random_texts(RANDOM_TEXTS),
    }
    for name, told in queries_told.items():
        best, _ = opened.search(encoder.encode_text(list(told)), 1)
        unfamiliar = np.array([lexical.known_share(text) < FAMILIAR for text in told])
        share = (best[:, 0] < min_score) | (
            unfamiliar & (best[:, 0] < calibrated["strong_score"])
        )
        print(f"  {len(told)} queries told: {name:20}{100 * share.mean():.1f} %")
    scores, _ = opened.search(texts, count)
    remaining = (scores >= min_score).sum(1)
    print(
        f"  results of {count}: median {np.median(remaining):.0f}, p90"
        f" {np.quantile(remaining, 0.9):.0f}"
    )
    print_pictures(
        opened,
        encoder,
        args.drawings and open_current(args.drawings),
        args.others,
    )


if __name__ == "__main__":
    main()
