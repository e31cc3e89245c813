"""Measure every encoder runtime of a model on this machine, as ratios to plain PyTorch in the same run.

    python benchmarks/runtimes.py [--checkpoint CHECKPOINT --data DATA] [--runtimes torch,openvino-bf16]

- The reference is PyTorch in float32, eager, texts padded to the whole context, 32 at a time. Figures are medians.
- Each runtime has a process of its own, so that memory is its own and a crash costs one row. cosine: the lowest.
- The default model is a ViT-B/32 with random weights. Captions are those of the bundled emoji, the first of each.
  Images are 500 x 400 JPEGs of about 40 KB, drawn from the bundled gallery, each on a background of its own.
"""

import argparse
import io
import json
import resource
import statistics
import sys
import tarfile
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from service import ROOT, vit_checkpoint
from tqdm import tqdm

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


def catalogue(work: Path, count: int) -> Path:
    """Write `count` captioned JPEGs to measure with; made once."""
    out = work / f"photos-{count}"
    if (out / "pairs.jsonl").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    pairs = list(json.loads((EXAMPLE / "test.json").read_text()).values())
    chosen = np.random.default_rng(0).permutation(len(pairs))[:count]
    with tarfile.open(EXAMPLE / "gallery.tar") as tar:
        for pair in tqdm([pairs[i] for i in chosen], "drawing pictures", unit="img"):
            name = f"{Path(pair['file_name']).stem}.jpg"
            photo(tar.extractfile(pair["file_name"]).read(), seed=len(rows)).save(out / name, "JPEG", quality=88)
            texts = pair["positive"]
            caption = texts if isinstance(texts, str) else texts[0]
            rows.append({"image": name, "caption": caption, "category": pair["class_name"], "split": "test"})
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def photo(picture: bytes, seed: int) -> Image.Image:
    """Return a gallery image, enlarged, on a textured background: as much detail for the JPEG decoder as in a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 5, (SIZE[1], SIZE[0], 1))
    ground = Image.fromarray(np.clip(np.asarray(coarse, np.float32) + grain, 0, 255).astype(np.uint8))
    front = Image.open(io.BytesIO(picture)).convert("RGBA").resize((320, 320), Image.Resampling.BICUBIC)
    ground.paste(front, (int(rng.integers(0, 180)), int(rng.integers(0, 80))), front)
    return ground


def measure(
    load: Callable[..., Encoder], name: str, texts: list[str], pixels: Pixels
) -> tuple[dict[str, float], tuple[Floats, Floats]]:
    """Return speeds and memory of a runtime, and its vectors of texts and of pixels."""
    encoder = load(runtime="torch" if name == REFERENCE else name)
    own = encoder.encode_text, encoder.encode_pixels
    encode_text, encode_images = plain(encoder.model) if name == REFERENCE else own
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    single = [seconds(partial(encode_text, [text])) for text in texts[:: max(1, len(texts) // 8)]]
    figures = {
        "texts": len(texts) / seconds(lambda: [encode_text(batch) for batch in batches]),
        "ms": 1000 * statistics.median(single),
        "images": len(pixels) / seconds(partial(encode_images, pixels)),
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
    }
    return figures, (np.concatenate([encode_text(batch) for batch in batches]), encode_images(pixels))


def plain(model: DCAR) -> tuple[Callable[[list[str]], Floats], Callable[[Pixels], Floats]]:
    backbone = model.backbone

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Floats:
        tokens = backbone.tokenize(texts, model.prompt_tokens)
        missing = backbone.context_length - model.prompt_tokens - tokens.shape[1]
        padded = torch.nn.functional.pad(tokens, (0, missing), value=backbone.layout.pad_id)
        return model.encode_query(padded).cpu().numpy()

    @torch.inference_mode()
    def encode_images(pixels: Pixels) -> Floats:
        return model.encode_image(backbone.normalized(pixels)).cpu().numpy()

    return encode_text, encode_images


def seconds(run: Callable[[], Any]) -> float:
    run()  # the first call prepares a shape
    return statistics.median(timeit.repeat(run, number=1, repeat=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder of model, images, exports")
    parser.add_argument("--pictures", type=int, default=256, help="maximum of captions")
    parser.add_argument("--checkpoint", help="checkpoint, model directory or open_clip model to measure instead")
    parser.add_argument("--data", type=Path, help="annotations with a test split to measure with instead")
    parser.add_argument("--runtimes", help="comma-separated; default: torch and what `auto` tries")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    checkpoint = args.checkpoint or str(vit_checkpoint(args.work))
    load = partial(Encoder.load, checkpoint, device=args.device, cache=args.work / "runtimes")
    encoder, data = load(), Annotations(args.data or catalogue(args.work, args.pictures)).load("test", "present")[0]
    texts = [sample.caption for sample in data.samples[: args.pictures]]
    pixels = np.stack([encoder.preprocess(data.read(name)) for name in data.images[:BATCH]])
    reference, expected = in_own_process(measure, load, REFERENCE, texts, pixels)
    print("| runtime | texts/s | one text | images/s | memory | cosine text, image |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| {REFERENCE} | {reference['texts']:.0f} | {reference['ms']:.1f} ms | {reference['images']:.0f} | | |")
    names = args.runtimes.split(",") if args.runtimes else auto_runtimes(encoder.model.backbone.device.type)
    for name in dict.fromkeys(["torch", *names]):
        try:
            found, vectors = in_own_process(measure, load, name, texts, pixels)
        except Exception as error:  # a library's error of any kind, or the end of its process
            print(f"| {name} | {str(error).partition(chr(10))[0]} | | | | |")
            continue
        text, image = ((one * other).sum(1).min() for one, other in zip(vectors, expected, strict=True))
        print(
            f"| {name} | {found['texts']:.0f} ({found['texts'] / reference['texts']:.1f}x) | {found['ms']:.1f} ms "
            f"| {found['images']:.0f} ({found['images'] / reference['images']:.1f}x) | {found['MB']:,.0f} MB "
            f"| {text:.4f}, {image:.4f} |",
            flush=True,
        )
    print(f"\n{len(texts)} captions, {len(pixels)} images, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
