"""Speed of a runtime on this machine: one text alone, texts together, images together; after a proof of equality."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from dcar_core.runtimes.adapter import Adapter
from dcar_core.runtimes.equality_proof import Probe, Proof, prove
from dcar_core.runtimes.protocol import Runtime
from dcar_core.util.arrays import Floats

BATCH = 32  # texts together
_ROUNDS = 3


@dataclass(frozen=True)
class RuntimeTrial:
    """One runtime, measured: rates per second, times in milliseconds, medians; lowest cosines against float32."""

    name: str
    texts_per_s: float
    text_ms: float
    images_per_s: float
    image_ms: float
    cosine_text: float
    cosine_image: float
    holds: bool

    @classmethod
    def from_seconds(cls, name: str, text: tuple[float, float], image: tuple[float, float], proof: Proof) -> Self:
        """Round measurements. text, image: seconds of one alone, and of one among many."""
        return cls(
            name, round(1 / text[1], 1), round(1000 * text[0], 3), round(1 / image[1], 1), round(1000 * image[0], 3),
            round(proof.text, 6), round(proof.image, 6), proof.holds,
        )  # fmt: skip

    @property
    def score(self) -> float:
        """Geometric mean of what a service and an index job need: one text, many texts, many images."""
        return float((1000 / self.text_ms * self.texts_per_s * self.images_per_s) ** (1 / 3))


def measure_runtime(
    adapter: Adapter,
    runtime: Runtime,
    probe: Probe,
    expected: tuple[Floats, Floats],
    *,
    texts: Sequence[str] | None = None,
    images: int = 8,
) -> RuntimeTrial:
    """Prove a runtime on the probe, whose `reference_vectors` are `expected`, then measure it.

    texts: to measure with, `BATCH` together; default: the probe's, repeated. images: how many together.
    """
    proof = prove(adapter, runtime, probe, expected)
    texts = list(texts or probe.texts)
    together = (texts * (-(-BATCH // len(texts))))[:BATCH] if len(texts) < BATCH else texts
    groups = [together[i : i + BATCH] for i in range(0, len(together), BATCH)]
    pixels = probe.pixels[[i % len(probe.pixels) for i in range(images)]]
    singles = together[:: max(1, len(together) // 8)][:8]

    def encode_all() -> None:
        for group in groups:
            adapter.encode_text(runtime, group, BATCH)

    all_texts = median_seconds(encode_all)
    one_text = statistics.median(median_seconds(partial(adapter.encode_text, runtime, [text], 1)) for text in singles)
    all_images = median_seconds(lambda: adapter.encode_pixels(runtime, pixels))
    one_image = median_seconds(lambda: adapter.encode_pixels(runtime, pixels[:1]))
    text_seconds, image_seconds = (one_text, all_texts / len(together)), (one_image, all_images / images)
    return RuntimeTrial.from_seconds(runtime.name, text_seconds, image_seconds, proof)


def median_seconds(run: Callable[[], object]) -> float:
    """Time some calls; the first one, which prepares a shape, is not counted."""
    run()
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
