"""Additions of a model to a tower's sequence: prompt rows before its blocks, adapters behind them."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

AdapterMatrices = tuple[Tensor, Tensor]


class PromptRows:
    """Prompts in the rows [start, start + k) of a sequence; the first `depth` blocks see prompts of their own.

    prompts: (depth, k, W) for all rows of a batch or (depth, B, k, W) row by row; None without prompts.
    adapters: the lower and the upper matrices of a bottleneck behind each block, each (D, r, W) or (D, B, r, W).
    """

    def __init__(self, prompts: Tensor | None, start: int, adapters: AdapterMatrices | None = None) -> None:
        self.prompts, self.start, self.adapters = prompts, start, adapters
        self.count = 0 if prompts is None else prompts.shape[-2]

    def enter(self, x: Tensor, prepare: Callable[[Tensor], Tensor] = lambda prompts: prompts) -> Tensor:
        """(B, n, W) -> (B, n + k, W). prepare: applied to the prompts, such as the norm before the first block."""
        if self.prompts is None:
            return x
        return torch.cat([x[:, : self.start], self._expanded(prepare(self.prompts[0]), x), x[:, self.start :]], 1)

    def run(self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        """Run the blocks over (B, n + k, W), with fresh prompts before each of the first `depth`."""
        for i, block in enumerate(blocks):
            x = self.adapt(block(self.renew(x, i)), i)
        return x

    def adapt(self, x: Tensor, block: int) -> Tensor:
        """Apply the adapter behind this block, a residual bottleneck on normalized rows."""
        if self.adapters is None:
            return x
        down, up = (each[block] for each in self.adapters)  # [r, W] or [B, r, W]
        width = int(x.shape[-1])  # a constant in exports
        return x + F.relu(F.layer_norm(x, (width,)) @ down.transpose(-2, -1)) @ up

    def renew(self, x: Tensor, block: int) -> Tensor:
        """Replace the prompts' rows before this block, if it has prompts of its own."""
        if self.prompts is None or not 0 < block < self.prompts.shape[0]:
            return x
        after = x[:, self.start + self.count :]
        return torch.cat([x[:, : self.start], self._expanded(self.prompts[block], x), after], 1)

    def leave(self, x: Tensor) -> Tensor:
        """(B, n + k, W) -> (B, n, W)."""
        return x if self.prompts is None else torch.cat([x[:, : self.start], x[:, self.start + self.count :]], 1)

    def widen(self, values: Tensor, fill: int) -> Tensor:
        """(B, n) -> (B, n + k): ids or a mask, with `fill` in the prompts' places."""
        if self.prompts is None:
            return values
        rows = values.new_full((values.shape[0], self.count), fill)
        return torch.cat([values[:, : self.start], rows, values[:, self.start :]], 1)

    def _expanded(self, prompts: Tensor, x: Tensor) -> Tensor:
        return prompts.expand(x.shape[0], -1, -1)
