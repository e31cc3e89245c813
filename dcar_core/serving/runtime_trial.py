"""Speed of a runtime on this machine: one text alone, texts together, images together; after a proof of equality."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dcar_core.runtimes.adapter import Adapter
from dcar_core.runtimes.equality_proof import Probe, prove
from dcar_core.runtimes.protocol import Runtime
from dcar_core.util.arrays import Floats


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

    @property
    def score(self) -> float:
        """Geometric mean of what a service and an index job need: one text, many texts, many images."""
        return float((1000 / self.text_ms * self.texts_per_s * self.images_per_s) ** (1 / 3))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_runtime(
    adapter: Adapter,
    runtime: Runtime,
    probe: Probe,
    expected: tuple[Floats, Floats],
    *,
    texts: Sequence[str] | None = None,
    batch: int = 32,
    images: int = 8,
    rounds: int = 3,
) -> RuntimeTrial:
    """Prove a runtime on the probe, then measure it.

    Args:
        expected: the probe's `reference_vectors`.
        texts: to measure with; default: the probe's, repeated.
        batch: texts together.
        images: images together.
        rounds: of each measurement; the median counts.
    """
    proof = prove(adapter, runtime, probe, expected)
    texts = list(texts or probe.texts)
    together = (texts * (-(-batch // len(texts))))[:batch] if len(texts) < batch else texts
    groups = [together[i : i + batch] for i in range(0, len(together), batch)]
    pixels = probe.pixels[[i % len(probe.pixels) for i in range(images)]]
    singles = together[:: max(1, len(together) // 8)][:8]

    def encode_all() -> None:
        for group in groups:
            adapter.encode_text(runtime, group, batch)

    per_text = _median_seconds(encode_all, rounds) / len(together)
    one_text = statistics.median(
        _median_seconds(partial(adapter.encode_text, runtime, [text], 1), rounds) for text in singles
    )
    all_images = _median_seconds(lambda: adapter.encode_pixels(runtime, pixels), rounds)
    one_image = _median_seconds(lambda: adapter.encode_pixels(runtime, pixels[:1]), rounds)
    return RuntimeTrial(
        runtime.name, round(1 / per_text, 1), round(1000 * one_text, 3), round(images / all_images, 1),
        round(1000 * one_image, 3), round(proof.text, 6), round(proof.image, 6), proof.holds,
    )  # fmt: skip


def _median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Time some calls; the first one, which prepares a shape, is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
