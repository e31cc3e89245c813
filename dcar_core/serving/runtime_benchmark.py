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
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dcar_core.data import Annotations, Dataset, load_split
from dcar_core.images import open_image
from dcar_core.runtimes.equality_proof import Probe, prove, reference_vectors
from dcar_core.runtimes.registry import RUNTIME_KINDS, require_known
from dcar_core.serving.encoder import Encoder
from dcar_core.serving.runtime_selection import preferred_runtimes, reason_of
from dcar_core.util.arrays import Floats, Pixels, Rows
from dcar_core.util.errors import DataError, ImageError
from dcar_core.util.processes import in_own_process
from dcar_core.util.retrieval_metrics import recall_at_k

PROBE_SIZE = 32  # images and captions that are compared one by one, and that speed is measured with
MAX_RECALL_LOSS = 0.5  # points of recall@1
BATCH = 32  # texts together
_ROUNDS = 3


@dataclass(frozen=True)
class BenchmarkData:
    """Captions (n) and their images, uint8 (m, 3, S, S); image_of: the image of each caption."""

    texts: tuple[str, ...]
    pixels: Pixels
    image_of: Rows

    def probe(self) -> Probe:
        return Probe(self.texts[:PROBE_SIZE], self.pixels[:PROBE_SIZE])


@dataclass(frozen=True)
class RuntimeTrial:
    """One runtime, measured: rates per second, times in milliseconds, medians; lowest cosines against float32."""

    texts_per_s: float
    text_ms: float
    images_per_s: float
    image_ms: float
    cosine_text: float = 1.0
    cosine_image: float = 1.0
    holds: bool = True

    @property
    def score(self) -> float:
        """Geometric mean of what a service and an index job need: one text, many texts, many images."""
        return float((1000 / self.text_ms * self.texts_per_s * self.images_per_s) ** (1 / 3))


@dataclass(frozen=True)
class RuntimeResult:
    """One line of the table; `trial` is None if the runtime cannot be used, for `reason`. memory: peak in MB."""

    name: str
    trial: RuntimeTrial | None = None
    memory: float | None = None
    recall: dict[str, float] | None = None
    open_s: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class DecodingSpeed:
    """From a file to pixels in one thread, milliseconds an image; cosine: the lowest of the fast mode's embeddings."""

    exact_ms: float
    fast_ms: float
    cosine: float
    width: int
    height: int


