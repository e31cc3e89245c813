"""Encoding time of adapted models as a ratio to plain CLIP: the cost of prompts, adapters and token weights in use.

    python benchmarks/query_time.py                     # random ViT-B/32, batches of 1 and of 32

- Weights do not affect the time, so they are random.
- Methods alternate within each round, so that other load on the machine affects all of them. The ratio is the median
  of the rounds' ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcar_core.encoder.encoder import Encoder, pick_device
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import METHODS, method

QUERIES = (
    "crying cat",
    "red sports car seen from behind",
    "a small brown dog with long ears lying on a blue blanket next to a window",
    "a pink flower with five pointed petals, a dark red centre and serrated green leaves, photographed from above on a "
    "cloudy day in a garden",
)


def seconds_per_call(encode: Callable[[], Any], repeat: int) -> float:
    """Return the mean seconds of a call."""
    started = time.perf_counter()
    for _ in range(repeat):
        encode()  # copies to the CPU, which waits for the GPU
    return (time.perf_counter() - started) / repeat


def call(encoder: Encoder, text: str | None, batch: int) -> Callable[[], Any]:
    """Return the call that encodes a batch of a text, or of images without one."""
    size = encoder.preprocess.size
    if text is None:
        return partial(encoder.encode_pixels, np.zeros((batch, 3, size, size), np.uint8))
    return partial(encoder.encode_text, [text] * batch)


def main() -> None:
    """Print one line for each query, and one for an image, and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument(
        "--pretrained", default="random", help="default: random weights, which suffice to measure speed"
    )
    parser.add_argument("--methods", default="coop,dcar,dcar+", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    backbone = load_backbone(BackboneSource(args.model, args.pretrained), pick_device(args.device))
    names = ["clip", *args.methods.split(",")]
    encoders = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            config = method(name)
            if config.reweight.train != "none":
                config = config.with_query_weights("predicted")  # the more expensive choice
            save_checkpoint(seeded_model(backbone, config, 0), Path(folder) / name)
            encoders[name] = Encoder.load(Path(folder) / name, device=str(backbone.device), backbone=backbone)
    print(f"{args.model}, {backbone.device}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print("| batch | of | plain CLIP, ms |", " | ".join(f"{n}, ratio" for n in names[1:]), "|")
    print("| --- " * (2 + len(names)) + "|")
    cases: list[str | None] = [*QUERIES, None]
    for batch in (1, 32):
        for query in cases:
            calls, repeat = {name: call(encoder, query, batch) for name, encoder in encoders.items()}, 5 // batch or 1
            for encode in calls.values():
                seconds_per_call(encode, 2)  # warm-up
            rounds = [
                {name: seconds_per_call(encode, repeat) for name, encode in calls.items()} for _ in range(args.rounds)
            ]
            plain = statistics.median(times["clip"] for times in rounds)
            ratios = [statistics.median(times[name] / times["clip"] for times in rounds) for name in names[1:]]
            label = "images" if query is None else f"texts of {len(query.split())} words"
            print(f"| {batch} | {label} | {1000 * plain:.1f} | {' | '.join(f'{r:.2f}' for r in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
