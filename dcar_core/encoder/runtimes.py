"""The runtimes by name, and the choice of one for a model: by name, or by a rule
(`auto`).

- A runtime belongs to the graphs of a backbone. Encoders with the same ones share it,
  and batches of queries.
- Every start compares the vectors of a small probe with those of PyTorch in float32,
  the path of training.
- `auto` passes over a runtime that fails, with a warning that names the reason; `torch`
  always remains.
"""

import logging
import sys
import weakref
from collections.abc import Callable, Hashable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcar_core.encoder.state import EncoderState, OpenVinoRuntime, Runtime
from dcar_core.util import machine
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import DcarError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.model.dcar import DCAR

logger = logging.getLogger(__name__)

AUTO = "auto"
# runtimes on an export, and OpenVINO's name of the precision
EXPORTED = {"openvino-bf16": "bf16", "openvino": "f32"}
RUNTIMES = ("torch", "cuda", *EXPORTED)
# the graphs of an export
TEXT = "text.xml"
IMAGE = "image.xml"
LEAST_COSINE = 0.999
PROBE_TEXTS = (
    "a red sports car seen from behind",
    "crying cat",
    "",
    "two brown dogs run across a wet lawn, one with a yellow ball",
    (
        "This is a photo of a monkshood. The image shows purple petals, a thin green"
        " stem and a blurred garden behind it."
    ),
    "7 of 9",
    "a woman with dark skin tone waving",
    "striped, woven, blue and white fabric",
)

Vectors = tuple[Floats, Floats]  # of the probe's texts (n, E) and images (m, E)
_open: "weakref.WeakValueDictionary[Hashable, Runtime]" = weakref.WeakValueDictionary()


def check_runtime(name: str) -> None:
    """Raise RuntimeUnavailableError if there is no such runtime, or if this processor
    cannot run it.
    """
    if name != AUTO and name not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"no runtime is named {name!r}; there are: {AUTO}, {', '.join(RUNTIMES)}"
        )
    if name == "openvino-bf16" and (reason := machine.missing_bf16()):
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: {reason}")


def auto_exports() -> list[str]:
    """Return the runtimes on an export that `auto` tries, in this order."""
    return [
        name
        for name in EXPORTED
        if name == "openvino" or machine.missing_bf16() is None
    ]


def auto_runtimes(device: str) -> list[str]:
    """Return what `auto` tries on a type of device, in this order;
    docs/explanation/runtimes.md says why.
    """
    if device == "cuda":
        return ["cuda", "torch"]
    return [
        *(
            auto_exports()
            if device == "cpu" and machine.is_installed("openvino")
            else []
        ),
        "torch",
    ]


def load_runtime(
    name: str,
    state: EncoderState,
    model: "DCAR",
    export: Callable[[], Path],
) -> Runtime:
    """Open a runtime by name, or the first that can be used by `auto`, which never
    fails; see `open_runtime`.
    """
    if name != AUTO:
        return _open_and_check(name, state, model, export)
    device = model.backbone.device.type
    if device == "cpu" and not machine.is_installed("openvino"):
        logger.warning("OpenVINO is not installed, so PyTorch encodes, which is slower")
    names = auto_runtimes(device)
    for current, following in pairwise(names):
        try:
            return _open_and_check(current, state, model, export)
        except DcarError as error:
            logger.warning("%s; using the runtime %s instead", error, following)
    return open_runtime(names[-1], model, export)


def _open_and_check(
    name: str,
    state: EncoderState,
    model: "DCAR",
    export: Callable[[], Path],
) -> Runtime:
    """Open a runtime and run it with one row and with several, because some compile
    only then, or fail.
    """
    try:
        runtime = open_runtime(name, model, export)
        runtime.encode_texts([(state, PROBE_TEXTS[0])])
        runtime.encode_images([(state, probe_images(state.preprocess.size)[0])])
        check_vectors(state, runtime, reference_vectors(model))
    except DcarError:
        raise
    except Exception as error:  # libraries raise errors of any kind
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RuntimeUnavailableError(
            f"the runtime {name} cannot be used: {reason}"
        ) from error
    return runtime