@dataclass(frozen=True)
class RuntimeReport:
    """All measurements. fastest: of those that hold, "" if none does. auto: the runtime that `auto` tries first."""

    rows: tuple[RuntimeResult, ...]
    decoding: DecodingSpeed
    fastest: str
    auto: str
    threads: int
    texts: int
    tokens: float
    images: int


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

    Raises:
        DcarError: the model or the data cannot be used, or a runtime's name is unknown.
    """
    for name in runtimes:
        require_known(name)
    encoder = Encoder.load(checkpoint, pretrained=pretrained, device=device, cache=cache)
    backbone = encoder.model.backbone
    usual, kinds = preferred_runtimes(backbone), RUNTIME_KINDS.items()
    int8 = (name for name, kind in kinds if kind.precision == "int8" and kind.on == backbone.device.type)
    names = dict.fromkeys(["torch", *(runtimes or [*usual, *int8])])
    test = load_split(data, "test", image_root=images, image_policy="present")[0]
    say(f"reading {min(limit, len(test)):,} captions and their images")
    material, decoding = _read(encoder, test, limit)
    rows = [_measure_reference(encoder, material)]
    expected = reference_vectors(encoder.model, material.probe())
    for name in names:
        say(f"measuring {name}")
        try:
            if name == "openvino-int8":
                _calibrate(encoder, data, images, say)
            job = (checkpoint, pretrained, device, name, encoder.loaded.cache, material, expected)
            rows.append(in_own_process(_measure, *job))
        except BrokenProcessPool:
            rows.append(RuntimeResult(name, reason="its process died, perhaps out of memory"))
        except Exception as error:  # a library's error of any kind costs its row, not the others
            rows.append(RuntimeResult(name, reason=reason_of(error)))
    exact = next((row.recall for row in rows if row.name == "torch"), None)
    judged = [_judge(row, exact) for row in rows]
    state = encoder.state
    lengths = state.layout.lengths(state.tokenizer(material.texts)) + encoder.model.prompt_tokens
    scores = {row.name: row.trial.score for row in judged[1:] if row.trial is not None and row.trial.holds}
    return RuntimeReport(
        tuple(judged), decoding, max(scores, key=lambda name: scores[name], default=""), usual[0],
        torch.get_num_threads(), len(material.texts), round(float(lengths.mean()), 1), len(material.pixels),
    )  # fmt: skip


def _read(encoder: Encoder, test: Dataset, limit: int) -> tuple[BenchmarkData, DecodingSpeed]:
    samples = test.samples[:limit]
    names = replace(test, samples=samples).images
    pixels = _pixels(encoder, test, names)
    row_of = {name: row for row, name in enumerate(names)}
    material = BenchmarkData(
        tuple(sample.caption for sample in samples), pixels, np.array([row_of[sample.image] for sample in samples])
    )
    return material, _measure_decoding(encoder, [test.read(name) for name in names[: 4 * PROBE_SIZE]])


def _pixels(encoder: Encoder, data: Dataset, names: Sequence[str]) -> Pixels:
    pixels = []
    for name in names:
        try:
            pixels.append(encoder.preprocess(data.read(name)))
        except ImageError as error:
            raise DataError(f"{data.split}: {name}: {error}") from error
    return np.stack(pixels)


def _measure_decoding(encoder: Encoder, files: list[bytes]) -> DecodingSpeed:
    exact, fast = encoder.model.backbone.preprocess, encoder.preprocess
    exact_s = _median_seconds(lambda: [exact(file) for file in files]) / len(files)
    fast_s = _median_seconds(lambda: [fast(file) for file in files]) / len(files)
    pixels = (np.stack([preprocess(file) for file in files]) for preprocess in (exact, fast))
    cosine = np.multiply(*(_encode_pixels(encoder, each) for each in pixels)).sum(1).min()
    width, height = np.median([open_image(file).size for file in files], axis=0).astype(int).tolist()
    return DecodingSpeed(round(1000 * exact_s, 3), round(1000 * fast_s, 3), round(float(cosine), 6), width, height)


def _encode_pixels(encoder: Encoder, pixels: Pixels) -> Floats:
    return np.concatenate([encoder.encode_pixels(pixels[i : i + 32]) for i in range(0, len(pixels), 32)])


def _measure_reference(encoder: Encoder, material: BenchmarkData) -> RuntimeResult:
    """Measure PyTorch in float32, eager, texts padded to the whole context, 32 at a time."""
    model, probe = encoder.model, material.probe()
    backbone = model.backbone
    tokens = backbone.tokenize(probe.texts, model.prompt_tokens)
    missing = backbone.context_length - model.prompt_tokens - tokens.shape[1]
    padded = torch.nn.functional.pad(tokens, (0, missing), value=backbone.layout.pad_id)
    pixels = backbone.normalized(probe.pixels)

    def seconds(encode: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> tuple[float, float]:
        with torch.inference_mode():
            alone = _median_seconds(lambda: encode(batch[:1]).cpu())
            return alone, _median_seconds(lambda: encode(batch).cpu()) / len(batch)

    text, image = seconds(model.encode_query, padded), seconds(model.encode_image, pixels)
    return RuntimeResult("reference", RuntimeTrial(*_rounded(text), *_rounded(image)))


def _rounded(seconds: tuple[float, float]) -> tuple[float, float]:
    """Return rate and milliseconds from the seconds of one alone, and of one among many."""
    alone, among_many = seconds
    return round(1 / among_many, 1), round(1000 * alone, 3)


def _calibrate(encoder: Encoder, data: Path, images: Path | None, say: Callable[[str], None]) -> None:
    from dcar_core.runtimes.int8_calibration import SAMPLES, calibrate, is_calibrated

    if is_calibrated(encoder.loaded):
        return
    splits = Annotations(data).splits()
    split = next((name for name in ("train", "val") if name in splits), "test")
    say(f"calibrating int8 on {SAMPLES} captions and images of {data}, {split}")
    samples = load_split(data, split, image_root=images, image_policy="present")[0]
    step = max(1, len(samples) // SAMPLES)
    part = samples.samples[::step][:SAMPLES]
    pixels = _pixels(encoder, samples, [sample.image for sample in part])
    calibrate(encoder.state, encoder.loaded, Probe(tuple(sample.caption for sample in part), pixels))


def _measure(
    checkpoint: str,
    pretrained: str | None,
    device: str,
    name: str,
    cache: Path,
    material: BenchmarkData,
    expected: tuple[Floats, Floats],
) -> RuntimeResult:
    encoder = Encoder.load(checkpoint, pretrained=pretrained, device=device, cache=cache)
    start = time.perf_counter()
    encoder = encoder.with_runtime(name, proven=False)  # the trial proves it
    opened = time.perf_counter() - start
    trial = _trial(encoder, material, expected)
    texts = encoder.encode_text(material.texts)
    recall = recall_at_k(texts, _encode_pixels(encoder, material.pixels), material.image_of, (1,))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    rounded = {key: round(value, 2) for key, value in recall.items()}
    return RuntimeResult(name, trial, round(peak), rounded, round(opened, 2))


def _trial(encoder: Encoder, material: BenchmarkData, expected: tuple[Floats, Floats]) -> RuntimeTrial:
    """Prove a runtime on the probe, whose `reference_vectors` are `expected`, then measure it."""
    probe = material.probe()
    proof = prove(encoder.state, encoder.runtime, probe, expected)
    texts = list(material.texts[: 8 * PROBE_SIZE])
    texts = (texts * BATCH)[:BATCH] if len(texts) < BATCH else texts
    pixels = probe.pixels[[i % len(probe.pixels) for i in range(PROBE_SIZE)]]

    def encode_all() -> None:
        for i in range(0, len(texts), BATCH):
            encoder.encode_text(texts[i : i + BATCH], BATCH)

    singles = texts[:: max(1, len(texts) // 8)][:8]
    one_text = statistics.median(_median_seconds(partial(encoder.encode_text, [text])) for text in singles)
    one_image = _median_seconds(lambda: encoder.encode_pixels(pixels[:1]))
    text = one_text, _median_seconds(encode_all) / len(texts)
    image = one_image, _median_seconds(lambda: encoder.encode_pixels(pixels)) / len(pixels)
    cosines = round(proof.text, 6), round(proof.image, 6)
    return RuntimeTrial(*_rounded(text), *_rounded(image), *cosines, proof.holds)


def _median_seconds(run: Callable[[], object]) -> float:
    """Time some calls; the first one, which prepares a shape, is not counted."""
    run()
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _judge(row: RuntimeResult, exact: dict[str, float] | None) -> RuntimeResult:
    """Mark a runtime that loses recall as failed, however near its vectors are. exact: recall of `torch`."""
    if row.trial is None or row.recall is None:
        return row
    reason = "" if row.trial.holds else "its vectors are too far from the reference's"
    if exact is None:
        reason = "there is no recall of torch to compare its recall with"
    elif (lost := max(exact[key] - row.recall[key] for key in exact)) > MAX_RECALL_LOSS:
        reason = f"recall@1 is {lost:.1f} points lower"
    return replace(row, trial=replace(row.trial, holds=not reason), reason=reason)


def format_report(report: RuntimeReport) -> str:
    lines = [
        f"{'runtime':15} {'texts/s':>8} {'text ms':>8} {'images/s':>9} {'image ms':>9} {'MB':>6} {'open s':>7} "
        f"{'cosine t':>9} {'cosine i':>9} {'R@1 t2i':>8} {'R@1 i2t':>8}"
    ]
    for row in report.rows:
        if row.trial is None:
            lines.append(f"{row.name:15} {row.reason}")
            continue
        trial, recall = row.trial, row.recall or {}
        lines.append(
            f"{row.name:15} {trial.texts_per_s:8.1f} {trial.text_ms:8.2f} {trial.images_per_s:9.1f} "
            f"{trial.image_ms:9.2f} {_or_dash(row.memory, 6, 0)} {_or_dash(row.open_s, 7, 2)} {trial.cosine_text:9.5f} "
            f"{trial.cosine_image:9.5f} {_or_dash(recall.get('t2i_r1'), 8, 2)} {_or_dash(recall.get('i2t_r1'), 8, 2)}"
            + (f"  not used: {row.reason}" if row.reason else "")
        )
    decoding = report.decoding
    lines += [
        "",
        f"{report.texts:,} captions of {report.tokens} tokens on average with SOS, EOT and prompts; "
        f"{report.images:,} images; {report.threads} threads; medians of three",
        f"decoding {decoding.width} x {decoding.height}, one thread: {decoding.exact_ms:.2f} ms exact, "
        f"{decoding.fast_ms:.2f} ms fast, whose embeddings stay within cosine {decoding.cosine:.5f}",
        f"fastest here: {report.fastest or 'none'}; auto tries {report.auto} first; --runtime or DCAR_RUNTIME names "
        "another",
    ]
    return "\n".join(lines)


def _or_dash(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
