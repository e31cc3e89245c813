"""Do weights of words help a search? Recall with them, with the same ones on other
words, and without.

    dcar evaluate --data examples/emoji/twemoji --model examples/emoji/base --epochs 5
        --amp bfloat16 --out results \\ --methods dcar,dcar+
    python benchmarks/word_weights.py examples/emoji/twemoji results/runs/*/* --model
    examples/emoji/base

- DCAR's weights multiply the embeddings of a query. `predicted` ones are of the text
  alone; `exact` ones are of the query's own image, which no search knows.
- `shuffled` weights are those of other tokens of the caption. Weights count if they
  beat these and none.
- Seeds are averaged. Intervals resample whole categories if training has none of them.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcar_core.data import SPLITS, Annotations
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import load_checkpoint
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import (
    FeatureCache,
    FrozenFeatures,
    PreparedSplit,
    prepare_split,
)
from dcar_core.training.validation import encode_images, new_categories
from dcar_core.util.metrics import Comparison, Ranks, Scores, compute_ranks

CHUNK = 32
Rows = dict[str, Ranks]


def shuffled(weights: Tensor, mask: Tensor) -> Tensor:
    """Move the weights (N, .., n) of each caption to others of its tokens. mask: bool
    (N, n).
    """
    random = np.random.default_rng(0)
    moved = weights.clone()
    for own, new, real in zip(weights, moved, mask, strict=True):
        places = real.nonzero()[:, 0]
        new[..., places] = own[
            ..., places[torch.from_numpy(random.permutation(len(places)))]
        ]
    return moved


def weighted_queries(model: DCAR, split: PreparedSplit, frozen: FrozenFeatures) -> Rows:
    """Return the ranks with weights of the queries' tokens."""
    tokens = split.tokens
    image = encode_images(model, split)
    config = model.config.reweight
    mask = model.backbone.layout.caption_mask(tokens)
    predicted = model.predicted_weights(tokens)
    exact = frozen.pair_weights(tokens, config)
    assert predicted is not None  # the model has a head
    inverted = torch.where(mask, (2 - predicted).clamp(config.low, config.high), 1.0)
    weights = {
        "predicted": predicted,
        "predicted, shuffled": shuffled(predicted, mask),
        "predicted, inverted": inverted,
        "exact": exact,
        "exact, shuffled": shuffled(exact, mask),
    }
    found = {}
    for name, factors in {"no weights": torch.ones_like(exact), **weights}.items():
        parts = zip(tokens.split(CHUNK), factors.split(CHUNK), strict=True)
        text = torch.cat([model.encode_text(*part) for part in parts]).numpy()
        found[name] = compute_ranks(text, image, split.image_of)
    return found


@torch.inference_mode()
def main() -> None:
    """Print a table for each method with weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        help="several of a method are its seeds",
    )
    parser.add_argument("--model", required=True, help="the model that they share")
    parser.add_argument(
        "--split",
        default="val",
        choices=SPLITS,
        help="default: %(default)s",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    splits, _ = Annotations(args.data).load_all(("train", args.split))
    data = splits[args.split]
    groups = new_categories(splits["train"], splits[args.split])
    backbone = load_backbone(BackboneSource(args.model))
    frozen = FrozenFeatures(data, backbone, FeatureCache(None, backbone))
    hits = defaultdict[str, dict](dict)
    for directory in args.checkpoints:
        model, _ = load_checkpoint(directory, backbone=backbone)
        split = prepare_split(data, model.eval(), for_training=False)
        found: Rows = {}
        if model.head is not None:
            found = weighted_queries(model, split, frozen)
        for name, ranks in found.items():
            own = Scores.of_ranks(ranks, split.image_of)
            hits[model.config.method].setdefault(name, []).append(
                own if groups is None else own.grouped(groups)
            )
    for method, rows in hits.items():
        base = "no weights"
        print(
            f"\n| {method}, {len(rows[base])} seeds | text-to-image R@1 | over {base}"
            " |\n| --- | --- | --- |"
        )
        for name, runs in rows.items():
            found = Comparison.of(Scores.mean(runs), Scores.mean(rows[base]))
            print(
                f"| {name} | {found.model['t2i_r1'].value:.1f} |"
                f" {found.difference['t2i_r1']:+} |"
            )


if __name__ == "__main__":
    main()
