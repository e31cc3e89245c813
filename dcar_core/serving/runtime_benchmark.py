"""`dcar benchmark`: what each runtime does here with the user's own pictures and captions, and which one `auto` takes.

- Each runtime is measured in a process of its own, one after the other, so that memory is its own and a crash costs no
  more than one row.
- The reference is PyTorch in float32, eager, texts padded to the whole context: what a plain use of CLIP does.
- int8 is calibrated on the training split (or validation, if there is none) and measured on the test split.
- A runtime holds when its vectors are near enough to the reference's and recall@1 on the test split is not lower than
  `torch`'s, which is always measured, by more than half a point. What holds is ranked and remembered for `auto`. Some
  runtimes alone make no ranking, but one that failed is struck from what `auto` knows.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core.data import Dataset, load_split, splits_of
from dcar_core.model.preprocess import Preprocess
from dcar_core.runtimes.equality_proof import Probe, reference_vectors
from dcar_core.runtimes.registry import RUNTIME_KINDS, LoadedModel, require_known
from dcar_core.serving.encoder import Encoder
from dcar_core.serving.runtime_selection import FALLBACK, candidates, load_ranking, rank, save_ranking
from dcar_core.serving.runtime_trial import RuntimeTrial, measure_runtime
from dcar_core.util.errors import DcarError
from dcar_core.util.retrieval_metrics import recall_at_k

PROBE = 32  # pictures and captions that are compared one by one, and that speed is measured with
LOST = 0.5  # points of recall@1 that a runtime may lose


@dataclass(frozen=True)
class Material:
    """Captions (n) and their pictures, uint8 (m, 3, S, S); image_of: the picture of each caption."""

    texts: tuple[str, ...]
    pixels: NDArray[np.uint8]
    image_of: NDArray[np.int64]

    def probe(self) -> Probe:
        return Probe(self.texts[:PROBE], self.pixels[:PROBE])


@dataclass(frozen=True)
class Row:
    """One line of the table; `trial` is None when the runtime cannot be had, for `reason`. memory: MB at its peak."""

    name: str
    trial: RuntimeTrial | None = None
    memory: float | None = None
    recall: dict[str, float] | None = None
    open_s: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Decoding:
    """From a file to pixels in one thread, milliseconds a picture; cosine: the least of the fast mode's embeddings."""

    exact_ms: float
    fast_ms: float
    cosine: float
    width: int
    height: int


@dataclass(frozen=True)
class Report:
    """Everything that was measured. chosen: what `auto` will take, "" if it has still to find out."""

    rows: tuple[Row, ...]
    decoding: Decoding
    chosen: str
    threads: int
    texts: int
    tokens: float
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
) -> Report:
    """Measure runtimes on a data set's test split.

    Args:
        checkpoint: as `Encoder.load` takes it.
        data: annotations with a test split, as for training.
        runtimes: names, `torch` beside them; default: what `auto` tries, and int8.
        limit: most captions of the test split.
        say: told what is going on.

    Raises:
        DcarError: the model or the data cannot be used, or a runtime's name is unknown.
    """
    for name in runtimes:
        require_known(name)
    encoder = Encoder.load(checkpoint, pretrained=pretrained, device=device, cache=cache)
    names = list(dict.fromkeys(["torch", *(runtimes or [*candidates(encoder.loaded), *_quantised(encoder)])]))
    test = load_split(data, "test", image_root=images, image_policy="present")[0]
    say(f"reading {min(limit, len(test)):,} captions and their pictures")
    material, decoding = _material(encoder, test, limit)
    rows = [_baseline(encoder, material)]
    wanted = reference_vectors(encoder.model, material.probe())
    for name in names:
        say(f"measuring {name}")
        try:
            if name == "openvino-int8":
                _calibrate(encoder, data, images, say)
            rows.append(_alone(checkpoint, pretrained, device, name, encoder.loaded.cache, material, wanted))
        except BrokenProcessPool:
            rows.append(Row(name, reason="its process died, perhaps for want of memory"))
        except DcarError as error:
            rows.append(Row(name, reason=str(error)))
        except Exception as error:  # whatever a library raises costs its row, not the others
            rows.append(Row(name, reason=f"{type(error).__name__}: {error}".strip().splitlines()[0]))
    judged = _judged(rows)
    lengths = encoder.adapter.tokens(material.texts)[0].argmax(-1) + 2 + encoder.model.prompt_tokens
    return Report(
        tuple(judged), decoding, _tell_auto(encoder.loaded, judged[1:]), torch.get_num_threads(),
        len(material.texts), round(float(lengths.mean()), 1), len(material.pixels),
    )  # fmt: skip


