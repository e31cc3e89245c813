"""Proof of equality: a runtime's vectors against those of PyTorch in float32, on this machine, with these weights.

The reference is `DCAR.encode_query` and `encode_image`, the path of training and evaluation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcar_core.runtimes.encoder_state import EncoderState
from dcar_core.runtimes.protocol import Runtime
from dcar_core.runtimes.registry import RUNTIME_KINDS
from dcar_core.util.arrays import Floats, Pixels

if TYPE_CHECKING:
    from dcar_core.model.dcar import DCAR

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

_BATCH = 32


@dataclass(frozen=True)
class Probe:
    """Inputs that runtimes are compared on, or calibrated with: texts, and images as uint8 (m, 3, S, S)."""

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
    images = np.concatenate(
        [state.encode_pixels(runtime, probe.pixels[i : i + 8]) for i in range(0, len(probe.pixels), 8)]
    )
    threshold = 0.995 if RUNTIME_KINDS[runtime.name].precision == "int8" else 0.999
    return Proof(_lowest_cosine(texts, expected[0]), _lowest_cosine(images, expected[1]), threshold)


def _lowest_cosine(vectors: Floats, expected: Floats) -> float:
    cosines = (vectors * expected).sum(1)
    return float(cosines.min()) if np.isfinite(cosines).all() else -1.0
