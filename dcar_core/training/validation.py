"""Encode a split as the service does: queries without their image, images without text.
Recall on the result.

Recall is that of the vectors; with a second stage (`model.dcar.SecondStage`), `rerank`
gives that of its order too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.config import QueryWeights
from dcar_core.model.dcar import DCAR, QueryParts, SecondStage, take
from dcar_core.negatives.words import fold_name
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.util.arrays import Floats, Pixels, Rows
from dcar_core.util.errors import DivergedError
from dcar_core.util.metrics import Ranks, compute_ranks, first_targets, recall_at_k

Recall = dict[str, float]
RERANKED = 10  # first images of a caption that the second stage sorts
BATCH = 128
_IMAGES = 32
_PAIRS = 256


@dataclass(frozen=True)
class FirstImages:
    """The first images of each of N captions. rows: (N, k). cosines, second: (N, k),
    the scores of both stages.
    """

    rows: Rows
    cosines: Floats
    second: Floats

    def scores(self, weight: float) -> Floats:
        """Return the scores (N, k) with this weight of the second stage."""
        return self.cosines + np.float32(weight) * self.second


def evaluate(model: DCAR, split: PreparedSplit) -> Recall:
    """Return recall at 1, 5 and 10 in both directions, in percent."""
    model.eval()
    return recall_at_k(
        encode_captions(model, split),
        encode_images(model, split),
        split.image_of,
    )


def rerank(model: DCAR, split: PreparedSplit, text: Floats, image: Floats) -> Ranks:
    """Return the ranks with the first images of each caption sorted by the second
    stage.

    text, image: vectors of the captions (N, E) and of the images (I, E).
    """
    first = first_images(model, split, text, image)
    ranks = compute_ranks(text, image, split.image_of)
    return ranks.reordered(
        first.rows,
        first.scores(model.rerank_weight),
        split.image_of,
    )


@torch.inference_mode()
def first_images(
    model: DCAR,
    split: PreparedSplit,
    text: Floats,
    image: Floats,
) -> FirstImages:
    """Search by vectors, and score the first images by the second stage; arguments as
    in `rerank`.
    """
    stage = SecondStage(model)
    backbone = model.backbone
    rows = first_targets(text, image, RERANKED)
    cosines = np.einsum("ne,nke->nk", text, image[rows])
    second = np.empty(rows.shape, np.float32)
    texts = caption_parts(stage, split.tokens)
    shown = np.unique(rows)
    for chunk in np.array_split(shown, range(_IMAGES, len(shown), _IMAGES)):
        images = stage.images(
            stage.image_rows(backbone.standardized(pixels_of_split(split)[chunk]))
        )
        captions, places = np.isin(rows, chunk).nonzero()
        for pairs in np.array_split(
            np.arange(len(captions)), range(_PAIRS, len(captions), _PAIRS)
        ):
            of_image = torch.from_numpy(
                np.searchsorted(chunk, rows[captions[pairs], places[pairs]])
            )
            scores = stage.scores(
                take(texts, torch.from_numpy(captions[pairs])), take(images, of_image)
            )
            second[captions[pairs], places[pairs]] = scores.float().cpu().numpy()
    return FirstImages(rows, cosines, second)


def caption_parts(stage: SecondStage, tokens: Tensor) -> QueryParts:
    """Return the parts of captions (N, n), words in half precision."""
    parts = [
        stage.texts(tokens[start : start + BATCH])
        for start in range(0, len(tokens), BATCH)
    ]
    return QueryParts(
        *map(
            torch.cat,
            zip(
                *(part._replace(words=part.words.half()) for part in parts), strict=True
            ),
        )
    )


def pixels_of_split(split: PreparedSplit) -> Pixels:
    """Return the images of a split whose model has a second stage."""
    assert split.pixels is not None  # its image tower is adapted
    return split.pixels


def mean_r1(recall: Recall) -> float:
    """Return the mean of R@1 in both directions, the measure by which epochs and
    settings are chosen.
    """
    return (recall["t2i_r1"] + recall["i2t_r1"]) / 2


def new_categories(training: Dataset, other: Dataset) -> Rows | None:
    """Return the number of each image's category (I,) in the other split if training
    has none of them, else None.
    """
    category_of = {
        sample.image: fold_name(sample.category) for sample in reversed(other.samples)
    }
    names = [category_of[image] for image in other.images]
    known = {fold_name(sample.category) for sample in training.samples}
    if "" in names or len(set(names)) < 2 or known.intersection(names):
        return None
    return np.unique(names, return_inverse=True)[1]


@torch.inference_mode()
def encode_captions(model: DCAR, split: PreparedSplit) -> Floats:
    """Encode each caption as a query: (N, E)."""
    return model.adapt_text(_caption_features(model, split)).cpu().numpy()


@torch.inference_mode()
def encode_images(model: DCAR, split: PreparedSplit) -> Floats:
    """Encode each image: (I, E)."""
    return model.adapt_image(_image_features(model, split)).cpu().numpy()


@torch.no_grad()
def tower_features(model: DCAR, split: PreparedSplit) -> tuple[Tensor, Tensor]:
    """Return the features of captions (N, E) and images (I, E) before the adapters,
    without gradients.
    """
    return _caption_features(model, split), _image_features(model, split)


def _caption_features(model: DCAR, split: PreparedSplit) -> Tensor:
    if model.text_is_frozen and split.text_features is not None:
        return split.text_features
    return torch.cat(
        [
            model.query_features(split.tokens[i : i + BATCH])
            for i in range(0, len(split.tokens), BATCH)
        ]
    )


def _image_features(model: DCAR, split: PreparedSplit) -> Tensor:
    if split.pixels is None:
        # `prepare_split` makes one or the other
        assert split.image_features is not None
        return split.image_features
    normalized = (
        model.backbone.standardized(split.pixels[i : i + BATCH])
        for i in range(0, len(split.pixels), BATCH)
    )
    return torch.cat([model.image_features(pixels) for pixels in normalized])


def choose_query_weights(
    model: DCAR, split: PreparedSplit
) -> tuple[QueryWeights, Recall]:
    """Choose between plain queries and predicted token weights by validation recall;
    plain queries win a tie.

    The model is set to the choice.

    Raises:
        DivergedError: an encoded vector is not finite. The last step can cause this
            after a finite loss.
    """
    options: tuple[QueryWeights, ...] = (
        ("none", "predicted") if model.head is not None else ("none",)
    )
    model.eval()
    images = encode_images(model, split)
    recalls: dict[QueryWeights, Recall] = {}
    for query in options:
        model.query_weights = query
        captions = encode_captions(model, split)
        if not (np.isfinite(captions).all() and np.isfinite(images).all()):
            raise DivergedError(
                f"{model.config.method} diverged: its vectors are not finite; use a"
                " lower --lr"
            )
        recalls[query] = recall_at_k(captions, images, split.image_of)
    best = max(options, key=lambda query: mean_r1(recalls[query]))
    model.query_weights = best
    return best, recalls[best]
