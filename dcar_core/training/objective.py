"""The objective of a batch: the loss terms of a method over its pairs.

    L = L_con + lambda L_cate + mu L_head + nu L_anchor      (section 4 of the method)

`batch_terms` compares every pair with every other; the other terms are means, to which each part of a batch adds its
share.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcar_core.model.dcar import DCAR
from dcar_core.training.losses import anchor_loss, category_loss, contrastive_loss, head_loss
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.util.arrays import Rows


@dataclass(frozen=True)
class PartOutput:
    """Features (b, E) of one part, and its share of all loss terms except L_con."""

    text: Tensor
    image: Tensor
    other_losses: Tensor


def batch_loss(model: DCAR, data: PreparedSplit, rows: Rows) -> Tensor:
    """Return L over the pairs `rows` in one pass: the reference for `accumulate_gradients`."""
    output = encode_part(model, data, rows, rows)
    return batch_terms(model, data, rows, output.text, output.image) + output.other_losses + penalty_term(model)


def batch_terms(model: DCAR, data: PreparedSplit, rows: Rows, text: Tensor, image: Tensor) -> Tensor:
    """Return the loss terms that compare every pair of the batch with every other."""
    config, scale = model.config.loss, model.backbone.scale
    positives = torch.from_numpy(data.positives(rows)).to(model.backbone.device)
    loss = contrastive_loss(text, image, positives, scale, config.direction)
    further = model.method.batch_loss
    if further is not None and data.image_features is not None and data.text_features is not None:
        frozen_text, frozen_image = data.text_features[rows], data.image_features[data.image_of[rows]]
        loss = loss + further(text, image, frozen_text, frozen_image, scale)
    return loss


def penalty_term(model: DCAR) -> Tensor:
    """Return the term that depends on the weights alone."""
    if model.changes is None or model.method.penalty is None:
        return model.backbone.scale.new_zeros(())
    return model.method.penalty(model.changes)


def encode_part(model: DCAR, data: PreparedSplit, part: Rows, batch: Rows) -> PartOutput:
    """Encode `part`, and compute its share of the loss terms that are means over the whole `batch`."""
    config, scale = model.config, model.backbone.scale
    share = len(part) / len(batch)
    layout, tokens = model.backbone.layout, data.tokens[part]
    length = int(layout.lengths(tokens).max())
    tokens = tokens[:, :length]
    target_weights = data.pair_weights[part, :length] if data.pair_weights is not None else None
    predicted = model.predicted_weights(tokens)
    if model.text_is_frozen and data.text_features is not None:
        text = model.adapt_text(data.text_features[part])
    else:
        text = model.encode_text(tokens, target_weights)
    image = _encode_images(model, data, part)
    text, image = text.float(), image.float()
    adapter, candidates, losses = model.category_adapter(), None, scale.new_zeros(())
    if adapter is not None and data.candidate_features is not None:
        candidates = adapter(data.candidate_features[part]).float()
    # bfloat16 resolves logits at CLIP's scale to 0.1 to 0.5 only, so losses are computed in float32.
    with torch.autocast(image.device.type, enabled=False):
        if candidates is not None and data.candidate_weights is not None:
            category = category_loss(image, candidates, data.candidate_weights[part], scale)
            losses = losses + share * config.loss.category * category
        if predicted is not None and target_weights is not None:
            mask = layout.caption_mask(tokens)
            token_share = mask.sum() / layout.caption_mask(data.tokens[batch]).sum().clamp(min=1)
            losses = losses + token_share * config.loss.head * head_loss(predicted.float(), target_weights, mask)
        if config.loss.anchor > 0 and data.image_features is not None and data.text_features is not None:
            image_anchor = anchor_loss(image, data.image_features[data.image_of[part]])
            anchor = image_anchor + anchor_loss(text, data.text_features[part])
            losses = losses + share * config.loss.anchor * anchor
    return PartOutput(text, image, losses)


def _encode_images(model: DCAR, data: PreparedSplit, part: Rows) -> Tensor:
    """Return image features (b, E); each image is encoded once."""
    images, inverse = np.unique(data.image_of[part], return_inverse=True)
    if data.pixels is None:
        assert data.image_features is not None  # `prepare_split` makes one or the other
        features = model.adapt_image(data.image_features[images])
    else:
        features = model.encode_image(model.backbone.normalized(data.pixels[images]))
    return features[torch.from_numpy(inverse)]
