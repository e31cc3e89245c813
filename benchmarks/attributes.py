"""How many of a query's attributes hold in the first result, of trained methods.

    dcar evaluate --data examples/emoji/twemoji --model examples/emoji/base --epochs 5
        --amp bfloat16 --out results \\ --methods
        clip-adapter,dcar,block-adapters,query-prompts
    python benchmarks/attributes.py examples/emoji/twemoji results/runs/*/* --model
    examples/emoji/base

- A query is the category of an image and two or more attributes: genders and what
  follows a comma in the category ("woman running, facing right"), and the skin tones
  among the attributes of metadata.jsonl.
- The pool is the split. Only images with a swap in it are asked for: an image of the
  same thing with other attributes.
- An image whose copy is in another split is left out. Copies in the split are one
  image, of which all facts hold.
- The first result has a grade: the share of the query's facts, the thing and each
  attribute, that hold.
- Methods with a second stage have a row with `rerank`. Seeds are averaged; intervals
  resample whole emoji.
"""

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dcar_core.data import SPLITS, Annotations, Dataset
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import load_checkpoint, read_config
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import prepare_split
from dcar_core.training.validation import encode_captions, encode_images, first_images
from dcar_core.util.metrics import first_targets

GENDERS = re.compile(r"\b(m[ae]n|wom[ae]n)\b")
WITH_RERANK = " with rerank"


@dataclass(frozen=True)
class Facts:
    """thing: the category without genders and parts behind a comma. attributes: these,
    and skin tones.
    """

    thing: str
    attributes: tuple[str, ...]

    @classmethod
    def of(cls, category: str, attributes: Sequence[str]) -> "Facts":
        thing, *parts = category.split(", ")
        tones = [each for each in attributes if each.endswith("skin tone")]
        words = [*GENDERS.findall(thing), *parts, *tones]
        return cls(GENDERS.sub("", thing).strip() or "person", tuple(words))

    def held_in(self, other: "Facts") -> float:
        """Return the share of these facts that hold in another image."""
        held = (Counter(self.attributes) & Counter(other.attributes)).total() + (
            self.thing == other.thing
        )
        return held / (1 + len(self.attributes))


@dataclass(frozen=True)
class Protocol:
    """images: one sample for each image of the pool, the query as its caption. facts:
    of each image and its copies.

    queries: rows of the images that are asked for. emoji: int64 (Q,), the number of
    each one's thing.
    """

    images: Dataset
    facts: list[list[Facts]]
    queries: np.ndarray
    emoji: np.ndarray

    def grades(self, first: np.ndarray) -> np.ndarray:
        """Return the grade (Q,) of the first results (Q,)."""
        asked = (self.facts[row][0] for row in self.queries)
        return np.array(
            [
                max(map(own.held_in, self.facts[row]))
                for own, row in zip(asked, first, strict=True)
            ]
        )


def protocol(data: Path, split: str) -> Protocol:
    """Read the queries and the pool of a split."""
    rows = map(
        json.loads, (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    )
    known = {row["file_name"]: row for row in rows}
    splits, _ = Annotations(data).load_all(SPLITS)
    copies = defaultdict[str, dict[str, str]](dict)  # content -> image -> split
    for name, part in splits.items():
        for image in part.images:
            copies[hashlib.sha256(part.read(image)).hexdigest()][image] = name
    samples = []
    facts = []
    sample_of = {sample.image: sample for sample in splits[split].samples}
    for images in copies.values():
        if {*images.values()} == {split}:
            first = known[next(iter(images))]
            facts.append(
                [
                    Facts.of(known[each]["category"], known[each]["attributes"])
                    for each in images
                ]
            )
            tones = [each for each in first["attributes"] if each.endswith("skin tone")]
            samples.append(
                replace(
                    sample_of[first["file_name"]],
                    caption=", ".join([first["category"], *tones]),
                )
            )
    things = Counter(each.thing for (each, *_) in facts)
    wanted = [
        row
        for row, (own, *_) in enumerate(facts)
        if len(own.attributes) > 1 and things[own.thing] > 1
    ]
    _, emoji = np.unique([facts[row][0].thing for row in wanted], return_inverse=True)
    return Protocol(
        replace(splits[split], samples=samples),
        facts,
        np.array(wanted),
        emoji,
    )


def grades_of(model: DCAR, asked: Protocol) -> dict[str, np.ndarray]:
    """Return the grades (Q,) by the suffix of a row's name: by vectors, and with
    `rerank` if the model has it.
    """
    split = prepare_split(asked.images, model.eval(), for_training=False)
    text = encode_captions(model, split)
    image = encode_images(model, split)
    found = {"": asked.grades(first_targets(text[asked.queries], image, 1)[:, 0])}
    if model.config.rerank.blocks:
        first = first_images(model, split, text, image)
        best = first.scores(model.rerank_weight)[asked.queries].argmax(1)
        found[WITH_RERANK] = asked.grades(first.rows[asked.queries, best])
    return found


def estimate(values: np.ndarray, emoji: np.ndarray) -> str:
    """Return the mean of values (Q,) in percent, and its 95 % interval over whole
    emoji.
    """
    sums = np.bincount(emoji, values)
    sizes = np.bincount(emoji)
    counts = np.random.default_rng(0).multinomial(
        len(sizes),
        np.full(len(sizes), 1 / len(sizes)),
        size=10_000,
    )
    low, high = np.quantile((counts @ sums) / (counts @ sizes), [0.025, 0.975])
    return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a data set with metadata.jsonl")
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        help="several of a method are its seeds",
    )
    parser.add_argument("--model", required=True, help="the model that they share")
    parser.add_argument(
        "--split",
        default="test",
        choices=SPLITS,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--baseline",
        default="block-adapters",
        help="method of the differences (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = protocol(args.data, args.split)
    found = defaultdict[str, list[np.ndarray]](list)
    backbone = load_backbone(BackboneSource(args.model))
    for directory in args.checkpoints:
        # with weights of its own
        is_merged = read_config(directory)["backbone"]["model"].startswith("model-")
        model, _ = load_checkpoint(directory, backbone=None if is_merged else backbone)
        for suffix, grades in grades_of(model, asked).items():
            found[model.config.method + suffix].append(grades)
    print(
        f"{len(asked.queries):,} queries among {len(asked.images.images):,} images of"
        f" {args.split}, percent"
    )
    print(
        "| method | seeds | all facts hold | facts that hold | difference |\n| --- |"
        " --- | --- | --- | --- |"
    )
    base = np.mean(found[args.baseline], axis=0) if args.baseline in found else None
    for name, seeds in found.items():
        grades = np.mean(seeds, axis=0)
        cells = [
            estimate(np.mean(np.array(seeds) == 1, axis=0), asked.emoji),
            estimate(grades, asked.emoji),
        ]
        cells.append(
            "-"
            if base is None or name == args.baseline
            else estimate(grades - base, asked.emoji)
        )
        print(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
