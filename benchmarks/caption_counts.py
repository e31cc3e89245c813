"""Recall by the number of captions: a part of the bundled example, split 80 / 10 / 10
as `dcar train` splits a table.

    python benchmarks/caption_counts.py examples/emoji/twemoji [--methods query-prompts]
    [--seeds 2]

- A tenth of the captions chooses the epoch, a tenth is left out, and the whole test
  split of the example measures, so that rows differ in what was learned alone.
- An image has one caption, its first. Fewer captions are a part of more. Each seed has
  its own order.
- Settings are the defaults of `dcar train`. Negatives are made of the captions that are
  taken: those of the data come from captions that nobody has written yet.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random

from dcar_core.data import SPLITS, Annotations, CleaningReport, Dataset
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.negatives.complete import TextFunctions
from dcar_core.training.prepared_split import FeatureCache, prepare_split
from dcar_core.training.train import train
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.metrics import Comparison, Scores, compute_ranks

SHARES = {"train": 8, "val": 1}  # of ten captions
COUNTS = (50, 100, 200, 400, 800, 1600, 2400)
HEADINGS = [
    "captions",
    "method",
    "text-to-image R@1",
    "image-to-text R@1",
    "mean, against the untouched model",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="examples/emoji/base")
    parser.add_argument("--pretrained")
    parser.add_argument(
        "--methods", default="clip-adapter,block-adapters,query-prompts"
    )
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()

    backbone = load_backbone(BackboneSource(args.model, args.pretrained))
    functions = backbone_functions(backbone)
    splits, _ = Annotations(args.data).load_all(SPLITS)
    counts = [int(count) for count in args.counts.split(",")]
    most = min(
        10 * len(splits[split].images) // share for split, share in SHARES.items()
    )
    if max(counts) > most:
        parser.error(
            f"{args.data} has images for {most:,} captions, not {max(counts):,}; name"
            " fewer with --counts"
        )
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), backbone)

        def hits(model: DCAR) -> Scores:
            split = prepare_split(
                splits["test"],
                model.eval(),
                for_training=False,
                cache=cache,
            )
            ranks = compute_ranks(
                encode_captions(model, split),
                encode_images(model, split),
                split.image_of,
            )
            return Scores.of_ranks(ranks, split.image_of)

        untouched = hits(seeded_model(backbone, find_method("clip").config, 0))
        own = Comparison.of(untouched, untouched).model
        row = [
            "0",
            "clip",
            f"{own['t2i_r1'].value:.1f}",
            f"{own['i2t_r1'].value:.1f}",
            "-",
        ]
        print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
        print("| " + " | ".join(row) + " |", flush=True)
        for count in counts:
            for name in args.methods.split(","):
                runs = []
                for seed in range(args.seeds):
                    model = seeded_model(backbone, find_method(name).config, seed)
                    parts = written(splits, count, seed, functions)
                    config = TrainConfig(patience=5, seed=seed)
                    train(model, parts["train"], parts["val"], config, cache=cache)
                    runs.append(hits(model))
                compared = Comparison.of(Scores.mean(runs), untouched)
                recall = compared.model
                gain = compared.difference["mean_r1"]
                row = [
                    f"{count:,}",
                    name,
                    f"{recall['t2i_r1'].value:.1f}",
                    f"{recall['i2t_r1'].value:.1f}",
                    f"{gain:+}",
                ]
                print("| " + " | ".join(row) + " |", flush=True)


def written(
    splits: dict[str, Dataset],
    count: int,
    seed: int,
    functions: TextFunctions,
) -> dict[str, Dataset]:
    """Return the training and validation pairs of `count` captions, with negatives that
    are made of these alone.
    """
    parts = {
        split: take(splits[split], count * share // 10, seed)
        for split, share in SHARES.items()
    }
    return add_negatives(parts, {split: CleaningReport() for split in parts}, functions)


def take(data: Dataset, count: int, seed: int) -> Dataset:
    """Return `count` images with their first captions, in an order that depends on the
    seed alone.
    """
    first_rows: dict[str, int] = {}
    for row, sample in enumerate(data.samples):
        first_rows.setdefault(sample.image, row)
    order = list(first_rows.values())
    Random(seed).shuffle(order)
    taken = [data.samples[row] for row in sorted(order[:count])]
    return replace(
        data,
        samples=[replace(each, negatives=(), negative_categories=()) for each in taken],
    )


if __name__ == "__main__":
    main()
