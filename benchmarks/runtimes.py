"""Measure every encoder runtime on a ViT-B/32 with random weights, as ratios to plain PyTorch in the same run.

    python benchmarks/runtimes.py [--runtimes torch,openvino-bf16,openvino-int8]

- The reference is PyTorch in float32, eager, texts padded to 77 tokens, 32 at a time.
- Captions are those of the bundled emoji, the first of each. Images are 500 x 400 JPEGs of about 40 KB, drawn from the
  bundled gallery, each on a background of its own.
- decoding / encoder: the time of decoding on all cores, as a share of the encoder's for the same number of images.
- Random weights show speed and accuracy of the vectors, but nothing about ranking; for recall run `dcar benchmark` on a
  trained checkpoint.
"""

import argparse
import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from service import ROOT, vit_checkpoint
from tqdm import tqdm

from dcar_core.serving.runtime_benchmark import RuntimeReport, benchmark

EXAMPLE = ROOT / "examples" / "emoji" / "twemoji"
SIZE = (500, 400)


def catalogue(work: Path, count: int) -> Path:
    """Write `count` captioned JPEGs for calibration and as many to measure with; made once."""
    out = work / f"photos-{count}"
    if (out / "pairs.jsonl").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tarfile.open(EXAMPLE / "gallery.tar") as tar:
        for split in ("train", "test"):
            pairs = list(json.loads((EXAMPLE / f"{split}.json").read_text()).values())
            chosen = np.random.default_rng(0).permutation(len(pairs))[:count]
            for pair in tqdm([pairs[i] for i in chosen], f"drawing {split} pictures", unit="img"):
                member = tar.extractfile(pair["file_name"])
                assert member is not None
                name = f"{split}-{Path(pair['file_name']).stem}.jpg"
                photo(member.read(), seed=len(rows)).save(out / name, "JPEG", quality=88)
                texts = pair["positive"]
                caption = texts if isinstance(texts, str) else texts[0]
                rows.append({"image": name, "caption": caption, "category": pair["class_name"], "split": split})
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


def ratios(report: RuntimeReport) -> str:
    """Return Markdown: each runtime against the reference of the same run."""
    reference = report.rows[0].speeds
    lines = [
        "| runtime | texts/s | one text | images/s | memory | cosine text, image | decoding / encoder |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report.rows:
        if not (found := row.speeds):
            lines.append(f"| {row.name} | {row.reason} | | | | | |")
            continue
        texts, images, memory = found["texts_per_s"], found["images_per_s"], row.cost.get("memory")
        lines.append(
            f"| {row.name} | {texts:.0f} ({texts / reference['texts_per_s']:.1f} x) "
            f"| {found['text_ms']:.1f} ms ({reference['text_ms'] / found['text_ms']:.1f} x) "
            f"| {images:.0f} ({images / reference['images_per_s']:.1f} x) | {f'{memory:,.0f} MB' if memory else ''} "
            f"| {row.accuracy['cosine_text']:.4f}, {row.accuracy['cosine_image']:.4f} "
            f"| {report.decoding['fast_ms'] * images / 1000 / report.threads:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder of model and images")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--checkpoint", type=Path, help="measure this model instead")
    parser.add_argument("--runtimes", default="", help="comma-separated; default: what `auto` tries, and int8")
    parser.add_argument("--out", type=Path, help="JSON file for all measurements")
    given = parser.parse_args()
    checkpoint = given.checkpoint or vit_checkpoint(given.work)
    report = benchmark(
        str(checkpoint), catalogue(given.work, given.pictures), cache=given.work / "runtimes",
        runtimes=[name for name in given.runtimes.split(",") if name], say=lambda line: print(line, flush=True),
    )  # fmt: skip
    print(report, ratios(report), sep="\n\n")
    if given.out is not None:
        given.out.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