def open_runtime(name: str, model: "DCAR", export: Callable[[], Path]) -> Runtime:
    """Open a runtime by name, or return the one that is open for this backbone. export:
    see `exports.ensure_export`.

    Raise RuntimeUnavailableError if the runtime cannot be used here.
    """
    from dcar_core.encoder.graphs import TorchRuntime

    device = model.backbone.device.type
    needed = {"torch": device, "cuda": "cuda"}.get(name, "cpu")
    if device != needed:
        raise RuntimeUnavailableError(
            f"the runtime {name} needs --device {needed}, but the device is {device}"
        )
    if name in EXPORTED:
        return open_export(name, export())
    key = name, model.backbone
    if (runtime := _open.get(key)) is None:
        runtime = _open[key] = TorchRuntime(model, is_half=name == "cuda")
    return runtime


def open_export(name: str, directory: Path, threads: int | None = None) -> Runtime:
    """Open a runtime on a checked export, or return the one that is open; errors as of
    `open_runtime`.
    """
    return open_openvino(
        name,
        directory.resolve(),
        directory,
        threads,
        lambda: (directory / TEXT, directory / IMAGE),
    )


def open_openvino(
    name: str,
    graphs_key: Hashable,
    directory: Path,
    threads: int | None,
    graphs: Callable[[], tuple[Any, Any]],
) -> Runtime:
    """Open a runtime of `EXPORTED`, or return the one that is open by this key. graphs:
    makes them.
    """
    torch = sys.modules.get("torch")
    threads = threads or (
        torch.get_num_threads() if torch else machine.available_cores()
    )
    key = name, graphs_key, threads
    if (runtime := _open.get(key)) is None:
        runtime = OpenVinoRuntime(
            name,
            graphs(),
            directory,
            hint=EXPORTED[name],
            threads=threads,
        )
        _open[key] = runtime
    return runtime


def probe_images(size: int) -> Pixels:
    """Return smooth coloured images with some noise, uint8 (4, 3, size, size)."""
    rng = np.random.default_rng(0)
    at = np.linspace(0, 2 * np.pi, size)
    waves = rng.uniform(0.3, 3, (4, 3, 2))
    # [4, 3, size, size]
    smooth = (
        np.sin(waves[..., :1] * at)[..., None]
        * np.cos(waves[..., 1:] * at)[..., None, :]
    )
    values = 127.5 + 100 * smooth + rng.normal(0, 8, smooth.shape)
    return values.clip(0, 255).round().astype(np.uint8)


def reference_vectors(model: "DCAR") -> Vectors:
    """Compute the probe's vectors by PyTorch in float32, eager."""
    import torch

    backbone = model.backbone
    with torch.inference_mode():
        texts = model.encode_query(backbone.tokenize(PROBE_TEXTS, model.prompt_tokens))
        images = model.encode_image(
            backbone.standardized(probe_images(backbone.preprocess.size))
        )
        return texts.cpu().numpy(), images.cpu().numpy()


def check_vectors(state: EncoderState, runtime: Runtime, expected: Vectors) -> None:
    """Raise RuntimeUnavailableError unless a runtime gives the vectors of
    `reference_vectors`.
    """
    images = probe_images(state.preprocess.size)
    texts = runtime.encode_texts([(state, text) for text in PROBE_TEXTS], 64)
    vectors = texts, runtime.encode_images([(state, image) for image in images])
    text, image = (
        np.einsum("ne,ne->n", *pair).min()
        for pair in zip(vectors, expected, strict=True)
    )
    if not (text >= LEAST_COSINE and image >= LEAST_COSINE):  # true for NaN, too
        raise RuntimeUnavailableError(
            f"the runtime {runtime.name} cannot be used: its vectors are not float32's"
            f" here: cosine {text:.5f} (text), {image:.5f} (image); at least"
            f" {LEAST_COSINE} is required"
        )
