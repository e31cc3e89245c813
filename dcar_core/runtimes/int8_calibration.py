"""int8 for OpenVINO: ranges of activations are measured on the user's own captions and images (NNCF, after training).

Prompts move the activations, so a calibrated export belongs to one encoder and carries its fingerprint.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dcar_core.runtimes import openvino_graph as graph
from dcar_core.runtimes.encoder_state import EncoderState
from dcar_core.runtimes.equality_proof import Probe
from dcar_core.runtimes.export_cache import ensure_export
from dcar_core.runtimes.registry import LoadedModel
from dcar_core.util.errors import MissingExtraError

SAMPLES = 200  # of each kind; more hardly change the ranges


def is_calibrated(loaded: LoadedModel) -> bool:
    return loaded.export_key("openvino-int8", graph.version(), calibrated=True).directory(loaded.cache).is_dir()


def calibrate(state: EncoderState, loaded: LoadedModel, data: Probe) -> Path:
    """Make the int8 export of this encoder, unless there is one. SAMPLES of each kind of data are enough.

    Raises:
        MissingExtraError: openvino or nncf is not installed.
        RuntimeUnavailableError: the export fails or cannot be written.
    """
    exact = loaded.export()
    key = loaded.export_key("openvino-int8", graph.version(), calibrated=True)
    inputs = {
        graph.TEXT: list(_text_inputs(state, data.texts)),
        graph.IMAGE: [(image[None], *state.image_inputs) for image in data.pixels[:SAMPLES]],
    }
    return ensure_export(key, loaded.cache, lambda path: _quantize(path, exact, inputs))


def _quantize(directory: Path, exact: Path, inputs: dict[str, list[tuple[Any, ...]]]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ImportError:
        raise MissingExtraError("calibrating int8", "int8") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level also mutes handlers that are not its own
    openvino = graph.library()
    for name, samples in inputs.items():
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # for its progress bars
            warnings.simplefilter("ignore")
            model = nncf.quantize(
                openvino.Core().read_model(exact / name),
                nncf.Dataset(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(samples),
            )
        openvino.save_model(model, directory / name, compress_to_fp16=False)


def _text_inputs(state: EncoderState, texts: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the inputs of one caption at a time, so that padding is not measured."""
    tokens, prompts = state.tokens(texts[:SAMPLES]), state.text_prompts
    weights, lengths = state.query_weights(tokens), state.text_lengths(tokens)
    for i, length in enumerate(lengths):
        part = slice(prompts.skipped, int(length))
        yield prompts.graph_inputs(tokens[i : i + 1, part], weights[i : i + 1, part])
