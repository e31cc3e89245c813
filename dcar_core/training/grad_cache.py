"""Loss and gradients of one optimisation step, for a batch that is computed in parts or by several processes.

    L = L_con + lambda L_cate + mu L_head + nu L_anchor      (section 4 of the method)

- InfoNCE compares every pair of the batch with every other, so a batch in parts must not become several small batches.
- GradCache (Gao et al. 2021): compute the features of all parts, then the gradient of the loss with respect to the
  features, then backpropagate part by part through the encoders.
- The result does not depend on the number of parts and processes. More than one part costs a second forward pass.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcar_core.model.config import Amp
from dcar_core.model.dcar import DCAR
from dcar_core.training.distributed import SINGLE_PROCESS, ProcessGroup
from dcar_core.training.losses import anchor_loss, category_loss, contrastive_loss, head_loss
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.util.arrays import Rows


def resolve_amp(amp: Amp, device: torch.device) -> Amp:
    """Return the precision that "auto" means: bfloat16 or float16 on a GPU, and float32 ("off") elsewhere."""
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


class MixedPrecision:
    """Automatic mixed precision on a device."""

    def __init__(self, amp: Amp, device: torch.device) -> None:
        self.name = resolve_amp(amp, device)
        self._device = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "float16")

    def autocast(self) -> AbstractContextManager[None]:
        if self.name == "off":
            return nullcontext()
        return torch.autocast(self._device, dtype=getattr(torch, self.name))


@dataclass(frozen=True)
class _PartOutput:
    """Features (b, E) of one part, and its share of all loss terms except L_con."""

    text: Tensor
    image: Tensor
    other_losses: Tensor


def batch_loss(model: DCAR, data: PreparedSplit, rows: Rows) -> Tensor:
    """Return L over the pairs `rows` in one pass: the reference for `accumulate_gradients`."""
    output = _forward(model, data, rows, rows)
    return _batch_terms(model, data, rows, output.text, output.image) + output.other_losses + _penalty(model)


def accumulate_gradients(
    model: DCAR,
    data: PreparedSplit,
    rows: Rows,
    *,
    parts: int = 1,
    group: ProcessGroup = SINGLE_PROCESS,
    precision: MixedPrecision | None = None,
) -> float:
    """Set the trainables' (scaled) gradients of L over the pairs `rows`; return L."""
    precision = precision or MixedPrecision("off", model.backbone.device)
    shares = [np.array_split(share, parts) for share in np.array_split(rows, group.size)]
    local_parts = [part for part in shares[group.rank] if len(part)]
    keeps_graph = len(local_parts) == 1

    def forward(part: Rows) -> _PartOutput:
        with precision.autocast():
            return _forward(model, data, part, rows)

    with torch.set_grad_enabled(keeps_graph):
        outputs = [forward(part) for part in local_parts]
    sizes = [sum(map(len, share)) for share in shares]
    empty = torch.empty(0, model.backbone.embed_dim, device=model.backbone.device)
    text = group.gather(torch.cat([empty, *(out.text.detach() for out in outputs)]), sizes).requires_grad_()
    image = group.gather(torch.cat([empty, *(out.image.detach() for out in outputs)]), sizes).requires_grad_()
    contrastive = _batch_terms(model, data, rows, text, image)
    text_grad, image_grad = torch.autograd.grad(contrastive, (text, image))
    start, other_losses = sum(sizes[: group.rank]), empty.new_zeros(())
    for i, part in enumerate(local_parts):
        out = outputs[i] if keeps_graph else forward(part)
        own = slice(start, start + len(part))
        # The gradient of this sum equals that of L, because the feature gradients are those of L_con.
        surrogate = (out.text * text_grad[own]).sum() + (out.image * image_grad[own]).sum() + out.other_losses
        precision.scaler.scale(surrogate).backward()  # type: ignore[no-untyped-call]
        other_losses, start = other_losses + out.other_losses.detach(), start + len(part)
    penalty = _penalty(model)
    if penalty.requires_grad and group.is_leader:
        precision.scaler.scale(penalty).backward()  # type: ignore[no-untyped-call]
    group.sum_gradients(p for _, p in model.trainables() if p.requires_grad)
    return float(contrastive.detach() + group.sum(other_losses) + penalty.detach())


def _batch_terms(model: DCAR, data: PreparedSplit, rows: Rows, text: Tensor, image: Tensor) -> Tensor:
    """Return the loss terms that compare every pair of the batch with every other."""
    config, scale = model.config.loss, model.backbone.scale
    positives = torch.from_numpy(data.positives(rows)).to(model.backbone.device)
    loss = contrastive_loss(text, image, positives, scale, config.direction)
    further = model.method.batch_loss
    if further is not None and data.image_features is not None and data.text_features is not None:
        frozen_text, frozen_image = data.text_features[rows], data.image_features[data.image_of[rows]]
        loss = loss + further(text, image, frozen_text, frozen_image, scale)
    return loss


def _penalty(model: DCAR) -> Tensor:
    """Return the term that depends on the weights alone."""
    if model.changes is None or model.method.penalty is None:
        return model.backbone.scale.new_zeros(())
    return model.method.penalty(model.changes)


def _forward(model: DCAR, data: PreparedSplit, part: Rows, batch: Rows) -> _PartOutput:
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
    return _PartOutput(text, image, losses)


def _encode_images(model: DCAR, data: PreparedSplit, part: Rows) -> Tensor:
    """Return image features (b, E); each image is encoded once."""
    images, inverse = np.unique(data.image_of[part], return_inverse=True)
    if data.pixels is None:
        assert data.image_features is not None  # `prepare_split` makes one or the other
        features = model.adapt_image(data.image_features[images])
    else:
        features = model.encode_image(model.backbone.normalized(data.pixels[images]))
    return features[torch.from_numpy(inverse)]
