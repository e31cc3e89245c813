"""The objective of a batch, and its gradients.

    L = L_con + lambda L_cate + mu L_head + nu L_anchor      (section 4 of the method)

- InfoNCE compares every pair of the batch with every other, so a batch in parts must
  not become several small batches.
- GradCache (Gao et al. 2021): compute the features of all parts, then the gradient of
  the loss with respect to the features, then backpropagate part by part through the
  encoders. The result does not depend on the number of parts.
"""

import logging
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_core.model.config import Amp, LossDirection
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.util import machine
from dcar_core.util.arrays import Rows

logger = logging.getLogger(__name__)


def resolve_amp(amp: Amp, device: torch.device) -> Amp:
    """Return the precision that "auto" means: bfloat16 or float16 on a GPU, and float32
    ("off") elsewhere.
    """
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16"


@cache
def warn_once(message: str) -> None:
    """Log a warning, the same one once in a process."""
    logger.warning(message)


class MixedPrecision:
    """Automatic mixed precision on a device."""

    def __init__(self, amp: Amp, device: torch.device) -> None:
        self.name = resolve_amp(amp, device)
        if (
            self.name == "bfloat16"
            and device.type == "cpu"
            and (reason := machine.missing_bf16())
        ):
            warn_once(
                f"--amp bfloat16 is many times slower than --amp off here: {reason}"
            )
        dtype = getattr(torch, self.name, None)
        self.autocast = partial(
            torch.autocast,
            device.type,
            dtype,
            enabled=self.name != "off",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "float16")


def accumulate_gradients(
    model: DCAR,
    data: PreparedSplit,
    rows: Rows,
    *,
    parts: int = 1,
    precision: MixedPrecision | None = None,
) -> float:
    """Set the trainables' (scaled) gradients of L over the pairs `rows`; return L."""
    precision = precision or MixedPrecision("off", model.backbone.device)
    if parts > 1:
        return _gradients_in_parts(
            model,
            data,
            rows,
            np.array_split(rows, min(parts, len(rows))),
            precision,
        )
    loss = objective(model, data, rows, precision)
    torch.autograd.backward(precision.scaler.scale(loss))
    return float(loss.detach())


def objective(
    model: DCAR,
    data: PreparedSplit,
    rows: Rows,
    precision: MixedPrecision,
) -> Tensor:
    """Return L over the pairs `rows`."""
    with precision.autocast():
        text, image, others = encode_part(model, data, rows, rows)
    return batch_terms(model, data, rows, text, image) + others + penalty_term(model)


def _gradients_in_parts(
    model: DCAR,
    data: PreparedSplit,
    rows: Rows,
    parts: list[Rows],
    precision: MixedPrecision,
) -> float:
    """Set the gradients by GradCache, which costs a second forward pass; return L."""

    def forward(part: Rows) -> tuple[Tensor, Tensor, Tensor]:
        with precision.autocast():
            return encode_part(model, data, part, rows)

    with torch.no_grad():
        texts, images, _ = zip(*map(forward, parts), strict=True)
    text = torch.cat(texts).requires_grad_()
    image = torch.cat(images).requires_grad_()
    batch = batch_terms(model, data, rows, text, image) + penalty_term(model)
    torch.autograd.backward(precision.scaler.scale(batch))
    assert text.grad is not None
    assert image.grad is not None
    total = batch.detach()
    sizes = [len(part) for part in parts]
    gradients = torch.split(text.grad, sizes), torch.split(image.grad, sizes)
    for part, text_grad, image_grad in zip(parts, *gradients, strict=True):
        own_text, own_image, others = forward(part)
        # The gradient of this sum equals that of L, because the feature gradients are
        # those of L_con.
        surrogate = (
            (own_text * text_grad).sum()
            + (own_image * image_grad).sum()
            + precision.scaler.scale(others)
        )
        torch.autograd.backward(surrogate)
        total = total + others.detach()
    return float(total)


def batch_terms(
    model: DCAR,
    data: PreparedSplit,
    rows: Rows,
    text: Tensor,
    image: Tensor,
) -> Tensor:
    """Return the loss terms that compare every pair of the batch with every other."""
    method = model.method
    options = model.config.loss
    positives = torch.from_numpy(data.positives(rows)).to(model.backbone.device)
    matching = (positives, model.backbone.scale, options.direction)
    pooled_text = text
    pooled_image = image
    if options.late:
        pooled_text = text[:, 0]
        pooled_image = image[:, 0]
    loss = contrastive_loss(pooled_text, pooled_image, *matching)
    if method.late_loss is not None:
        late_loss = method.late_loss(text[:, 1:], image[:, 1:], *matching)
        loss = loss.lerp(late_loss, options.late)
    if method.batch_loss is not None:
        assert data.text_features is not None  # `prepare_split` makes both
        assert data.image_features is not None
        frozen_text = data.text_features[rows]
        frozen_image = data.image_features[data.image_of[rows]]
        further = method.batch_loss(
            pooled_text,
            pooled_image,
            frozen_text,
            frozen_image,
            model.backbone.scale,
        )
        loss = loss + further
    return loss


def penalty_term(model: DCAR) -> Tensor:
    """Return the term that depends on the weights alone."""
    if model.changes is None or model.method.penalty is None:
        return model.backbone.scale.new_zeros(())
    return model.method.penalty(model.changes)


