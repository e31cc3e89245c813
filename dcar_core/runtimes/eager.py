"""PyTorch as a runtime: the graphs as they are, with converted weights, or compiled; on the processor or on a GPU."""

from typing import Any

import torch
from torch import Tensor, nn

from dcar_core.runtimes.graph_modules import ImageGraph, convert_weights
from dcar_core.runtimes.protocol import TextPrompts
from dcar_core.runtimes.text_graphs import TextGraph
from dcar_core.util.arrays import Floats, Pixels, TokenIds


class TorchRuntime:
    """Both graphs in PyTorch.

    One compilation, of seconds or a minute, serves every batch and length, except that PyTorch tells size 1 apart: a
    handful of graphs in all. CUDA graphs would need one for each shape, and belong to the thread that recorded them.
    """

    def __init__(
        self, name: str, text: TextGraph, image: ImageGraph, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        self.name = name
        self._device, self._dtype = image.scale.device, dtype
        is_same = dtype == torch.float32
        self._text: nn.Module = text if is_same else convert_weights(text, dtype)
        self._image: nn.Module = image if is_same else convert_weights(image, dtype)
        if compiled:
            self._text.compile(dynamic=True)
            self._image.compile(dynamic=True)

    @torch.inference_mode()
    def text(self, tokens: TokenIds, weights: Floats, prompts: TextPrompts) -> Floats:
        ids, *rest = prompts.graph_inputs(tokens, weights)
        return _to_numpy(self._text(self._on_device(ids), *(self._cast(each) for each in rest)))

    @torch.inference_mode()
    def image(self, pixels: Pixels, inputs: tuple[Floats, ...]) -> Floats:
        return _to_numpy(self._image(self._on_device(pixels), *map(self._cast, inputs)))

    def _on_device(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _cast(self, values: Any) -> Tensor:
        return self._on_device(values).to(self._dtype)


def _to_numpy(features: Tensor) -> Floats:
    return features.float().cpu().numpy()
