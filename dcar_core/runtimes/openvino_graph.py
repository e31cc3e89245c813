"""OpenVINO: the towers converted once, then compiled for this processor in float32, bfloat16 or int8.

- float32 and bfloat16 are one export: the type is a hint at compilation. int8 is one of its own, see `calibration`.
- Shapes are dynamic; a few kernels are built when a shape comes for the first time.
"""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.runtimes.protocol import Prefix
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.runtimes.graph_modules import ImageTower, TextTower

TEXT, IMAGE = "text.xml", "image.xml"


def library() -> Any:
    """The module, without its telemetry: that tells its maker what is converted, by processes that take the cores.

    Raises:
        MissingExtraError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # as if it were not installed
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("the runtime openvino", "openvino") from None
    return openvino


def version() -> str:
    """Of the library and of what it converts from; an export belongs to both."""
    return f"{library().__version__.split('-')[0]} torch {version_of('torch').split('+')[0]}"


def write(directory: Path, text: "TextTower", image: "ImageTower") -> None:
    """Convert and save both towers, weights in float32."""
    import torch

    from dcar_core.runtimes.graph_modules import example_inputs

    openvino = library()
    for name, tower in ((TEXT, text), (IMAGE, image)):
        inputs, shapes = example_inputs(tower)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # remarks of the tracer on its own future
            model = openvino.convert_model(
                tower, example_input=inputs, input=[openvino.PartialShape(s) for s in shapes]
            )
        openvino.save_model(model, directory / name, compress_to_fp16=False)


class OpenVinoRuntime:
    """Both towers, compiled. hint: "f32" or "bf16", for whatever is not int8 already."""

    def __init__(self, name: str, directory: Path, *, hint: str, threads: int) -> None:
        openvino = library()
        self.name, self.directory, self.threads = name, directory, threads
        config = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
        }
        core = openvino.Core()
        try:
            with ThreadPoolExecutor(2) as pool:  # each takes one core for half a second
                compiled = pool.map(lambda name: core.compile_model(directory / name, "CPU", config), (TEXT, IMAGE))
                self._text, self._image = compiled
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeUnavailableError(f"OpenVINO cannot compile the export in {directory}: {reason}") from error
        self._turn = threading.Lock()

    def text(self, tokens: NDArray[np.int64], weights: Floats, prefix: Prefix) -> Floats:
        with self._turn:
            result: Floats = self._text([tokens, weights, prefix.keys, prefix.values])[0]
            return result.copy()  # it is the library's own memory, written again by the next call

    def image(self, pixels: NDArray[np.uint8], prompts: Floats | None) -> Floats:
        with self._turn:
            result: Floats = self._image([pixels] if prompts is None else [pixels, prompts])[0]
            return result.copy()
