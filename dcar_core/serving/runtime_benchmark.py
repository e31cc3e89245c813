"""`dcar benchmark`: every runtime on this machine, with the user's own images and captions.

- Each runtime is measured in its own process, one after the other: memory is its own, and a crash costs one row.
- The reference is PyTorch in float32, eager, texts padded to the whole context: the plain use of CLIP.
- int8 is calibrated on the training split (or validation, if there is none) and measured on the test split.
- A runtime holds if its vectors are near the reference's and its recall@1 on the test split is at most half a point
  below `torch`'s.
"""

import resource
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcar_core.data import Annotations, Dataset
from dcar_core.images import open_image
from dcar_core.runtimes.registry import INT8_SAMPLES, RUNTIME_KINDS, require_known
from dcar_core.runtimes.selection import Probe, preferred_runtimes, prove, reason_of, reference_vectors
from dcar_core.serving.encoder import Encoder
from dcar_core.util.arrays import Floats, Pixels, Rows
from dcar_core.util.errors import DataError, ImageError
from dcar_core.util.processes import in_own_process
from dcar_core.util.retrieval_metrics import recall_at_k

PROBE_SIZE = 32  # images and captions that are compared one by one, and that speed is measured with
MAX_RECALL_LOSS = 0.5  # points of recall@1
BATCH = 32  # texts together
_ROUNDS = 3
_COLUMNS = (  # heading, field, width, decimal places
    ("texts/s", "texts_per_s", 8, 1), ("text ms", "text_ms", 8, 2), ("images/s", "images_per_s", 9, 1),
    ("image ms", "image_ms", 9, 2), ("MB", "memory", 6, 0), ("open s", "open_s", 7, 2),
    ("cosine t", "cosine_text", 9, 5), ("cosine i", "cosine_image", 9, 5), ("R@1 t2i", "t2i_r1", 8, 2),
    ("R@1 i2t", "i2t_r1", 8, 2),
)  # fmt: skip


