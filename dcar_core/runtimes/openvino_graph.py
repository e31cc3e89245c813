"""OpenVINO: both graphs converted once, then compiled for this processor in float32, bfloat16 or int8.

- float32 and bfloat16 share one export: the type is a hint at compilation. int8 has its own, see `int8_calibration`.
- Shapes are dynamic; a few kernels are built when a shape comes for the first time.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.runtimes.protocol import Runtime
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.runtimes.graph_modules import ImageGraph
    from dcar_core.runtimes.text_graphs import TextGraph

TEXT, IMAGE = "text.xml", "image.xml"


def library() -> Any:
    """Import OpenVINO, without telemetry that would take the cores; or raise MissingExtraError."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # as if it were not installed
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("the runtime openvino", "openvino") from None
    return openvino


def version() -> str:
    """The versions that an export belongs to: OpenVINO's and PyTorch's."""
    return f"{library().__version__.split('-')[0]} torch {version_of('torch').split('+')[0]}"


def write(directory: Path, text: "TextGraph", image: "ImageGraph") -> None:
    """Convert and save both graphs, weights in float32."""
    from dcar_core.runtimes.graph_modules import tracing

    openvino = library()
    graphs: tuple[tuple[str, TextGraph | ImageGraph], ...] = ((TEXT, text), (IMAGE, image))
    for name, graph in graphs:
        inputs, shapes = graph.example()
        with tracing():
            model = openvino.convert_model(
                graph, example_input=inputs, input=[openvino.PartialShape(shape) for shape in shapes]
            )
        openvino.save_model(model, directory / name, compress_to_fp16=False)


class OpenVinoRuntime(Runtime):
    """Both graphs of an export, compiled; needs neither the model nor PyTorch.

    hint: "f32" or "bf16", for graphs that are not int8.
    """

    def __init__(self, name: str, directory: Path, *, hint: str, threads: int) -> None:
        openvino = library()
        self.directory, self.threads = directory, threads
        config = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
        }
        core = openvino.Core()
        try:
            with ThreadPoolExecutor(2) as pool:  # each takes one core for half a second
                graphs = list(pool.map(lambda n: core.compile_model(directory / n, "CPU", config), (TEXT, IMAGE)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeUnavailableError(f"OpenVINO cannot compile the export in {directory}: {reason}") from error
        turn = threading.Lock()
        super().__init__(name, *(partial(_run, graph, turn) for graph in graphs))


def _run(graph: Any, turn: threading.Lock, inputs: tuple[Any, ...]) -> Floats:
    with turn:
        result: Floats = graph(list(inputs))[0]
        return result.copy()  # the library writes into this memory again at the next call
