"""Training on hard negatives, the images nearest to each caption, after the epochs
[ours].

The towers with their prompts and block adapters stay as they are, so each caption and
each image is encoded once.

- The adapters of the features learn to order the images, in seconds. The validation
  split then chooses a point between the adapters before and after it (WiSE-FT, Wortsman
  et al. 2022), so recall there never falls.
- The second stage (`model.dcar.SecondStage`) takes about a minute for thousands of
  pairs. The validation split then chooses the weight of its score; 0 is one.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dcar_core.model.dcar import DCAR, SecondStage, take
from dcar_core.model.towers.image import ClassRowInputs
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.training.validation import (
    Recall,
    caption_parts,
    encode_captions,
    encode_images,
    first_images,
    mean_r1,
    pixels_of_split,
    tower_features,
)
from dcar_core.util.arrays import Rows
from dcar_core.util.metrics import compute_ranks, recall_at_k, recall_of_ranks

Adapters = Sequence[nn.Module]  # of texts, and of images

NEAREST = 30  # images of a caption from which its negatives are drawn
NEGATIVES = 7
EPOCHS = 4
BATCH = 64
LEARNING_RATE = 3e-3
# of the change; the first wins a tie. More than half costs recall on unseen images
SHARES = (0.5, 0.25, 0.0)
STAGE_EPOCHS = 6
PROMPTS_RATE = 1e-3
LATE_RATE = 3e-3
WEIGHTS = (0.0, 1.0, 0.5)  # of the second score; the first wins a tie
# of images in memory: 5,700 for a ViT-B/32. Of more, a random part is learned from
MAX_BYTES = 2 * 2**30
_IMAGES = 32


def tune_on_hard_negatives(
    model: DCAR,
    training: PreparedSplit,
    validation: PreparedSplit,
    seed: int,
) -> Recall:
    """Tune the feature adapters in place, and return the validation recall of the share
    that was kept.
    """
    assert model.text_adapter is not None  # every method with this stage has both
    assert model.image_adapter is not None
    adapters = (model.text_adapter, model.image_adapter)
    before = deepcopy(adapters)
    features = tower_features(model, training)
    own, (right, _) = (
        torch.from_numpy(training.image_of).to(features[0].device),
        training.right_answers(),
    )
    nearest = nearest_wrong_images(
        model.adapt_text(features[0]),
        model.adapt_image(features[1]),
        right,
    )
    learn(adapters, features, own, nearest, float(model.backbone.scale), seed)
    after = deepcopy(adapters)
    held_out = tower_features(model, validation)
    recalls = dict[float, Recall]()
    for share in SHARES:
        interpolate(adapters, before, after, share)
        with torch.inference_mode():
            text, images = (
                adapt(features).cpu().numpy()
                for adapt, features in zip(adapters, held_out, strict=True)
            )
        recalls[share] = recall_at_k(text, images, validation.image_of)
    best = max(SHARES, key=lambda share: mean_r1(recalls[share]))
    interpolate(adapters, before, after, best)
    return recalls[best]


@torch.enable_grad()
def learn(
    adapters: Adapters,
    features: tuple[Tensor, Tensor],
    own: Tensor,
    nearest: Tensor,
    scale: float,
    seed: int,
    *,
    weights: Tensor | None = None,
    epochs: int = EPOCHS,
) -> None:
    """Minimise the cross-entropy of each caption's image among it and hard negatives,
    in place.

    Args:
        features: of captions (N, E) and images (I, E), before the adapters.
        own: int64 (N,), the image of each caption.
        nearest: int64 (N, m), images from which its negatives are drawn.
        scale: 1 / tau.
        weights: (N,), of the captions.
    """
    (adapt_text, adapt_image), (texts, images) = adapters, features
    parameters = [*adapt_text.parameters(), *adapt_image.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-2)
    for rows, candidates in hard_batches(
        own,
        nearest,
        optimizer,
        epochs,
        np.random.default_rng(seed),
    ):
        shown, positions = torch.unique(candidates, return_inverse=True)
        similarity = torch.einsum(
            "be,bie->bi",
            adapt_text(texts[rows]),
            adapt_image(images[shown])[positions],
        )
        losses = F.cross_entropy(
            scale * similarity,
            torch.zeros_like(rows),
            reduction="none",
        )
        loss = losses.mean() if weights is None else (weights[rows] * losses).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def hard_batches(
    own: Tensor,
    nearest: Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    random: np.random.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield captions (B,) with their images and some of the `nearest`, (B, 1 +
    NEGATIVES), own first.

    own: (N,) the image of each caption. The optimizer's learning rates fall as a cosine
    to 0.
    """
    batches = math.ceil(len(own) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for batch in np.array_split(random.permutation(len(own)), batches):
            rows = torch.from_numpy(batch).to(own.device)
            drawn = random.random((len(rows), nearest.shape[1])).argsort(1)[
                :, :NEGATIVES
            ]
            chosen = nearest[rows].gather(1, torch.from_numpy(drawn).to(own.device))
            yield rows, torch.cat([own[rows, None], chosen], 1)
            schedule.step()


@torch.no_grad()
def nearest_wrong_images(
    texts: Tensor,
    images: Tensor,
    right: Sequence[Rows],
) -> Tensor:
    """Return the images nearest to each caption that it does not describe: int64 (N, at
    most NEAREST).

    right: the images that each caption describes.
    """
    most = max(len(answers) for answers in right)
    kept = min(NEAREST, len(images) - most)
    nearest = []
    for start in range(0, len(texts), BATCH):
        similarity = texts[start : start + BATCH] @ images.T
        for row, answers in zip(similarity, right[start : start + BATCH], strict=True):
            row[torch.from_numpy(answers).to(row.device)] = -torch.inf
        nearest.append(similarity.topk(kept).indices)
    return torch.cat(nearest)


@torch.no_grad()
def interpolate(
    adapters: Adapters,
    before: Adapters,
    after: Adapters,
    share: float,
) -> None:
    """Set the adapters to `share` of the way from `before` to `after`."""
    for own, start, end in zip(adapters, before, after, strict=True):
        for parameter, old, new in zip(
            own.parameters(),
            start.parameters(),
            end.parameters(),
            strict=True,
        ):
            # `new` may not be finite
            parameter.copy_(old + share * (new - old) if share else old)


def train_second_stage(
    model: DCAR,
    training: PreparedSplit,
    validation: PreparedSplit,
    seed: int,
) -> None:
    """Train the second stage in place, and set its weight."""
    with torch.enable_grad():
        _learn(model, training, seed)
    text = encode_captions(model, validation)
    image = encode_images(model, validation)
    ranks = compute_ranks(text, image, validation.image_of)
    first = first_images(model, validation, text, image)
    recalls = {
        weight: recall_of_ranks(
            ranks.reordered(first.rows, first.scores(weight), validation.image_of)
        )
        for weight in WEIGHTS
    }
    best = max(WEIGHTS, key=lambda weight: mean_r1(recalls[weight]))
    model.rerank_weight = best


def _learn(model: DCAR, split: PreparedSplit, seed: int) -> None:
    """Minimise the cross-entropy of each caption's image among it and hard negatives,
    by each part of the score.
    """
    stage = SecondStage(model)
    random = np.random.default_rng(seed)
    scale = model.backbone.scale
    kept, images = image_parts(stage, split, random)
    pairs = np.flatnonzero(np.isin(split.image_of, kept))
    texts = caption_parts(stage, split.tokens[pairs])
    own = np.searchsorted(kept, split.image_of[pairs])
    right, _ = split.right_answers()
    answers = [np.flatnonzero(np.isin(kept, right[pair])) for pair in pairs]
    nearest = nearest_wrong_images(texts.vectors, stage.vectors(images), answers)
    late = [
        *stage.layers.word.parameters(),
        *stage.layers.patch.parameters(),
        stage.layers.late_scale,
    ]
    prompts = [*stage.layers.down.parameters(), *stage.layers.up.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": prompts, "lr": PROMPTS_RATE}, {"params": late, "lr": LATE_RATE}],
        weight_decay=1e-2,
    )
    batches = hard_batches(
        torch.from_numpy(own).to(nearest.device),
        nearest,
        optimizer,
        STAGE_EPOCHS,
        random,
    )
    total = STAGE_EPOCHS * math.ceil(len(own) / BATCH)
    for rows, shown in tqdm(batches, "training the second stage", total, unit="batch"):
        repeated = rows[:, None].expand_as(shown).flatten()
        of_text = take(texts, repeated)
        of_image = take(images, shown.flatten())
        prompted = scale * stage.prompted(of_text, of_image).view_as(shown)
        words = stage.layers.late_scale.exp() * stage.layers.late(
            of_text, of_image.patches
        ).view_as(shown)
        target = torch.zeros_like(rows)
        loss = F.cross_entropy(prompted, target) + F.cross_entropy(words, target)
        for parameter, gradient in zip(
            prompts + late,
            torch.autograd.grad(loss, prompts + late),
            strict=True,
        ):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(prompts, 1.0)
        torch.nn.utils.clip_grad_norm_(late, 1.0)
        optimizer.step()


def image_parts(
    stage: SecondStage,
    split: PreparedSplit,
    random: np.random.Generator,
) -> tuple[Rows, ClassRowInputs]:
    """Return the rows of images that fit into MAX_BYTES, sorted, and their parts in
    half precision.
    """

    def parts_of(rows: Rows) -> ClassRowInputs:
        parts = stage.images(
            stage.image_rows(
                stage.model.backbone.standardized(pixels_of_split(split)[rows])
            )
        )
        return ClassRowInputs(*(part.half() for part in parts))

    images = int(split.image_of.max()) + 1
    bytes_each = sum(part.nbytes for part in parts_of(np.arange(1)))
    kept = np.sort(random.permutation(images)[: max(2, MAX_BYTES // bytes_each)])
    chunks = np.array_split(kept, range(_IMAGES, len(kept), _IMAGES))
    read = tqdm(chunks, "images of the second stage", unit=f"x {_IMAGES}", leave=False)
    return kept, ClassRowInputs(*map(torch.cat, zip(*map(parts_of, read), strict=True)))
