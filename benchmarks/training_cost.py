"""Cost of training by method on a random ViT-B/32: trainable parameters, seconds an
epoch, peak memory.

    python benchmarks/training_cost.py
        # an epoch of 1,000 generated pairs in batches of 64, each method

- Images are noise, captions and weights random: their content does not affect the cost.
- Every method runs in a process of its own, because a process's peak memory never
  falls.
- On a CPU, seconds are processor time on one thread, which other load distorts least;
  `--wall` measures wall-clock time, as on a GPU.
- `--batches` batches are timed and extrapolated to an epoch of `--pairs`.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dcar_core.data import Annotations
from dcar_core.encoder.encoder import pick_device
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.objective import MixedPrecision, accumulate_gradients
from dcar_core.training.prepared_split import FeatureCache, PreparedSplit, prepare_split
from dcar_core.util.processes import in_own_process

METHODS = "clip-adapter,coop,dcar,maple,dcar+,block-adapters"
WORDS = (
    "red",
    "blue",
    "small",
    "striped",
    "shiny",
    "old",
    "metal",
    "round",
    "with",
    "a",
    "and",
    "on",
    "near",
    "the",
)
HEADS = ("method", "trainable", "s per batch", "s per epoch", "peak MB")

clock = time.perf_counter


def make_data(folder: Path, pairs: int) -> None:
    """Write images of 256 x 256, each with a caption of 20 words and four negatives."""
    rng = np.random.default_rng(0)
    entries = {}
    for i in range(pairs):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((256, 256)).save(folder / f"{i}.jpg")
        texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(5)]
        entries[str(i)] = {
            "file_name": f"{i}.jpg",
            "positive": texts[0],
            "negative": texts[1:],
            "class_name": f"class {i % 10}",
        }
    (folder / "train.json").write_text(json.dumps(entries))


def seconds_per_batch(
    model: DCAR,
    data: PreparedSplit,
    args: argparse.Namespace,
) -> float:
    """Return the median seconds of a batch's forward and backward pass."""
    precision = MixedPrecision(args.amp, model.backbone.device)
    rows = np.arange(min(args.batch_size, len(data)))
    times = []
    for _ in range(1 + args.batches):  # the first one is a warm-up
        started = clock()
        model.zero_grad(set_to_none=True)
        # returns a float, which waits for the GPU
        accumulate_gradients(model, data, rows, precision=precision)
        times.append(clock() - started)
    return float(np.median(times[1:]))


def prepare_process(args: argparse.Namespace) -> None:
    """Set the number of threads, and the processor's time as the clock of a CPU."""
    global clock
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.wall and pick_device(args.device) == "cpu":
        clock = time.process_time


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Measure one method in this process."""
    prepare_process(args)
    backbone = load_backbone(
        BackboneSource(args.model, args.pretrained), pick_device(args.device)
    )
    model = seeded_model(backbone, find_method(name).config, 0).train()
    training = Annotations(folder).load("train")[0]
    data = prepare_split(
        training,
        model,
        for_training=True,
        cache=FeatureCache(None, backbone),
    )
    batch = seconds_per_batch(model, data, args)
    is_gpu = backbone.device.type == "cuda"
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = (torch.cuda.max_memory_allocated() if is_gpu else own) / 1e6
    trainable = sum(p.numel() for _, p in model.trainables())
    return {
        "trainable": trainable,
        "batch": batch,
        "epoch": batch * args.pairs / args.batch_size,
        "peak": peak,
    }


def main() -> None:
    """Print one line for each method, each measured in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument(
        "--pretrained",
        default="random",
        help="default: random weights, which suffice to measure cost",
    )
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument(
        "--pairs",
        type=int,
        default=1000,
        help="pairs of an epoch; two batches are generated",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=3, help="batches to time")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--wall",
        action="store_true",
        help="measure wall-clock time on a CPU too",
    )
    args = parser.parse_args()
    prepare_process(args)
    generated = min(args.pairs, 2 * args.batch_size)
    print(
        f"{args.model}, {pick_device(args.device)}, {torch.get_num_threads()} threads,"
        f" batches of {args.batch_size}; an epoch of {args.pairs:,} pairs\n"
    )
    print(f"| {' | '.join(HEADS)} |\n{'| --- ' * len(HEADS)}|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), generated)
        for name in args.methods.split(","):
            m = in_own_process(measure, name, Path(folder), args)
            print(
                f"| {name} | {m['trainable']:,} | {m['batch']:.3g} | {m['epoch']:.3g} |"
                f" {m['peak']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
