"""Choice of a runtime: by name, or by a rule from what is installed and what the processor has (`auto`).

- Whatever is chosen must give, at every start, the vectors of PyTorch in float32 on a small probe. The reference is
  `DCAR.encode_query` and `encode_image`, the path of training and evaluation.
- `auto` passes over a runtime that fails, with one warning that names the reason; `torch` always remains.
"""

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dcar_core.runtimes.encoder_state import EncoderState, Runtime
from dcar_core.runtimes.registry import AUTO, RUNTIME_KINDS, LoadedModel, open_runtime
from dcar_core.util import machine
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import DcarError, RuntimeUnavailableError

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR

logger = logging.getLogger(__name__)

LARGE = 50_000_000  # parameters, from which PyTorch is faster in bfloat16 than in float32
_BATCH = 32
_TEXTS = (
    "a red sports car seen from behind",
    "crying cat",
    "",
    "two brown dogs run across a wet lawn, one with a yellow ball",
    "This is a photo of a monkshood. The image shows purple petals, a thin green stem and a blurred garden behind it.",
    "7 of 9",
    "a woman with dark skin tone waving",
    "striped, woven, blue and white fabric",
)


@dataclass(frozen=True)
class Probe:
    """Inputs that runtimes are compared on: texts, and images as uint8 (m, 3, S, S)."""

    texts: tuple[str, ...]
    pixels: Pixels

    @classmethod
    def synthetic(cls, size: int, images: int = 4) -> "Probe":
        """Sentences, and smooth coloured images with some noise, where no data is at hand."""
        rng = np.random.default_rng(0)
        at = np.linspace(0, 2 * np.pi, size)
        waves = rng.uniform(0.3, 3, (images, 3, 2))
        smooth = np.sin(waves[..., :1] * at)[..., None] * np.cos(waves[..., 1:] * at)[..., None, :]  # [m, 3, S, S]
        values = 127.5 + 100 * smooth + rng.normal(0, 8, smooth.shape)
        return cls(_TEXTS, values.clip(0, 255).round().astype(np.uint8))


@dataclass(frozen=True)
class Proof:
    """The lowest cosine with the reference, of texts and of images, and the threshold."""

    text: float
    image: float
    threshold: float

    @property
    def holds(self) -> bool:
        return min(self.text, self.image) >= self.threshold

    def __str__(self) -> str:
        return f"cosine {self.text:.5f} (text), {self.image:.5f} (image); at least {self.threshold} is required"


def reference_vectors(model: "DCAR", probe: Probe) -> tuple[Floats, Floats]:
    """Compute the probe's vectors by PyTorch in float32, eager: texts (n, E), images (m, E)."""
    import torch

    backbone = model.backbone
    with torch.inference_mode():
        tokens = backbone.tokenize(probe.texts, model.prompt_tokens)
        texts = [model.encode_query(tokens[i : i + _BATCH]) for i in range(0, len(tokens), _BATCH)]
        parts = (probe.pixels[i : i + _BATCH] for i in range(0, len(probe.pixels), _BATCH))
        images = [model.encode_image(backbone.normalized(part)) for part in parts]
        return torch.cat(texts).cpu().numpy(), torch.cat(images).cpu().numpy()


def prove(state: EncoderState, runtime: Runtime, probe: Probe, expected: tuple[Floats, Floats]) -> Proof:
    """Compare a runtime's vectors with those of `reference_vectors`."""
    texts = state.encode_text(runtime, probe.texts, _BATCH)
    parts = (probe.pixels[i : i + 8] for i in range(0, len(probe.pixels), 8))
    images = np.concatenate([state.encode_pixels(runtime, part) for part in parts])
    threshold = 0.995 if RUNTIME_KINDS[runtime.name].precision == "int8" else 0.999
    return Proof(_lowest_cosine(texts, expected[0]), _lowest_cosine(images, expected[1]), threshold)


def _lowest_cosine(vectors: Floats, expected: Floats) -> float:
    cosines = (vectors * expected).sum(1)
    return float(cosines.min()) if np.isfinite(cosines).all() else -1.0


def preferred_runtimes(backbone: "Backbone") -> list[str]:
    """Return what `auto` tries for a model, in this order; nothing that needs data or is not installed.

    docs/explanation/runtimes.md has the measurements behind the rule.
    """
    device, names = backbone.device.type, ["torch"]
    if device == "cuda":
        names.insert(0, "cuda-fp16")
    elif device == "cpu":
        has_bf16 = machine.missing_instructions("bf16") is None
        if has_bf16 and sum(weight.numel() for weight in backbone.parameters()) >= LARGE:
            names.insert(0, "torch-bf16")
        if machine.is_installed("openvino"):
            names.insert(0, "openvino-bf16" if has_bf16 else "openvino")
    return names


def load_runtime(name: str, state: EncoderState, loaded: LoadedModel) -> Runtime:
    """Open a runtime by name, or the first that can be used by `auto`, which never fails.

    Raise RuntimeUnavailableError or MissingExtraError if the named runtime cannot be used here.
    """
    if name != AUTO:
        return _open(name, state, loaded)
    names = preferred_runtimes(loaded.backbone)
    for each, following in pairwise(names):
        try:
            return _open(each, state, loaded)
        except DcarError as error:
            logger.warning("%s; using the runtime %s instead", error, following)
    return open_runtime(names[-1], loaded)


def _open(name: str, state: EncoderState, loaded: LoadedModel) -> Runtime:
    """Open a runtime and run it with one row and with several, because some compile only then, or fail."""
    probe = Probe.synthetic(state.preprocess.size)
    try:
        runtime = open_runtime(name, loaded)
        state.encode_text(runtime, ["a"], 1)
        state.encode_pixels(runtime, probe.pixels[:1])
        proof = prove(state, runtime, probe, reference_vectors(loaded.model, probe))
    except DcarError:
        raise
    except Exception as error:  # libraries raise errors of any kind
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: {reason_of(error)}") from error
    if not proof.holds:
        raise RuntimeUnavailableError(f"the runtime {name} cannot be used: its vectors are not float32's here: {proof}")
    return runtime


def reason_of(error: Exception) -> str:
    """Return the message of our own errors, and the first line of a library's."""
    return str(error) if isinstance(error, DcarError) else f"{type(error).__name__}: {error}".strip().splitlines()[0]
