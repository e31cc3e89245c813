"""What a model does well and badly on a split: recall, hard negatives, categories, and what is taken for what."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core.data import Dataset
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.arrays import Floats
from dcar_core.util.retrieval_metrics import best_targets, compute_ranks, hard_negative_accuracy, recall_of_ranks

MOST_PAIRS, MOST_EXAMPLES = 8, 3


def analyse(model: DCAR, data: Dataset, prepared: PreparedSplit) -> dict[str, Any]:
    """Everything that is reported of a split, as JSON can hold it; percent.

    Returns:
        recall; hard_negative_accuracy, or None without negatives; categories: name -> pairs, t2i_r1, i2t_r1;
        confusions: the most frequent {category, taken_for, count, of, examples}, by the first picture found for a
        caption.
    """
    model.eval()
    text, image = encode_captions(model, prepared), encode_images(model, prepared)
    image_of = prepared.image_of
    found = compute_ranks(text, image, image_of)
    image_hits = dict(zip(found.described, found.image < 1, strict=True))
    negatives = _negatives(model, data)
    accuracy = hard_negative_accuracy(image[image_of], text, negatives)
    return {
        "recall": recall_of_ranks(found),
        "hard_negative_accuracy": None if np.isnan(accuracy) else accuracy,
        "categories": _categories(data, image_of, found.text < 1, image_hits),
        "confusions": _confusions(data, image_of, best_targets(text, image)),
    }


@torch.inference_mode()
def _negatives(model: DCAR, data: Dataset, batch: int = 256) -> list[Floats]:
    """Each pair's negatives (m, E), encoded as queries; each different text once."""
    wanted = [sample.negatives for sample in data.samples]
    unique = sorted({text for texts in wanted for text in texts}, key=len)  # similar lengths side by side
    row_of = {text: row for row, text in enumerate(unique)}
    parts = [np.zeros((0, model.backbone.embed_dim), np.float32)]
    for i in range(0, len(unique), batch):
        tokens = model.backbone.tokenize(unique[i : i + batch], model.prompt_tokens)
        parts.append(model.encode_query(tokens).float().cpu().numpy())
    vectors = np.concatenate(parts)
    return [vectors[[row_of[text] for text in texts]] for texts in wanted]


def _categories(
    data: Dataset, image_of: NDArray[np.int64], text_hits: NDArray[np.bool_], image_hits: dict[np.int64, np.bool_]
) -> dict[str, dict[str, float]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(data.samples):
        if sample.category:
            rows[sample.category].append(row)
    return {
        name: {
            "pairs": len(of),
            "t2i_r1": 100 * float(text_hits[of].mean()),
            "i2t_r1": 100 * float(np.mean([image_hits[i] for i in dict.fromkeys(image_of[of])])),
        }
        for name, of in sorted(rows.items())
    }


def _confusions(data: Dataset, image_of: NDArray[np.int64], first: NDArray[np.int64]) -> list[dict[str, Any]]:
    category_of: dict[int, str] = {}
    name_of: dict[int, str] = {}
    asked: dict[str, int] = defaultdict(int)
    for sample, image in zip(data.samples, image_of, strict=True):
        category_of.setdefault(int(image), sample.category)
        name_of.setdefault(int(image), sample.image)
        asked[sample.category] += 1
    pairs: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for sample, image in zip(data.samples, first, strict=True):
        other = category_of[int(image)]
        if sample.category and other and other != sample.category:
            example = {"caption": sample.caption, "image": sample.image, "found": name_of[int(image)]}
            pairs[sample.category, other].append(example)
    most = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_PAIRS]
    return [
        {"category": a, "taken_for": b, "count": len(examples), "of": asked[a], "examples": examples[:MOST_EXAMPLES]}
        for (a, b), examples in most
    ]
