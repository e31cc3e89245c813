"""PyTorch as a runtime: the graphs as they are, with converted weights, or compiled; on the processor or on a GPU."""

from functools import partial
from typing import Any

import torch
from torch import nn

from dcar_core.runtimes.graph_modules import ImageGraph, convert_weights
from dcar_core.runtimes.protocol import Runtime
from dcar_core.runtimes.text_graphs import TextGraph
from dcar_core.util.arrays import Floats


class TorchRuntime(Runtime):
    """Both graphs in PyTorch.

    One compilation, of seconds or a minute, serves every batch and length, except those of size 1, for which PyTorch
    compiles other graphs. CUDA graphs are not used: each shape would need one, and only the thread that recorded a
    graph can run it.
    """

    def __init__(
        self, name: str, text: TextGraph, image: ImageGraph, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        graphs: list[nn.Module] = [text, image]
        if dtype != torch.float32:
            graphs = [convert_weights(graph, dtype) for graph in graphs]
        if compiled:
            for graph in graphs:
                graph.compile(dynamic=True)
        super().__init__(name, *(partial(_run, graph, image.scale.device, dtype) for graph in graphs))


@torch.inference_mode()
def _run(graph: nn.Module, device: torch.device, dtype: torch.dtype, inputs: tuple[Any, ...]) -> Floats:
    """inputs: token ids or pixels, then whatever takes the type of the weights."""
    first, *rest = (torch.from_numpy(each).to(device, non_blocking=True) for each in inputs)
    features: Floats = graph(first, *(each.to(dtype) for each in rest)).float().cpu().numpy()
    return features
