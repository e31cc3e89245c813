"""Measure the encoding of a gallery: its rate against the bare encoder, and its memory.

    python benchmarks/encode.py
        ViT-B-32, a minute or two
    python benchmarks/encode.py --pictures 2048 --rounds 4       for a figure to quote
    python benchmarks/encode.py --runtime openvino-bf16
        the default of index jobs where it is fastest
    python benchmarks/encode.py --device cuda --runtime cuda
    python benchmarks/encode.py --memory 100000
        peak memory over 100,000 images, minutes

- The bare encoder is the forward pass of the same runtime over one batch of pixels in
  memory. It takes turns with the job in rounds, so other load affects both. The ratio
  is the figure to quote; rates depend on the machine.
- The job is all of `dcar index build` up to the vectors: scan, read, decode, resize,
  encode, and write checksummed shards.
- ViT-B-32 has random weights, which cost as much as trained ones. Images are JPEGs of
  500 x 375 pixels, drawn here.
- The rate at which the device multiplies bfloat16 matrices, and the operations of an
  image, tell what a perfect job would reach.
- Memory is the peak of the job and of its largest worker, over hard links to 256 images
  with a small encoder. The size of the gallery's table is printed separately, since
  only the table may grow with the gallery.
"""

import argparse
import io
import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dcar_core import Encoder
from index_jobs.encoding.decode import worker_count
from index_jobs.encoding.encode import encode_gallery, load_replicas
from index_jobs.gallery.scan import scan
from index_jobs.spec import BuildOptions

DRAWN = 256
BASE = Path(__file__).resolve().parents[1] / "examples" / "emoji" / "base"


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG with large shapes, texture and grain, as photos have."""
    draw = np.random.default_rng(seed)
    width, height = size

    def cells(side: int) -> np.ndarray:
        small = draw.integers(
            0,
            256,
            (height // side, width // side, 3),
            dtype=np.uint8,
        )
        return np.asarray(
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.float32
        )

    values = cells(40) + 0.25 * cells(3) - 32 + draw.normal(0, 4, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(
        buffer,
        "JPEG",
        quality=85,
    )
    return buffer.getvalue()


def gallery(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write `count` images, a thousand per folder."""
    drawn = []
    for number in range(min(DRAWN, count)):
        drawn.append(folder / f"{number // 1000:04}" / f"{number:07}.jpg")
        drawn[-1].parent.mkdir(parents=True, exist_ok=True)
        drawn[-1].write_bytes(picture(number, size))
    for number in range(len(drawn), count):
        path = folder / f"{number // 1000:04}" / f"{number:07}.jpg"
        path.parent.mkdir(exist_ok=True)
        os.link(drawn[number % len(drawn)], path)
    return folder


def random_model(folder: Path, name: str) -> Path:
    """Write an open_clip model with random weights as a model directory."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    model = open_clip.create_model(name, pretrained=None)
    preprocess = {k: v for k, v in model.visual.preprocess_cfg.items() if k != "mode"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        str(folder / "open_clip_model.safetensors"),
    )
    return folder


def bare(encoder: Encoder, batch: int, batches: int) -> float:
    """Return seconds per image of the forward pass alone, over pixels in memory."""
    side = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), np.uint8)
    began = time.perf_counter()
    for _ in range(batches):
        encoder.encode_pixels(pixels)
    return (time.perf_counter() - began) / (batch * batches)


def throughput(arguments: argparse.Namespace, folder: Path) -> None:
    model = random_model(folder / "model", arguments.model)
    os.environ["DCAR_RUNTIME_CACHE"] = str(folder / "runtimes")
    encoder = load_replicas(model, arguments.device, runtime=arguments.runtime)[0]
    source = gallery(folder / "pictures", arguments.pictures, tuple(arguments.size))
    batches = -(-arguments.pictures // arguments.batch_size)
    bare(encoder, arguments.batch_size, 1)
    ratios = []
    rates = []
    shared = {
        name: getattr(arguments, name) for name in ("workers", "batch_size", "device")
    }
    options = BuildOptions(**shared, progress=False)
    for number in range(arguments.rounds):
        before = bare(encoder, arguments.batch_size, -(-batches // 2))
        began = time.perf_counter()
        encoded = encode_gallery(
            scan(source),
            [encoder],
            folder / f"work{number}",
            options,
        )
        job = (time.perf_counter() - began) / len(encoded)
        alone = (before + bare(encoder, arguments.batch_size, -(-batches // 2))) / 2
        ratios.append(alone / job)
        rates.append(1 / job)
        print(
            f"round {number + 1}: bare {1 / alone:6.1f}/s, job {1 / job:6.1f}/s, ratio"
            f" {ratios[-1]:.3f}",
            flush=True,
        )
    sizes = np.mean(
        [path.stat().st_size for path in itertools.islice(source.rglob("*.jpg"), DRAWN)]
    )
    workers = worker_count(arguments.workers, arguments.pictures) or "threads"
    cores = f"{torch.get_num_threads()} cores, workers: {workers}"
    print(
        f"{arguments.model} by {arguments.runtime}, {cores}, JPEGs of"
        f" {sizes / 1000:.0f} KB"
    )
    print(
        f"the job reaches {np.mean(ratios):.1%} of the bare encoder's images per second"
    )
    operations = image_operations(encoder)
    most = matrix_rate(arguments.device)
    print(
        f"{arguments.device} multiplies bfloat16 matrices with {most / 1e12:.2f}"
        f" TFLOP/s; an image takes {operations / 1e9:.1f} GFLOP, so the job uses"
        f" {np.mean(rates) * operations / most:.1%} of it"
    )


def image_operations(encoder: Encoder) -> int:
    """Return the floating-point operations of one image."""
    model = encoder.model
    size = model.backbone.preprocess.size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.encode_image(torch.zeros(1, 3, size, size, device=model.backbone.device))
    return int(counter.get_total_flops())


def matrix_rate(device: str) -> float:
    """Return the operations per second of products of bfloat16 matrices."""
    side = 512 if device == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        float(matrix[0, 0])  # waits for a GPU
        best = max(best, 20 * side**3 / (time.perf_counter() - start))
    return best


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    source = gallery(folder / "pictures", arguments.memory, (160, 120))
    count = arguments.memory
    scanned = scan(source)
    size = scanned.table.nbytes
    print(
        f"scanned {count:,} pictures; the table takes {size / 2**20:.0f} MiB,"
        f" {size / count:.0f} bytes a picture"
    )
    options = BuildOptions(
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        progress=False,
    )
    encoded = encode_gallery(scanned, [Encoder.load(BASE)], folder / "work", options)
    own, worker = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    rate = len(encoded) / encoded.seconds
    print(
        f"encoded {len(encoded):,} pictures, {rate:.0f}/s; peak {own:.0f} MiB,"
        f" {worker:.0f} MiB in a worker"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers",
        type=int,
        help="decoding processes, 0 for threads; as the job does by default",
    )
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(500, 375),
        metavar=("WIDTH", "HEIGHT"),
    )
    parser.add_argument(
        "--memory",
        type=int,
        metavar="PICTURES",
        help="measure memory instead",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        help="where pictures and shards are put for the while (default: temporary)",
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        (memory if arguments.memory else throughput)(arguments, Path(folder))


if __name__ == "__main__":
    main()
