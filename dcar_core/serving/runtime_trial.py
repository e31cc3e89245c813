"""How fast a runtime is here: one text alone, texts together, pictures together; after a proof that it is right."""

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
    """One runtime, measured. Rates a second, times in milliseconds, medians; cosines are the least against float32."""

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
        """Geometric mean of what a service and an index job feel: one text, many texts, many pictures."""
        return float((1000 / self.text_ms * self.texts_per_s * self.images_per_s) ** (1 / 3))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_runtime(
    adapter: Adapter,
    runtime: Runtime,
    probe: Probe,
    wanted: tuple[Floats, Floats],
    *,
    texts: Sequence[str] | None = None,
    batch: int = 32,
    pictures: int = 8,
    rounds: int = 3,
) -> RuntimeTrial:
    """Prove it on the probe, then measure.

    Args:
        wanted: the probe's `reference`.
        texts: to measure with; default: the probe's, repeated.
        batch: texts together.
        pictures: pictures together.
        rounds: of each measurement; the median counts.
    """
    proof = prove(adapter, runtime, probe, wanted)
    many = list(texts or probe.texts)
    together = (many * (-(-batch // len(many))))[:batch] if len(many) < batch else many
    groups = [together[i : i + batch] for i in range(0, len(together), batch)]
    pixels = probe.pixels[[i % len(probe.pixels) for i in range(pictures)]]
    singles = together[:: max(1, len(together) // 8)][:8]

    def all_texts() -> None:
        for group in groups:
            adapter.encode_text(runtime, group, batch)

    per_text = _median(all_texts, rounds) / len(together)
    one_text = statistics.median(_median(partial(adapter.encode_text, runtime, [text], 1), rounds) for text in singles)
    many_images = _median(lambda: adapter.encode_pixels(runtime, pixels), rounds)
    one_image = _median(lambda: adapter.encode_pixels(runtime, pixels[:1]), rounds)
    return RuntimeTrial(
        runtime.name, round(1 / per_text, 1), round(1000 * one_text, 3), round(pictures / many_images, 1),
        round(1000 * one_image, 3), round(proof.text, 6), round(proof.image, 6), proof.holds,
    )  # fmt: skip


def _median(run: Callable[[], object], rounds: int) -> float:
    """Seconds; the first call, which prepares what belongs to a shape, is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