def encode_part(
    model: DCAR,
    data: PreparedSplit,
    part: Rows,
    batch: Rows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return text and image features (b, E) of `part`, and its share of the terms that
    are means over `batch`.

    With late interaction, features are (b, 1 + n, E), 0 behind the caption's own
    tokens, and (b, 1 + P, E).
    """
    loss = model.config.loss
    scale = model.backbone.scale
    late = model.config.loss.late > 0
    share = len(part) / len(batch)
    layout = model.backbone.layout
    tokens = data.tokens[part]
    length = int(layout.lengths(tokens).max())
    tokens = tokens[:, :length]
    if data.pair_weights is not None:
        target_weights = data.pair_weights[part, :length]
    else:
        target_weights = None
    predicted = model.predicted_weights(tokens)
    if model.text_is_frozen and data.text_features is not None and not late:
        text = model.adapt_text(data.text_features[part]).float()
    else:
        text = model.encode_text(tokens, target_weights, rows=late).float()
    image = _encode_images(model, data, part).float()
    compared = text, image
    if late:
        own = F.pad(layout.caption_mask(tokens), (1, 0), value=True)[..., None]
        compared = F.pad(text * own, (0, 0, 0, data.tokens.shape[1] - length)), image
        text = text[:, 0]
        image = image[:, 0]
    adapter = model.category_adapter()
    candidates = None
    losses = scale.new_zeros(())
    if adapter is not None and data.candidate_features is not None:
        candidates = adapter(data.candidate_features[part]).float()
    # bfloat16 resolves logits at CLIP's scale to 0.1 to 0.5 only, so losses are
    # computed in float32.
    with torch.autocast(image.device.type, enabled=False):
        if candidates is not None and data.candidate_weights is not None:
            category = category_loss(
                image,
                candidates,
                data.candidate_weights[part],
                scale,
            )
            losses = losses + share * loss.category * category
        if predicted is not None and target_weights is not None:
            mask = layout.caption_mask(tokens)
            token_share = mask.sum() / layout.caption_mask(
                data.tokens[batch]
            ).sum().clamp(min=1)
            losses = losses + token_share * loss.head * head_loss(
                predicted.float(),
                target_weights,
                mask,
            )
        if (
            loss.anchor > 0
            and data.image_features is not None
            and data.text_features is not None
        ):
            image_anchor = anchor_loss(image, data.image_features[data.image_of[part]])
            losses = losses + share * loss.anchor * (
                image_anchor + anchor_loss(text, data.text_features[part])
            )
    return *compared, losses


def _encode_images(model: DCAR, data: PreparedSplit, part: Rows) -> Tensor:
    """Return image features (b, E), or (b, 1 + P, E) for late interaction; each image
    is encoded once.
    """
    images, inverse = np.unique(data.image_of[part], return_inverse=True)
    if data.pixels is not None:
        pixels = model.backbone.standardized(data.pixels[images])
        features = model.encode_image(pixels, rows=model.config.loss.late > 0)
    else:
        assert data.image_features is not None  # `prepare_split` makes one or the other
        features = model.adapt_image(data.image_features[images])
    return features[torch.from_numpy(inverse)]


def contrastive_loss(
    text: Tensor,
    image: Tensor,
    positives: Tensor,
    scale: Tensor,
    direction: LossDirection = "both",
) -> Tensor:
    """InfoNCE (L_con) in which a row may have several positives; symmetric by default.

    Args:
        text, image: L2-normalized features (B, E) of the pairs.
        positives: bool (B, B), true on the diagonal. True where caption i describes
            image j: it equals one of the image's captions or attributes. Such a pair is
            never a negative.
        scale: 1 / tau, CLIP's frozen temperature.
        direction: "image-to-text" classifies each image over the captions of the batch,
            and no caption over images.

    Each row's target is distributed evenly over its positives.
    """
    logits = scale * text @ image.T  # [B texts, B images]
    return matching_loss(logits, logits, positives, direction)


def matching_loss(
    by_text: Tensor,
    by_image: Tensor,
    positives: Tensor,
    direction: LossDirection,
) -> Tensor:
    """Cross-entropy of logits [B texts, B images], as texts and as images have them."""
    target = positives.float()
    rows = target / target.sum(1, keepdim=True)
    columns = target / target.sum(0, keepdim=True)
    image_to_text = -(columns * by_image.log_softmax(0)).sum(0).mean()
    if direction == "image-to-text":
        return image_to_text
    text_to_image = -(rows * by_text.log_softmax(1)).sum(1).mean()
    return (text_to_image + image_to_text) / 2


def category_loss(
    image: Tensor,
    captions: Tensor,
    weights: Tensor,
    scale: Tensor,
) -> Tensor:
    """Cross-entropy of an image over its positive caption and its negatives (L_cate).

    Args:
        image: (B, E), prompted and normalized.
        captions: (B, 1 + N, E), normalized; the positive comes first.
        weights: category-matching weights (B, 1 + N): 1 + alpha for negatives of
            another category, 1 for the positive and for negatives of the image's
            category, 0 for padding.

    Logits are s / tau + log w [ours: the paper shows w, but not where it enters]. So
    the gradient emphasises the differences between subcategories.
    """
    scores = scale * torch.einsum("be,bne->bn", image, captions) + weights.log()
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


def head_loss(predicted: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Mean squared error of the predicted token weights (L_head [ours]) over real
    tokens.

    Args:
        predicted, target: (B, n).
        real: bool (B, n), true for the caption's own tokens.
    """
    return ((predicted - target) ** 2 * real).sum() / real.sum().clamp(min=1)


def anchor_loss(adapted: Tensor, frozen: Tensor) -> Tensor:
    """Mean of 1 - cosine between adapted and frozen features (L_anchor [ours]); both
    (B, E), L2-normalized.
    """
    return (1 - (adapted * frozen).sum(-1)).mean()
