"""int8 for OpenVINO: ranges of activations are measured on the user's own captions and pictures (NNCF, after training).

What was measured belongs to one encoder, since prompts move the activations; the export carries its fingerprint.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.runtimes import openvino_graph as graph
from dcar_core.runtimes.adapter import Adapter
from dcar_core.runtimes.export_cache import ensure_export
from dcar_core.runtimes.registry import LoadedModel, towers
from dcar_core.util.errors import MissingExtraError

SAMPLES = 200  # of each kind; more hardly change the ranges


@dataclass(frozen=True)
class CalibrationData:
    """Captions, and pictures as uint8 (m, 3, S, S); SAMPLES of each are enough."""

    texts: Sequence[str]
    pixels: NDArray[np.uint8]


def is_calibrated(loaded: LoadedModel) -> bool:
    """Whether this encoder has its int8 export already."""
    return loaded.key("openvino-int8", graph.version(), calibrated=True).directory(loaded.cache).is_dir()


def calibrate(adapter: Adapter, loaded: LoadedModel, data: CalibrationData) -> Path:
    """Make the int8 export of this encoder, unless there is one.

    Raises:
        MissingExtraError: openvino or nncf is not installed.
        RuntimeUnavailableError: the export fails or cannot be written.
    """
    version = graph.version()
    exact = ensure_export(
        loaded.key("openvino", version), loaded.cache, lambda path: graph.write(path, *towers(loaded))
    )
    key = loaded.key("openvino-int8", version, calibrated=True)
    return ensure_export(key, loaded.cache, lambda path: _quantise(path, exact, adapter, data))


def _quantise(directory: Path, exact: Path, adapter: Adapter, data: CalibrationData) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ImportError:
        raise MissingExtraError("calibrating int8", "int8") from None
    nncf.set_log_level(logging.ERROR)
    openvino = graph.library()
    inputs: dict[str, list[dict[str, Any]]] = {
        graph.TEXT: list(_texts(adapter, data.texts)),
        graph.IMAGE: list(_images(adapter, data.pixels)),
    }
    for name, samples in inputs.items():
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # its bars
            warnings.simplefilter("ignore")
            model = nncf.quantize(
                openvino.Core().read_model(exact / name),
                nncf.Dataset(samples),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(samples),
            )
        openvino.save_model(model, directory / name, compress_to_fp16=False)


def _texts(adapter: Adapter, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One caption at a time, so that padding is not measured."""
    tokens, weights = adapter.tokens(texts[:SAMPLES])
    for row, factors in zip(tokens, weights, strict=True):
        n = int(row.argmax()) + 1
        prefix = adapter.prefix
        yield {"tokens": row[None, :n], "weights": factors[None, :n], "keys": prefix.keys, "values": prefix.values}


def _images(adapter: Adapter, pixels: NDArray[np.uint8]) -> Iterator[dict[str, Any]]:
    prompts = {} if adapter.image_prompts is None else {"prompts": adapter.image_prompts}
    for picture in pixels[:SAMPLES]:
        yield {"pixels": picture[None], **prompts}
