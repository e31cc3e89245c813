"""OpenVINO: both graphs converted once, then compiled for this processor in float32, bfloat16 or int8.

- float32 and bfloat16 share one export: the type is a hint at compilation.
- int8 has its own: NNCF measures the ranges of activations on the user's captions and images. Prompts move them, so
  such an export belongs to one encoder and carries its fingerprint.
- Shapes are dynamic; a few kernels are built when a shape comes for the first time.
"""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.runtimes.encoder_state import Runtime
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.runtimes.graphs import ImageGraph, TextGraph

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
    from dcar_core.runtimes.graphs import tracing

    openvino = library()
    graphs: tuple[tuple[str, TextGraph | ImageGraph], ...] = ((TEXT, text), (IMAGE, image))
    for name, graph in graphs:
        inputs, shapes = graph.example()
        with tracing():
            model = openvino.convert_model(
                graph, example_input=inputs, input=[openvino.PartialShape(shape) for shape in shapes]
            )
        openvino.save_model(model, directory / name, compress_to_fp16=False)


def write_int8(directory: Path, exact: Path, inputs: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
    """Quantize the graphs of an exact export by the ranges that these inputs of each give. Needs nncf."""
    openvino = library()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # for its progress bars
        warnings.simplefilter("ignore")
        try:
            import nncf
        except ImportError:
            raise MissingExtraError("calibrating int8", "int8") from None
        logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level also mutes handlers not its own
        for name, samples in inputs.items():
            model = nncf.quantize(
                openvino.Core().read_model(exact / name),
                nncf.Dataset(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(samples),
            )
            openvino.save_model(model, directory / name, compress_to_fp16=False)


class OpenVinoRuntime(Runtime):
    """Both graphs of an export, compiled; needs neither the model nor PyTorch.

    hint: "f32" or "bf16", for graphs that are not int8.
    """

    def __init__(self, name: str, directory: Path, *, hint: str, threads: int) -> None:
        core = library().Core()
        self.directory, self.threads = directory, threads
        config = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
        }
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
