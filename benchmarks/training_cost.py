"""Measure the cost of training per method on a random ViT-B/32: trainable parameters, seconds per epoch, peak memory.

    python benchmarks/training_cost.py              # an epoch of 1,000 generated pairs in batches of 64, each method

- Images are noise and captions are generated, since their content does not affect the cost. Weights are random.
- Every method runs in a process of its own, since the peak memory of a process never falls.
- On a CPU, seconds are processor time on one thread, which other load distorts least; `--wall` takes wall time, as on a
  GPU.
- `batches` are timed and extrapolated to an epoch of `pairs`; all batches are alike.
- Preparation (decoding, frozen features, token weights) is timed with an empty and with a full cache. For methods with
  a frozen tower, a batch is also timed without the cached features of that tower.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dcar_core.data import Dataset, load_split
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import method
from dcar_core.serving.encoder import pick_device
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.grad_cache import MixedPrecision, accumulate_gradients
from dcar_core.training.prepared_split import PreparedSplit, prepare_split

METHODS = "clip-adapter,coop,dual,dcar,maple,dcar+"
WORDS = ("red", "blue", "small", "striped", "shiny", "old", "metal", "round", "with", "a", "and", "on", "near", "the")
HEADS = (
    "method", "trainable", "s a batch", "s an epoch", "peak MB", "preparing, s", "again with the cache, s",
    "s a batch without the cache",
)  # fmt: skip


now = time.perf_counter


def make_data(folder: Path, pairs: int) -> None:
    """Return images of 256 x 256 with a caption of 20 words and four negatives each."""
    rng, entries = np.random.default_rng(0), {}
    for i in range(pairs):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((256, 256)).save(folder / f"{i}.jpg")
        texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(5)]
        entries[str(i)] = {
            "file_name": f"{i}.jpg", "positive": texts[0], "negative": texts[1:], "class_name": f"class {i % 10}",
        }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(entries))


def seconds_a_batch(model: DCAR, data: PreparedSplit, args: argparse.Namespace) -> float:
    precision = MixedPrecision(args.amp, model.backbone.device)
    rows = np.arange(min(args.batch_size, len(data)))
    times = []
    for _ in range(1 + args.batches):  # the first warms up
        started = now()
        model.zero_grad(set_to_none=True)
        accumulate_gradients(model, data, rows, precision=precision)  # converting to a float waits for a GPU
        times.append(now() - started)
    return float(np.median(times[1:]))


def timed_prepare(training: Dataset, model: DCAR, cache: FeatureCache) -> tuple[PreparedSplit, float]:
    started = now()
    return prepare_split(training, model, for_training=True, progress=False, cache=cache), now() - started


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float | str | None]:
    backbone = load_backbone(BackboneSource(args.model, args.pretrained), pick_device(args.device))
    model = seeded_model(backbone, method(name), 0).train()
    training = load_split(folder, "train")[0]
    cache = folder / f"features-{name}"
    data, cold = timed_prepare(training, model, FeatureCache(cache, backbone))
    data, warm = timed_prepare(training, model, FeatureCache(cache, backbone))
    batch = seconds_a_batch(model, data, args)
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if backbone.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    without = None
    if model.image_is_frozen:
        pixels = np.stack([backbone.preprocess(training.read(s.image)) for s in training.samples[: args.batch_size]])
        small = replace(data, image_of=data.image_of[: args.batch_size], pixels=pixels, image_features=None)
        without = seconds_a_batch(model, replace(small, text_features=None) if model.text_is_frozen else small, args)
    trainable = sum(p.numel() for _, p in model.trainables() if p.requires_grad)
    return {
        "method": name, "trainable": trainable, "batch": batch, "epoch": batch * args.pairs / args.batch_size,
        "peak": peak, "cold": cold, "warm": warm, "without": without,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--pretrained", default="random", help="default: random weights, since only speed is measured")
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs per epoch; only two batches are generated")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=3, help="batches to time")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall time on a CPU too")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # one method, on existing data
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.wall and pick_device(args.device) == "cpu":
        global now
        now = time.process_time
    if args.only:
        print(json.dumps(measure(args.methods, args.only, args)))
        return
    made = min(args.pairs, 2 * args.batch_size)
    print(f"{args.model}, {pick_device(args.device)}, {torch.get_num_threads()} threads, batches of {args.batch_size}; "
          f"an epoch of {args.pairs:,} pairs; preparation of {made}\n")  # fmt: skip
    print(f"| {' | '.join(HEADS)} |\n{'| --- ' * len(HEADS)}|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), made)
        for name in args.methods.split(","):
            command = [sys.executable, __file__, "--methods", name, "--only", folder]
            command += ["--wall"] if args.wall else []
            for option in ("threads", "model", "pretrained", "pairs", "batch_size", "batches", "amp", "device"):
                command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            m = json.loads(done.stdout.splitlines()[-1])
            without = "-" if m["without"] is None else f"{m['without']:.3g}"
            print(f"| {name} | {m['trainable']:,} | {m['batch']:.3g} | {m['epoch']:.3g} | {m['peak']:.0f} | "
                  f"{m['cold']:.1f} | {m['warm']:.1f} | {without} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
