"""Analysis of a model: recall, hard negatives, recall by category and confused categories, and the cost of serving."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch

from dcar_core.data import Dataset
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.training.validation import encode_captions, encode_images, rerank
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.bootstrap import Scores
from dcar_core.util.retrieval_metrics import (
    Ranks,
    compute_ranks,
    first_targets,
    hard_negative_accuracy,
    ndcg,
    recall_of_ranks,
)

MAX_CONFUSIONS = 8
_BY_VECTORS_ALONE: dict[str, Any] = {"measures": {}, "hard_negative_accuracy": None, "confusions": []}
_BATCH = 256  # negatives that are encoded at a time


def analyse(model: DCAR, data: Dataset, split: PreparedSplit) -> dict[str, Any]:
    """Return the results of a split, serialisable as JSON; figures are percentages.

    Returns:
        test: the recall; hard_negative_accuracy, None without negatives; categories: name -> pairs, t2i_r1, i2t_r1;
        confusions: the most frequent {category, taken_for, count, of}, by the first image found for each caption;
        scores: queries and sums of `bootstrap.Scores`; measures: others by their headings; reranked: what differs with
        `rerank`, of a model with a second stage.
    """
    model.eval()
    text, image = encode_captions(model, split), encode_images(model, split)
    ranks, first_image = compute_ranks(text, image, split.image_of), first_targets(text, image, 1)[:, 0]
    again = rerank(model, split, text, image) if model.config.rerank.blocks else None
    images_of, texts_of = split.right_answers()
    return {
        **_by_ranks(data, split, ranks),
        "hard_negative_accuracy": hard_negative_accuracy(image[split.image_of], text, encode_negatives(model, data)),
        "confusions": _confusions(data, split.image_of, first_image),
        "measures": {
            "nDCG@10 text-to-image": ndcg(text, image, images_of),
            "nDCG@10 image-to-text": ndcg(image, text, texts_of),
        },
        **({"reranked": _by_ranks(data, split, again) | _BY_VECTORS_ALONE} if again else {}),
    }


def _by_ranks(data: Dataset, split: PreparedSplit, ranks: Ranks) -> dict[str, Any]:
    scores = Scores.of_ranks(ranks, split.image_of)
    return {
        "test": recall_of_ranks(ranks),
        "categories": _recall_by_category(data, split.image_of, ranks),
        "scores": [scores.queries.tolist(), scores.sums.tolist()],
    }


def serving_cost(model: DCAR) -> dict[str, Any]:
    """Return the cost of one more domain.

    Returns:
        bytes: of the parameters that serving needs. backbone: "shared" with other domains or "own".
        gallery: after a training, "unchanged", "recomputed" from its frozen features, or "encoded again".
    """
    own = model.changes is not None
    weights = model.backbone.clip.state_dict().values() if own else [parameter for _, parameter in model.served()]
    again = "unchanged" if model.image_adapter is None else "recomputed"
    return {
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "backbone": "own" if own else "shared",
        "gallery": again if model.image_is_frozen else "encoded again",
    }


@torch.inference_mode()
def encode_negatives(model: DCAR, data: Dataset) -> list[Floats]:
    """Encode each pair's negatives (m, E) as queries; equal texts are encoded once."""
    negatives = [sample.negatives for sample in data.samples]
    unique = sorted({text for texts in negatives for text in texts}, key=len)  # similar lengths share a batch
    row_of = {text: row for row, text in enumerate(unique)}
    batches = (unique[i : i + _BATCH] for i in range(0, len(unique), _BATCH))
    tokens = (model.backbone.tokenize(batch, model.prompt_tokens) for batch in batches)
    encoded = (model.encode_query(part).float().cpu().numpy() for part in tokens)
    vectors = np.concatenate([np.zeros((0, model.backbone.embed_dim), np.float32), *encoded])
    return [vectors[[row_of[text] for text in texts]] for texts in negatives]


def _recall_by_category(data: Dataset, image_of: Rows, ranks: Ranks) -> dict[str, dict[str, float]]:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(data.samples):
        rows_of[sample.category].append(row)
    return {
        name: {
            "pairs": len(rows),
            "t2i_r1": 100 * float((ranks.text[rows] < 1).mean()),
            "i2t_r1": 100 * float((ranks.image[np.unique(image_of[rows])] < 1).mean()),
        }
        for name, rows in sorted(rows_of.items())
        if name
    }


def _confusions(data: Dataset, image_of: Rows, first_image: Rows) -> list[dict[str, Any]]:
    captions_in = Counter(sample.category for sample in data.samples)
    _, firsts = np.unique(image_of, return_index=True)  # the first pair of each image
    confused = Counter[tuple[str, str]]()
    for sample, image in zip(data.samples, first_image, strict=True):
        category, found = sample.category, data.samples[firsts[image]].category
        if category and found and found != category:
            confused[category, found] += 1
    most_frequent = sorted(confused.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSIONS]
    return [
        {"category": category, "taken_for": other, "count": count, "of": captions_in[category]}
        for (category, other), count in most_frequent
    ]