@dataclass(frozen=True)
class RuntimeResult:
    """One line of the table. reason: why the runtime is not used, "" if it holds.

    speeds: `texts_per_s`, `text_ms`, `images_per_s` and `image_ms`, medians; empty if the runtime cannot be used.
    accuracy: the lowest cosines against float32, `cosine_text` and `cosine_image`, and recall@1, `t2i_r1` and `i2t_r1`.
    cost: `memory`, the peak in MB, and `open_s`.
    """

    name: str
    reason: str = ""
    speeds: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Product of what a service and an index job need: one text, many texts, many images."""
        return self.speeds["texts_per_s"] * self.speeds["images_per_s"] / self.speeds["text_ms"]

    def __str__(self) -> str:
        if not self.speeds:
            return f"{self.name:15} {self.reason}"
        values = self.speeds | self.accuracy | self.cost
        cells = (f"{values[key]:{w}.{digits}f}" if key in values else f"{'-':>{w}}" for _, key, w, digits in _COLUMNS)
        return f"{self.name:15} {' '.join(cells)}" + (f"  not used: {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class RuntimeReport:
    """All measurements. fastest: of those that hold, "" if none does. auto: the runtime that `auto` tries first.

    decoding: from a file to pixels in one thread, `exact_ms` and `fast_ms` an image, the lowest `cosine` of the fast
        mode's embeddings, and the images' `width` and `height`.
    """

    rows: tuple[RuntimeResult, ...]
    decoding: dict[str, float]
    fastest: str
    auto: str
    threads: int
    texts: int
    tokens: float
    images: int

    def __str__(self) -> str:
        decoding = self.decoding
        return "\n".join([
            f"{'runtime':15} {' '.join(f'{heading:>{width}}' for heading, _, width, _ in _COLUMNS)}",
            *map(str, self.rows),
            "",
            f"{self.texts:,} captions of {self.tokens} tokens on average with SOS, EOT and prompts; "
            f"{self.images:,} images; {self.threads} threads; medians of three",
            f"decoding {decoding['width']} x {decoding['height']}, one thread: {decoding['exact_ms']:.2f} ms exact, "
            f"{decoding['fast_ms']:.2f} ms fast, whose embeddings stay within cosine {decoding['cosine']:.5f}",
            f"fastest here: {self.fastest or 'none'}; auto tries {self.auto} first; --runtime or DCAR_RUNTIME names "
            "another",
        ])  # fmt: skip


def benchmark(
    checkpoint: str,
    data: Path,
    *,
    runtimes: Sequence[str] = (),
    pretrained: str | None = None,
    images: Path | None = None,
    cache: Path | None = None,
    device: str = "auto",
    limit: int = 2000,
    say: Callable[[str], None] = lambda line: None,
) -> RuntimeReport:
    """Measure runtimes on at most `limit` captions of a data set's test split.

    runtimes: names, `torch` beside them; default: what `auto` may try, and int8. say: gets a line for each step.
    """
    for name in runtimes:
        require_known(name)
    load = partial(Encoder.load, checkpoint, pretrained=pretrained, device=device, cache=cache)
    encoder = load()
    backbone = encoder.model.backbone
    usual, kinds = preferred_runtimes(backbone), RUNTIME_KINDS.items()
    int8 = (name for name, kind in kinds if kind.precision == "int8" and kind.on == backbone.device.type)
    test = Annotations(data, images).load("test", "present")[0]
    say(f"reading {min(limit, len(test)):,} captions and their images")
    test = replace(test, samples=test.samples[:limit])
    row_of = {name: row for row, name in enumerate(test.images)}
    image_of = np.array([row_of[sample.image] for sample in test.samples])
    texts = tuple(sample.caption for sample in test.samples)
    material = Probe(texts, _pixels(encoder, test, test.images))
    probe = Probe(texts[:PROBE_SIZE], material.pixels[:PROBE_SIZE])
    decoding = _measure_decoding(encoder, [test.read(name) for name in test.images[: 4 * PROBE_SIZE]])
    rows = [_measure_reference(encoder, probe)]
    expected = reference_vectors(encoder.model, probe)
    for name in dict.fromkeys(["torch", *(runtimes or [*usual, *int8])]):
        say(f"measuring {name}")
        try:
            if name == "openvino-int8" and not encoder.loaded.is_calibrated():
                _calibrate(encoder, data, images, say)
            rows.append(in_own_process(_measure, load, name, material, image_of, probe, expected))
        except BrokenProcessPool:
            rows.append(RuntimeResult(name, "its process died, perhaps out of memory"))
        except Exception as error:  # a library's error of any kind costs its row, not the others
            rows.append(RuntimeResult(name, reason_of(error)))
    exact = next((row.accuracy for row in rows if row.name == "torch"), {})
    judged = [rows[0], *(_judge(row, exact) for row in rows[1:])]
    scores = {row.name: row.score for row in judged[1:] if row.speeds and not row.reason}
    lengths = encoder.state.layout.lengths(encoder.state.tokenizer(texts)) + encoder.model.prompt_tokens
    return RuntimeReport(
        tuple(judged), decoding, max(scores, key=lambda name: scores[name], default=""), usual[0],
        torch.get_num_threads(), len(texts), round(float(lengths.mean()), 1), len(material.pixels),
    )  # fmt: skip


def _pixels(encoder: Encoder, data: Dataset, names: Sequence[str]) -> Pixels:
    pixels = []
    for name in names:
        try:
            pixels.append(encoder.preprocess(data.read(name)))
        except ImageError as error:
            raise DataError(f"{data.split}: {name}: {error}") from error
    return np.stack(pixels)


def _measure_decoding(encoder: Encoder, files: list[bytes]) -> dict[str, float]:
    exact, fast = encoder.model.backbone.preprocess, encoder.preprocess
    exact_s = _median_seconds(lambda: [exact(file) for file in files]) / len(files)
    fast_s = _median_seconds(lambda: [fast(file) for file in files]) / len(files)
    pixels = (np.stack([preprocess(file) for file in files]) for preprocess in (exact, fast))
    cosine = np.multiply(*(_encode_pixels(encoder, each) for each in pixels)).sum(1).min()
    width, height = np.median([open_image(file).size for file in files], axis=0).astype(int).tolist()
    times = {"exact_ms": round(1000 * exact_s, 3), "fast_ms": round(1000 * fast_s, 3)}
    return {**times, "cosine": round(float(cosine), 6), "width": width, "height": height}


def _encode_pixels(encoder: Encoder, pixels: Pixels) -> Floats:
    return np.concatenate([encoder.encode_pixels(pixels[i : i + 32]) for i in range(0, len(pixels), 32)])


def _measure_reference(encoder: Encoder, probe: Probe) -> RuntimeResult:
    """Measure PyTorch in float32, eager, texts padded to the whole context."""
    model, backbone = encoder.model, encoder.model.backbone
    tokens = backbone.tokenize(probe.texts, model.prompt_tokens)
    missing = backbone.context_length - model.prompt_tokens - tokens.shape[1]
    padded = torch.nn.functional.pad(tokens, (0, missing), value=backbone.layout.pad_id)
    with torch.inference_mode():
        speeds = _speeds(
            lambda texts: model.encode_query(texts).cpu(), padded,
            lambda images: model.encode_image(images).cpu(), backbone.normalized(probe.pixels),
        )  # fmt: skip
    return RuntimeResult("reference", "", speeds, {"cosine_text": 1.0, "cosine_image": 1.0})


def _calibrate(encoder: Encoder, data: Path, images: Path | None, say: Callable[[str], None]) -> None:
    annotations = Annotations(data, images)
    splits = annotations.splits()
    split = next((name for name in ("train", "val") if name in splits), "test")
    say(f"calibrating int8 on {INT8_SAMPLES} captions and images of {data}, {split}")
    samples = annotations.load(split, "present")[0]
    part = samples.samples[:: max(1, len(samples) // INT8_SAMPLES)][:INT8_SAMPLES]
    pixels = _pixels(encoder, samples, [sample.image for sample in part])
    encoder.loaded.calibrate(encoder.state, [sample.caption for sample in part], pixels)


def _measure(
    load: Callable[[], Encoder],
    name: str,
    material: Probe,
    image_of: Rows,
    probe: Probe,
    expected: tuple[Floats, Floats],
) -> RuntimeResult:
    """Prove a runtime on the probe, whose `reference_vectors` are `expected`, then measure it.

    image_of: the image of each caption of the material, for its recall.
    """
    encoder = load()
    start = time.perf_counter()
    encoder = encoder.with_runtime(name)
    opened = time.perf_counter() - start
    proof = prove(encoder.state, encoder.runtime, probe, expected)
    texts = (list(material.texts) * BATCH)[: max(BATCH, min(8 * PROBE_SIZE, len(material.texts)))]
    pixels = probe.pixels[[i % len(probe.pixels) for i in range(PROBE_SIZE)]]
    speeds = _speeds(partial(encoder.encode_text, batch_size=BATCH), texts, encoder.encode_pixels, pixels)
    vectors = encoder.encode_text(material.texts), _encode_pixels(encoder, material.pixels)
    recall = recall_at_k(*vectors, image_of, (1,))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    accuracy = {"cosine_text": round(proof.text, 6), "cosine_image": round(proof.image, 6)}
    accuracy |= {key: round(value, 2) for key, value in recall.items()}
    reason = "" if proof.holds else "its vectors are too far from the reference's"
    return RuntimeResult(name, reason, speeds, accuracy, {"memory": round(peak), "open_s": round(opened, 2)})


def _speeds(
    encode_text: Callable[[Any], object], texts: Any, encode_images: Callable[[Any], object], pixels: Any
) -> dict[str, float]:
    """Measure some single texts, all in batches, one image, and all together."""

    def encode_all() -> None:
        for i in range(0, len(texts), BATCH):
            encode_text(texts[i : i + BATCH])

    singles = range(0, len(texts), max(1, len(texts) // 8))[:8]
    one_text = statistics.median(_median_seconds(partial(encode_text, texts[i : i + 1])) for i in singles)
    one_image = _median_seconds(partial(encode_images, pixels[:1]))
    text_s = _median_seconds(encode_all) / len(texts)
    image_s = _median_seconds(partial(encode_images, pixels)) / len(pixels)
    return {
        "texts_per_s": round(1 / text_s, 1),
        "text_ms": round(1000 * one_text, 3),
        "images_per_s": round(1 / image_s, 1),
        "image_ms": round(1000 * one_image, 3),
    }


def _median_seconds(run: Callable[[], object]) -> float:
    """Time some calls; the first one, which prepares a shape, is not counted."""
    run()
    return statistics.median(timeit.repeat(run, number=1, repeat=_ROUNDS))


def _judge(row: RuntimeResult, exact: dict[str, float]) -> RuntimeResult:
    """Mark a runtime that loses recall as failed, however near its vectors are. exact: accuracy of `torch`."""
    if not row.speeds:
        return row
    if not exact:
        return replace(row, reason="there is no recall of torch to compare its recall with")
    lost = max(exact[key] - row.accuracy[key] for key in ("t2i_r1", "i2t_r1"))
    return replace(row, reason=f"recall@1 is {lost:.1f} points lower") if lost > MAX_RECALL_LOSS else row
