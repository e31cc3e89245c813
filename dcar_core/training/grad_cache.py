"""One optimisation step's loss and gradients.

    L = L_con + lambda L_cate + mu L_head + nu L_anchor      (section 4 of the method)

InfoNCE compares every pair of the batch with every other, so a batch that is computed in parts (to fit a small device)
or by several processes must not become several small batches. Features of all parts come first, then the loss's
gradient with respect to them, then part by part the way back through the encoders (GradCache, Gao et al. 2021). The
result does not depend on the number of parts and processes; more than one part costs a second forward pass.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcar_core.model.config import Amp
from dcar_core.model.dcar import DCAR
from dcar_core.model.token_weights import real_tokens
from dcar_core.training.distributed import ALONE, Group
from dcar_core.training.features import Prepared
from dcar_core.training.losses import anchor_loss, category_loss, contrastive_loss, head_loss

Rows = NDArray[np.int64]


class Precision:
    """Automatic mixed precision: "auto" takes bfloat16 or float16 on a GPU that has them, and float32 elsewhere."""

    def __init__(self, amp: Amp, device: torch.device) -> None:
        if amp == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            amp = "bfloat16" if bf16 else "float16" if device.type == "cuda" else "off"
        self.name = amp
        self._device = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "float16")

    def autocast(self) -> AbstractContextManager[None]:
        if self.name == "off":
            return nullcontext()
        return torch.autocast(self._device, dtype=getattr(torch, self.name))


@dataclass(frozen=True)
class _Forward:
    """text, image: (b, E) of one part. rest: its share of all terms but L_con."""

    text: Tensor
    image: Tensor
    rest: Tensor


def batch_loss(model: DCAR, data: Prepared, rows: Rows) -> Tensor:
    """L over the pairs `rows` in one pass: what `accumulate_gradients` equals."""
    found = _forward(model, data, rows, rows)
    return contrastive_loss(found.text, found.image, _positives(model, data, rows), model.backbone.scale) + found.rest


def accumulate_gradients(
    model: DCAR, data: Prepared, rows: Rows, *, parts: int = 1, group: Group = ALONE, precision: Precision | None = None
) -> float:
    """Give the trainables the (scaled) gradients of L over the pairs `rows`; returns L."""
    precision = precision or Precision("off", model.backbone.device)
    shares = [np.array_split(share, parts) for share in np.array_split(rows, group.size)]
    mine = [part for part in shares[group.rank] if len(part)]
    keeps_graph = len(mine) == 1

    def forward(part: Rows) -> _Forward:
        with precision.autocast():
            return _forward(model, data, part, rows)

    with torch.set_grad_enabled(keeps_graph):
        found = [forward(part) for part in mine]
    sizes = [sum(map(len, share)) for share in shares]
    empty = torch.empty(0, model.backbone.embed_dim, device=model.backbone.device)
    text = group.gather(torch.cat([empty, *(f.text.detach() for f in found)]), sizes).requires_grad_()
    image = group.gather(torch.cat([empty, *(f.image.detach() for f in found)]), sizes).requires_grad_()
    contrast = contrastive_loss(text, image, _positives(model, data, rows), model.backbone.scale)
    pull_text, pull_image = torch.autograd.grad(contrast, (text, image))
    at, rest = sum(sizes[: group.rank]), empty.new_zeros(())
    for i, part in enumerate(mine):
        f = found[i] if keeps_graph else forward(part)
        here = slice(at, at + len(part))
        # The gradient of this sum is L's: the pulls are L_con's with respect to the features.
        total = (f.text * pull_text[here]).sum() + (f.image * pull_image[here]).sum() + f.rest
        precision.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        rest, at = rest + f.rest.detach(), at + len(part)
    group.sum_gradients(p for _, p in model.trainables() if p.requires_grad)
    return float(contrast.detach() + group.sum(rest))


def _positives(model: DCAR, data: Prepared, rows: Rows) -> Tensor:
    return torch.from_numpy(data.positives(rows)).to(model.backbone.device)


def _forward(model: DCAR, data: Prepared, part: Rows, batch: Rows) -> _Forward:
    """The features of `part`, and what it adds to the terms that are means over the whole `batch`."""
    config, scale = model.config, model.backbone.scale
    share = len(part) / len(batch)
    tokens = data.tokens[part]
    tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
    length = tokens.shape[1]
    paired = data.pair_weights[part, :length] if data.pair_weights is not None else None
    predicted = model.predicted_weights(tokens)
    used = {"none": None, "pair": paired, "predicted": predicted}[config.reweight.train]
    if model.text_is_frozen and data.captions is not None:
        text = model.adapt_text(data.captions[part])
    else:
        text = model.encode_text(tokens, used)
    image = _images(model, data, part)
    text, image = text.float(), image.float()
    adapter, captions, rest = model.category_adapter(), None, scale.new_zeros(())
    if adapter is not None and data.caption_features is not None:
        captions = adapter(data.caption_features[part]).float()
    with torch.autocast(image.device.type, enabled=False):  # bfloat16 tells logits at CLIP's scale apart by 0.1 to 0.5
        if captions is not None and data.matching is not None:
            rest = rest + share * config.loss.category * category_loss(image, captions, data.matching[part], scale)
        if predicted is not None and paired is not None:
            real = real_tokens(tokens)
            words = real.sum() / real_tokens(data.tokens[batch]).sum().clamp(min=1)
            rest = rest + words * config.loss.head * head_loss(predicted.float(), paired, real)
        if config.loss.anchor > 0 and data.images is not None and data.captions is not None:
            held = anchor_loss(image, data.images[data.image_of[part]]) + anchor_loss(text, data.captions[part])
            rest = rest + share * config.loss.anchor * held
    return _Forward(text, image, rest)


def _images(model: DCAR, data: Prepared, part: Rows) -> Tensor:
    """(b, E), each picture encoded once."""
    images, inverse = np.unique(data.image_of[part], return_inverse=True)
    if data.pixels is None:
        assert data.images is not None  # `prepare` makes one or the other
        features = model.adapt_image(data.images[images])
    else:
        pixels = torch.from_numpy(model.backbone.preprocess.normalize(data.pixels[images]))
        features = model.encode_image(pixels.to(model.backbone.device))
    return features[torch.from_numpy(inverse)]