def _tell_auto(loaded: LoadedModel, rows: Sequence[Row]) -> str:
    """Remember what was found, as far as it can be compared; returns what `auto` will take, "" if it is not known."""
    if set(candidates(loaded)) <= {row.name for row in rows}:
        ranking = rank([row.trial for row in rows if row.trial is not None and row.name != "torch-compile"])
        save_ranking(loaded, ranking, own=True)
        return ranking.names[0] if ranking.names else FALLBACK
    before = load_ranking(loaded)
    if before is None:
        return ""
    failed = {row.name for row in rows if row.trial is None or not row.trial.holds}
    kept = tuple(name for name in before.names if name not in failed) or (FALLBACK,)
    if kept != before.names:
        save_ranking(loaded, replace(before, names=kept), own=True)
    return kept[0]


def _quantised(encoder: Encoder) -> list[str]:
    if encoder.model.backbone.device.type != "cpu":
        return []
    return [name for name, kind in RUNTIME_KINDS.items() if kind.precision == "int8"]


def _material(encoder: Encoder, test: Dataset, limit: int) -> tuple[Material, Decoding]:
    samples = test.samples[:limit]
    names = replace(test, samples=samples).images
    pixels = np.stack([encoder.preprocess(test.read(name)) for name in names])
    row_of = {name: row for row, name in enumerate(names)}
    material = Material(
        tuple(sample.caption for sample in samples), pixels, np.array([row_of[sample.image] for sample in samples])
    )
    return material, _decoding(encoder, [test.read(name) for name in names[: 4 * PROBE]])


def _decoding(encoder: Encoder, files: list[bytes]) -> Decoding:
    from dcar_core.images import open_image

    exact, fast = encoder.model.backbone.preprocess, encoder.preprocess
    vectors, seconds = [], []
    for preprocess in (exact, fast):
        pixels = np.stack([preprocess(file) for file in files])
        seconds.append(statistics.median(_seconds(preprocess, files) for _ in range(3)) / len(files))
        vectors.append(np.concatenate([encoder.encode_pixels(pixels[i : i + 32]) for i in range(0, len(pixels), 32)]))
    sizes = [open_image(file).size for file in files]
    width, height = (int(statistics.median(size[i] for size in sizes)) for i in (0, 1))
    cosine = float((vectors[0] * vectors[1]).sum(1).min())
    return Decoding(round(1000 * seconds[0], 3), round(1000 * seconds[1], 3), round(cosine, 6), width, height)


def _seconds(preprocess: Preprocess, files: list[bytes]) -> float:
    start = time.perf_counter()
    for file in files:
        preprocess(file)
    return time.perf_counter() - start


