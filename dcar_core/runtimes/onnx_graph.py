"""ONNX Runtime: the towers as ONNX files, in float32 or with weights and activations quantised on the fly to int8."""

import threading
import warnings
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.runtimes.protocol import IMAGE_INPUTS, TEXT_INPUTS, Prefix
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.runtimes.graph_modules import ImageTower, TextTower

TEXT, IMAGE = "text.onnx", "image.onnx"
_OPSET = 17


def library() -> Any:
    """The module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("the runtime onnx", "onnx") from None
    return onnxruntime


def version() -> str:
    """Of the library and of what it converts from; an export belongs to both."""
    return f"{library().__version__} torch {version_of('torch').split('+')[0]}"


def write(directory: Path, text: "TextTower", image: "ImageTower") -> None:
    """Export both towers in float32.

    PyTorch's newer exporter wants a package more and fixed numbers of prompts, so this is the older one.
    """
    library()
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise MissingExtraError("exporting to ONNX", "onnx") from None
    import torch

    from dcar_core.runtimes.graph_modules import example_inputs

    for name, tower, known in ((TEXT, text, TEXT_INPUTS), (IMAGE, image, IMAGE_INPUTS)):
        inputs, shapes = example_inputs(tower)
        names = list(known[: len(inputs)])
        axes = {n: {i: f"{n}_{i}" for i, size in enumerate(s) if size < 0} for n, s in zip(names, shapes, strict=True)}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # remarks of the exporter on its own future
            torch.onnx.export(
                tower, inputs, directory / name, dynamo=False, opset_version=_OPSET, input_names=names,
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


class OnnxRuntime:
    """Both towers as sessions on the processor."""

    def __init__(self, name: str, directory: Path, *, threads: int) -> None:
        onnxruntime = library()
        self.name, self.directory, self.threads = name, directory, threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._text = onnxruntime.InferenceSession(directory / TEXT, options, providers=["CPUExecutionProvider"])
            self._image = onnxruntime.InferenceSession(directory / IMAGE, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's own errors share no base but this
            reason = str(error).strip().splitlines()[0]
            raise RuntimeUnavailableError(f"ONNX Runtime cannot load the export in {directory}: {reason}") from error
        self._turn = threading.Lock()

    def text(self, tokens: NDArray[np.int64], weights: Floats, prefix: Prefix) -> Floats:
        return self._run(self._text, TEXT_INPUTS, tokens, weights, prefix.keys, prefix.values)

    def image(self, pixels: NDArray[np.uint8], prompts: Floats | None) -> Floats:
        return self._run(self._image, IMAGE_INPUTS, pixels, *(() if prompts is None else (prompts,)))

    def _run(self, session: Any, names: tuple[str, ...], *given: NDArray[np.generic]) -> Floats:
        with self._turn:
            result: Floats = session.run(None, dict(zip(names, given, strict=False)))[0]
            return result
