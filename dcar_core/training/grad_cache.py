"""Gradients of one optimisation step, for a batch that is computed in parts or by several processes.

- InfoNCE compares every pair of the batch with every other, so a batch in parts must not become several small batches.
- GradCache (Gao et al. 2021): compute the features of all parts, then the gradient of the loss with respect to the
  features, then backpropagate part by part through the encoders.
- The result does not depend on the number of parts and processes. More than one part costs a second forward pass.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from dcar_core.model.config import Amp
from dcar_core.model.dcar import DCAR
from dcar_core.training.distributed import SINGLE_PROCESS, ProcessGroup
from dcar_core.training.objective import PartOutput, batch_terms, encode_part, penalty_term
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

    def forward(part: Rows) -> PartOutput:
        with precision.autocast():
            return encode_part(model, data, part, rows)

    with torch.set_grad_enabled(keeps_graph):
        outputs = [forward(part) for part in local_parts]
    sizes = [sum(map(len, share)) for share in shares]
    empty = torch.empty(0, model.backbone.embed_dim, device=model.backbone.device)
    text = group.gather(torch.cat([empty, *(out.text.detach() for out in outputs)]), sizes).requires_grad_()
    image = group.gather(torch.cat([empty, *(out.image.detach() for out in outputs)]), sizes).requires_grad_()
    contrastive = batch_terms(model, data, rows, text, image)
    text_grad, image_grad = torch.autograd.grad(contrastive, (text, image))
    start, other_losses = sum(sizes[: group.rank]), empty.new_zeros(())
    for i, part in enumerate(local_parts):
        out = outputs[i] if keeps_graph else forward(part)
        own = slice(start, start + len(part))
        # The gradient of this sum equals that of L, because the feature gradients are those of L_con.
        surrogate = (out.text * text_grad[own]).sum() + (out.image * image_grad[own]).sum() + out.other_losses
        precision.scaler.scale(surrogate).backward()  # type: ignore[no-untyped-call]
        other_losses, start = other_losses + out.other_losses.detach(), start + len(part)
    penalty = penalty_term(model)
    if penalty.requires_grad and group.is_leader:
        precision.scaler.scale(penalty).backward()  # type: ignore[no-untyped-call]
    group.sum_gradients(p for _, p in model.trainables() if p.requires_grad)
    return float(contrastive.detach() + group.sum(other_losses) + penalty.detach())
