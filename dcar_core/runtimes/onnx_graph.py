"""ONNX Runtime: both graphs as ONNX files, in float32 or with weights and activations quantised on the fly to int8."""

import os
import threading
import warnings
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.runtimes.protocol import ExportRuntime
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.runtimes.graph_modules import ImageGraph
    from dcar_core.runtimes.text_graphs import TextGraph

RUNTIME, TEXT, IMAGE = "onnx", "text.onnx", "image.onnx"
_OPSET = 17


def library() -> Any:
    """Import ONNX Runtime without its telemetry, or raise MissingExtraError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("the runtime onnx", "onnx") from None
    return onnxruntime


def version() -> str:
    """The versions that an export belongs to: ONNX Runtime's and PyTorch's."""
    return f"{library().__version__} torch {version_of('torch').split('+')[0]}"


def write(directory: Path, text: "TextGraph", image: "ImageGraph") -> None:
    """Export both graphs in float32.

    PyTorch's newer exporter needs another package and fixed numbers of prompts, so this is the older one.
    """
    library()
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise MissingExtraError("exporting to ONNX", "onnx") from None
    import torch

    from dcar_core.runtimes.graph_modules import tracing

    graphs: tuple[tuple[str, TextGraph | ImageGraph], ...] = ((TEXT, text), (IMAGE, image))
    for name, graph in graphs:
        inputs, shapes = graph.example()
        names = list(graph.input_names[: len(inputs)])
        axes = {n: {i: f"{n}_{i}" for i, size in enumerate(s) if size < 0} for n, s in zip(names, shapes, strict=True)}
        with tracing(graph):
            torch.onnx.export(
                graph, inputs, directory / name, dynamo=False, opset_version=_OPSET, input_names=names,
                output_names=["features"], dynamic_axes={**axes, "features": {0: "batch"}},
            )  # fmt: skip


def write_int8(directory: Path, exact: Path) -> None:
    """Quantise the float32 export's matrix products; ranges of activations are taken from each batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in (TEXT, IMAGE):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_dynamic(
                exact / name, directory / name, per_channel=True, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip


class OnnxRuntime(ExportRuntime):
    """Both graphs as sessions on the processor."""

    def __init__(self, name: str, directory: Path, *, threads: int) -> None:
        onnxruntime = library()
        self.directory, self.threads = directory, threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            sessions = [
                onnxruntime.InferenceSession(directory / file, options, providers=["CPUExecutionProvider"])
                for file in (TEXT, IMAGE)
            ]
        except Exception as error:  # the library's own errors share no narrower base
            reason = str(error).strip().splitlines()[0]
            raise RuntimeUnavailableError(f"ONNX Runtime cannot load the export in {directory}: {reason}") from error
        turn = threading.Lock()
        super().__init__(name, *(partial(_run, session, turn) for session in sessions))


def _run(session: Any, turn: threading.Lock, inputs: tuple[Any, ...]) -> Floats:
    names = [each.name for each in session.get_inputs()]
    with turn:
        result: Floats = session.run(None, dict(zip(names, inputs, strict=True)))[0]
        return result
