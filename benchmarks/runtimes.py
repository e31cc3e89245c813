"""Measure every encoder runtime of a model on this machine, as ratios to plain PyTorch
in the same run.

    python benchmarks/runtimes.py [--checkpoint CHECKPOINT --data DATA] [--runtimes
    torch,openvino-bf16]

- The reference is PyTorch in float32, eager, texts padded to the whole context, 32 at a
  time. Figures are medians.
- Each runtime has a process of its own, so that memory is its own and a crash costs one
  row. cosine: the lowest.
- The default model is a ViT-B/32 with random weights. Captions are those of the bundled
  emoji; images are drawn JPEGs.
"""

import argparse
import resource
import statistics
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode import picture
from service import ROOT, vit_checkpoint

from dcar_core import Encoder
from dcar_core.data import Annotations
from dcar_core.encoder.runtimes import auto_runtimes
from dcar_core.model.dcar import DCAR
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.processes import in_own_process

EXAMPLE = ROOT / "examples" / "emoji" / "twemoji"
SIZE = (500, 400)
BATCH = 32
REFERENCE = "reference"


def captioned(data: Path | None, count: int) -> tuple[list[str], list[bytes]]:
    """Return captions and image files of a test split, or those of the bundled emoji
    and drawn photos.
    """
    test = Annotations(data or EXAMPLE).load("test", "present")[0]
    captions = list(
        {sample.image: sample.caption for sample in reversed(test.samples)}.values()
    )[:count]
    return captions, [
        test.read(name) if data else picture(row, SIZE)
        for row, name in enumerate(test.images[:BATCH])
    ]


def measure(
    load: Callable[..., Encoder],
    name: str,
    texts: list[str],
    pixels: Pixels,
) -> tuple[dict[str, float], tuple[Floats, Floats]]:
    """Return speeds and memory of a runtime, and its vectors of texts and of pixels."""
    encoder = load(runtime="torch" if name == REFERENCE else name)
    own = encoder.encode_text, encoder.encode_pixels
    encode_text, encode_images = plain(encoder.model) if name == REFERENCE else own
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    single = [
        seconds(partial(encode_text, [text]))
        for text in texts[:: max(1, len(texts) // 8)]
    ]
    figures = {
        "texts": (
            len(texts) / seconds(lambda: [encode_text(batch) for batch in batches])
        ),
        "ms": 1000 * statistics.median(single),
        "images": len(pixels) / seconds(partial(encode_images, pixels)),
        "MB": (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024)
            / 1e6
        ),
    }
    return figures, (
        np.concatenate([encode_text(batch) for batch in batches]),
        encode_images(pixels),
    )


def plain(
    model: DCAR,
) -> tuple[Callable[[list[str]], Floats], Callable[[Pixels], Floats]]:
    backbone = model.backbone

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Floats:
        tokens = backbone.tokenize(texts, model.prompt_tokens)
        missing = backbone.context_length - model.prompt_tokens - tokens.shape[1]
        padded = torch.nn.functional.pad(
            tokens,
            (0, missing),
            value=backbone.layout.pad_id,
        )
        return model.encode_query(padded).cpu().numpy()

    @torch.inference_mode()
    def encode_images(pixels: Pixels) -> Floats:
        return model.encode_image(backbone.standardized(pixels)).cpu().numpy()

    return encode_text, encode_images


def seconds(run: Callable[[], Any]) -> float:
    run()  # the first call prepares a shape
    return statistics.median(timeit.repeat(run, number=1, repeat=3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks"),
        help="folder of model, images, exports",
    )
    parser.add_argument("--pictures", type=int, default=256, help="maximum of captions")
    parser.add_argument(
        "--checkpoint",
        help="checkpoint, model directory or open_clip model to measure instead",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="annotations with a test split to measure with instead",
    )
    parser.add_argument(
        "--runtimes", help="comma-separated; default: torch and what `auto` tries"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    checkpoint = args.checkpoint or str(vit_checkpoint(args.work))
    load = partial(
        Encoder.load,
        checkpoint,
        device=args.device,
        cache=args.work / "runtimes",
    )
    encoder, (texts, files) = load(), captioned(args.data, args.pictures)
    pixels = np.stack([encoder.preprocess(file) for file in files[: args.pictures]])
    reference, expected = in_own_process(measure, load, REFERENCE, texts, pixels)
    print("| runtime | texts/s | one text | images/s | memory | cosine text, image |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(
        f"| {REFERENCE} | {reference['texts']:.0f} | {reference['ms']:.1f} ms |"
        f" {reference['images']:.0f} | | |"
    )
    if args.runtimes:
        names = args.runtimes.split(",")
    else:
        names = auto_runtimes(encoder.model.backbone.device.type)
    for name in dict.fromkeys(["torch", *names]):
        try:
            found, vectors = in_own_process(measure, load, name, texts, pixels)
        except Exception as error:
            # a library's error of any kind, or the end of its process
            print(f"| {name} | {str(error).partition(chr(10))[0]} | | | | |")
            continue
        text, image = (
            (one * other).sum(1).min()
            for one, other in zip(vectors, expected, strict=True)
        )
        print(
            f"| {name} | {found['texts']:.0f}"
            f" ({found['texts'] / reference['texts']:.1f}x) | {found['ms']:.1f} ms |"
            f" {found['images']:.0f} ({found['images'] / reference['images']:.1f}x) |"
            f" {found['MB']:,.0f} MB | {text:.4f}, {image:.4f} |",
            flush=True,
        )
    print(
        f"\n{len(texts)} captions, {len(pixels)} images, {torch.get_num_threads()}"
        " threads"
    )


if __name__ == "__main__":
    main()
