"""The training of a second stage (`model.query_prompts`), on the images nearest to each caption [ours].

The first stage stays as it is. What its towers give for each caption and each image is computed once, so this takes
about a minute for thousands of pairs. The validation split then chooses the weight of the second score; 0 is one.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dcar_core.model.dcar import DCAR, SecondStage
from dcar_core.model.query_prompts import take
from dcar_core.model.towers.image import ClassRowInputs
from dcar_core.training.hard_negatives import BATCH, hard_batches, nearest_wrong_images
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.training.validation import (
    caption_parts,
    encode_captions,
    encode_images,
    first_images,
    mean_r1,
    pixels_of_split,
)
from dcar_core.util.arrays import Rows
from dcar_core.util.retrieval_metrics import compute_ranks, recall_of_ranks

EPOCHS, LEARNING_RATE, LATE_LEARNING_RATE = 6, 1e-3, 3e-3
WEIGHTS = (0.0, 1.0, 0.5)  # of the second score; the first wins a tie
MAX_BYTES = 2 * 2**30  # of images in memory: 5,700 for a ViT-B/32. Of more, a random part is learned from
_IMAGES = 32


def train_second_stage(model: DCAR, training: PreparedSplit, validation: PreparedSplit, seed: int) -> None:
    """Train the second stage in place, and set its weight."""
    with torch.enable_grad():
        _learn(model, training, seed)
    text, image = encode_captions(model, validation), encode_images(model, validation)
    ranks, first = compute_ranks(text, image, validation.image_of), first_images(model, validation, text, image)
    recalls = {
        weight: recall_of_ranks(ranks.reordered(first.rows, first.scores(weight), validation.image_of))
        for weight in WEIGHTS
    }
    best = max(WEIGHTS, key=lambda weight: mean_r1(recalls[weight]))
    model.config = model.config.with_rerank_weight(best)


def _learn(model: DCAR, split: PreparedSplit, seed: int) -> None:
    """Minimise the cross-entropy of each caption's image among it and hard negatives, by each part of the score."""
    stage, random, scale = SecondStage(model), np.random.default_rng(seed), model.scale.detach()
    kept, images = image_parts(stage, split, random)
    pairs = np.flatnonzero(np.isin(split.image_of, kept))
    texts, own = caption_parts(stage, split.tokens[pairs]), np.searchsorted(kept, split.image_of[pairs])
    right, _ = split.right_answers()
    answers = [np.flatnonzero(np.isin(kept, right[pair])) for pair in pairs]
    nearest = nearest_wrong_images(texts.vectors, stage.vectors(images), answers)
    late = [*stage.layers.word.parameters(), *stage.layers.patch.parameters(), stage.layers.late_scale]
    prompts = [*stage.layers.down.parameters(), *stage.layers.up.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": prompts, "lr": LEARNING_RATE}, {"params": late, "lr": LATE_LEARNING_RATE}], weight_decay=1e-2
    )
    batches = hard_batches(torch.from_numpy(own).to(nearest.device), nearest, optimizer, EPOCHS, random)
    total = EPOCHS * math.ceil(len(own) / BATCH)
    for rows, shown in tqdm(batches, "training the second stage", total, unit="batch"):
        repeated = rows[:, None].expand_as(shown).flatten()
        of_text, of_image = take(texts, repeated), take(images, shown.flatten())
        prompted = scale * stage.prompted(of_text, of_image).view_as(shown)
        words = stage.layers.late_scale.exp() * stage.layers.late(of_text, of_image.patches).view_as(shown)
        target = torch.zeros_like(rows)
        loss = F.cross_entropy(prompted, target) + F.cross_entropy(words, target)
        for parameter, gradient in zip(prompts + late, torch.autograd.grad(loss, prompts + late), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(prompts, 1.0)
        torch.nn.utils.clip_grad_norm_(late, 1.0)
        optimizer.step()


def image_parts(stage: SecondStage, split: PreparedSplit, random: np.random.Generator) -> tuple[Rows, ClassRowInputs]:
    """Return the rows of images that fit into MAX_BYTES, sorted, and their parts in half precision."""

    def parts_of(rows: Rows) -> ClassRowInputs:
        found = stage.images(stage.image_rows(stage.model.backbone.normalized(pixels_of_split(split)[rows])))
        return ClassRowInputs(*(each.half() for each in found))

    images = int(split.image_of.max()) + 1
    bytes_each = sum(each.nbytes for each in parts_of(np.arange(1)))
    kept = np.sort(random.permutation(images)[: max(2, MAX_BYTES // bytes_each)])
    chunks = np.array_split(kept, range(_IMAGES, len(kept), _IMAGES))
    read = tqdm(chunks, "images of the second stage", unit=f"x {_IMAGES}", leave=False)
    return kept, ClassRowInputs(*map(torch.cat, zip(*map(parts_of, read), strict=True)))
