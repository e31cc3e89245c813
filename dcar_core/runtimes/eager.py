"""PyTorch as a runtime: as it is, with converted weights, or compiled; on the processor or on a GPU."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.runtimes.graph_modules import ImageTower, TextTower, converted
from dcar_core.runtimes.protocol import Prefix
from dcar_core.util.arrays import Floats


class PlainRuntime:
    """The backbone's own encoders, for blocks that `towers` does not know."""

    def __init__(self, backbone: Backbone) -> None:
        self.name = "torch"
        self._backbone = backbone

    @torch.inference_mode()
    def text(self, tokens: NDArray[np.int64], weights: Floats, prefix: Prefix) -> Floats:
        backbone = self._backbone
        start = backbone.tokenize([""])[0, :1].expand(len(tokens), 1)
        whole = torch.cat([start, self._given(tokens)], 1)  # [B, 1 + n]
        factors = torch.cat([torch.ones_like(start, dtype=torch.float32), self._given(weights)], 1)
        prompts = None if prefix.prompts is None else self._given(prefix.prompts)
        return _floats(backbone.encode_text(whole, prompts, factors))

    @torch.inference_mode()
    def image(self, pixels: NDArray[np.uint8], prompts: Floats | None) -> Floats:
        batch = self._given(self._backbone.preprocess.normalize(pixels))
        return _floats(self._backbone.encode_image(batch, None if prompts is None else self._given(prompts)))

    def _given(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._backbone.device)


class TorchRuntime:
    """The towers, with weights of a type; optionally compiled.

    One compilation, of seconds or a minute, serves every batch and every length, but for the sizes 1 and not 1, which
    PyTorch tells apart: a handful of graphs in all. One for each shape would be dozens, of which it takes eight.
    CUDA graphs are not used, for the same reason, and as they belong to the thread that recorded them.
    """

    def __init__(
        self, name: str, text: TextTower, image: ImageTower, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        self.name = name
        self._device, self._dtype = text.mask.device, dtype
        same = dtype == torch.float32
        self._text: nn.Module = text if same else converted(text, dtype)
        self._image: nn.Module = image if same else converted(image, dtype)
        if compiled:
            self._text.compile(dynamic=True)
            self._image.compile(dynamic=True)

    @torch.inference_mode()
    def text(self, tokens: NDArray[np.int64], weights: Floats, prefix: Prefix) -> Floats:
        keys, values = self._cast(prefix.keys), self._cast(prefix.values)
        return _floats(self._text(self._given(tokens), self._cast(weights), keys, values))

    @torch.inference_mode()
    def image(self, pixels: NDArray[np.uint8], prompts: Floats | None) -> Floats:
        given = self._given(pixels)
        return _floats(self._image(given) if prompts is None else self._image(given, self._cast(prompts)))

    def _given(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _cast(self, values: Floats) -> Tensor:
        return self._given(values).to(self._dtype)


def _floats(features: Tensor) -> Floats:
    return features.float().cpu().numpy()