def _baseline(encoder: Encoder, material: Material) -> Row:
    """PyTorch in float32, eager, texts padded to the whole context, 32 at a time."""
    model, probe = encoder.model, material.probe()
    backbone = model.backbone
    tokens = backbone.tokenize(probe.texts, model.prompt_tokens)
    padded = torch.nn.functional.pad(tokens, (0, backbone.context_length - model.prompt_tokens - tokens.shape[1]))
    pixels = torch.from_numpy(backbone.preprocess.normalize(probe.pixels)).to(backbone.device)

    @torch.inference_mode()
    def median(run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    texts = median(lambda: model.encode_query(padded).cpu())
    text = median(lambda: model.encode_query(padded[:1]).cpu())
    pictures = median(lambda: model.encode_image(pixels).cpu())
    picture = median(lambda: model.encode_image(pixels[:1]).cpu())
    trial = RuntimeTrial(
        "reference", round(len(padded) / texts, 1), round(1000 * text, 3), round(len(pixels) / pictures, 1),
        round(1000 * picture, 3), 1.0, 1.0, True,
    )  # fmt: skip
    return Row("reference", trial)


def _calibrate(encoder: Encoder, data: Path, images: Path | None, say: Callable[[str], None]) -> None:
    from dcar_core.runtimes.int8_calibration import SAMPLES, CalibrationData, calibrate, is_calibrated

    if is_calibrated(encoder.loaded):
        return
    split = next((name for name in ("train", "val") if name in splits_of(data)), "test")
    say(f"calibrating int8 on {SAMPLES} captions and pictures of {data}, {split}")
    samples = load_split(data, split, image_root=images, image_policy="present")[0]
    step = max(1, len(samples) // SAMPLES)
    part = samples.samples[::step][:SAMPLES]
    pixels = np.stack([encoder.preprocess(samples.read(sample.image)) for sample in part])
    calibrate(encoder.adapter, encoder.loaded, CalibrationData([sample.caption for sample in part], pixels))


def _alone(*job: Any) -> Row:
    """`_measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, *job).result()


def _measure(
    checkpoint: str,
    pretrained: str | None,
    device: str,
    name: str,
    cache: Path,
    material: Material,
    wanted: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> Row:
    encoder = Encoder.load(checkpoint, pretrained=pretrained, device=device, cache=cache)
    start = time.perf_counter()
    encoder = encoder.with_runtime(name)
    opened = time.perf_counter() - start
    adapter, runtime = encoder.adapter, encoder.runtime
    probe = material.probe()
    trial = measure_runtime(adapter, runtime, probe, wanted, texts=material.texts[: 8 * PROBE], pictures=PROBE)
    texts = encoder.encode_text(material.texts)
    pictures = [encoder.encode_pixels(material.pixels[i : i + 32]) for i in range(0, len(material.pixels), 32)]
    recall = recall_at_k(texts, np.concatenate(pictures), material.image_of, (1,))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Row(name, trial, round(peak), {key: round(value, 2) for key, value in recall.items()}, round(opened, 2))


def _judged(rows: list[Row]) -> list[Row]:
    """A runtime that loses recall does not hold, however near its vectors are."""
    exact = next((row.recall for row in rows if row.name == "torch" and row.recall), None)
    judged = []
    for row in rows:
        if row.trial is not None and row.recall is not None and exact is not None:
            lost = max(exact[key] - row.recall[key] for key in exact)
            if lost > LOST:
                row = replace(row, trial=replace(row.trial, holds=False), reason=f"recall@1 is {lost:.1f} points lower")
        if row.trial is not None and row.recall is not None and exact is None:
            why = "there is no recall of torch to compare its recall with"
            row = replace(row, trial=replace(row.trial, holds=False), reason=why)
        if row.trial is not None and not row.trial.holds and not row.reason:
            row = replace(row, reason="its vectors are too far from the reference's")
        judged.append(row)
    return judged


def table(report: Report) -> str:
    """The report as text, a line for each runtime."""
    lines = [
        f"{'runtime':15} {'texts/s':>8} {'text ms':>8} {'images/s':>9} {'image ms':>9} {'MB':>6} {'open s':>7} "
        f"{'cosine t':>9} {'cosine i':>9} {'R@1 t2i':>8} {'R@1 i2t':>8}"
    ]
    for row in report.rows:
        if row.trial is None:
            lines.append(f"{row.name:15} {row.reason}")
            continue
        found, recall = row.trial, row.recall or {}
        lines.append(
            f"{row.name:15} {found.texts_per_s:8.1f} {found.text_ms:8.2f} {found.images_per_s:9.1f} "
            f"{found.image_ms:9.2f} {_or_dash(row.memory, 6, 0)} {_or_dash(row.open_s, 7, 2)} {found.cosine_text:9.5f} "
            f"{found.cosine_image:9.5f} {_or_dash(recall.get('t2i_r1'), 8, 2)} {_or_dash(recall.get('i2t_r1'), 8, 2)}"
            + (f"  not used: {row.reason}" if row.reason else "")
        )
    decoding = report.decoding
    lines += [
        "",
        f"{report.texts:,} captions of {report.tokens} tokens on average with SOS, EOT and prompts; "
        f"{report.pictures:,} pictures; {report.threads} threads; medians of three",
        f"decoding {decoding.width} x {decoding.height}, one thread: {decoding.exact_ms:.2f} ms exact, "
        f"{decoding.fast_ms:.2f} ms fast, whose embeddings stay within cosine {decoding.cosine:.5f}",
        f"auto takes {report.chosen}" if report.chosen else "auto has still to measure: run this without --runtimes",
    ]
    return "\n".join(lines)


def _or_dash(value: float | None, width: int, digits: int) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"
