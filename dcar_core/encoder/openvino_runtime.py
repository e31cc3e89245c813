"""OpenVINO: both graphs converted once, then compiled for this processor in float32 or bfloat16.

    CACHE/exports/NAME/manifest.json    the checksum of every file
    CACHE/exports/NAME/*.xml, *.bin

- NAME says what an export depends on, versions of libraries included, so an upgrade exports again beside the old one.
- Exports are checked at every use, and renamed into place when they are whole. None is a pickle, which could run code.
- Both precisions share one export: the type is a hint at compilation.
"""

import json
import logging
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dcar_core.encoder.state import Runtime
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import MissingExtraError, RuntimeUnavailableError
from dcar_core.util.files import apply_umask, sha256_of

if TYPE_CHECKING:
    from dcar_core.encoder.graphs import ImageGraph, TextGraph
    from dcar_core.model.dcar import DCAR

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
GRAPHS = 4  # version of the graphs: exports of another one are not used
TEXT, IMAGE = "text.xml", "image.xml"


def library() -> Any:
    """Import OpenVINO, without telemetry that would take the cores; or raise MissingExtraError."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # as if it were not installed
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("the runtime openvino", "openvino") from None
    return openvino


def ensure_export(model: "DCAR", backbone_hash: str, cache: Path) -> Path:
    """Return the directory of a model's checked export; make it where there is none.

    Its name has the depths of image and text prompts, such as d4t0, and "a" for adapters of blocks.
    Raise RuntimeUnavailableError if it is corrupted, or cannot be made or written.
    """
    from dcar_core.encoder.graphs import graphs_of

    text, image = graphs_of(model)
    inputs = f"d{image.depth}t{text.depth}" + ("a" if image.has_adapters else "")
    versions = f"{library().__version__.split('-')[0]}-torch-{version('torch').split('+')[0]}"
    final = cache / "exports" / f"{backbone_hash[:16]}_{inputs}_openvino_{versions}_g{GRAPHS}"
    try:
        if not final.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.with_name(final.name + ".lock")):
                for left in final.parent.glob(f"{final.name}.part-*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                if not final.is_dir():
                    logger.info("converting the model for OpenVINO, once")
                    _export(final, text, image)
        check_export(final)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"the cache of exports in {cache} cannot be used: {error.strerror or error}; name another directory"
        ) from error
    return final


def _export(final: Path, text: "TextGraph", image: "ImageGraph") -> None:
    """Convert and save both graphs, weights in float32."""
    from dcar_core.encoder.graphs import tracing

    openvino = library()
    aside = Path(tempfile.mkdtemp(prefix=final.name + ".part-", dir=final.parent))
    graphs: tuple[tuple[str, TextGraph | ImageGraph], ...] = ((TEXT, text), (IMAGE, image))
    try:
        for name, graph in graphs:
            inputs, shapes = graph.example()
            with tracing():
                converted = openvino.convert_model(
                    graph, example_input=inputs, input=[openvino.PartialShape(shape) for shape in shapes]
                )
            openvino.save_model(converted, aside / name, compress_to_fp16=False)
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
        aside.chmod(apply_umask(0o777))  # an export made by a job also serves the service, run by another user
        aside.rename(final)
    except OSError:
        raise
    except Exception as error:  # exporters raise errors of any kind
        if "iostream error" in str(error):  # all that OpenVINO says of a write that fails
            raise OSError("an export cannot be written; perhaps the disk is full") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeUnavailableError(f"this model cannot be exported for openvino: {reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_export(final: Path) -> None:
    """Raise RuntimeUnavailableError if an export lacks a file, or a file has changed."""
    try:
        files = json.loads((final / MANIFEST).read_text(encoding="utf-8"))["files"]
        corrupted = [name for name, checksum in files.items() if sha256_of(final / name) != checksum]
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise RuntimeUnavailableError(f"{final} is incomplete ({error!r}); delete it for a new one") from None
    if corrupted:
        raise RuntimeUnavailableError(f"{final} is corrupted: {', '.join(corrupted)} changed; delete it for a new one")


class OpenVinoRuntime(Runtime):
    """Both graphs of an export, compiled; needs neither the model nor PyTorch. hint: "f32" or "bf16"."""

    def __init__(self, name: str, directory: Path, *, hint: str, threads: int) -> None:
        core = library().Core()
        self.directory = directory
        config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": str(threads)}
        config |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
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
