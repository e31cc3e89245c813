"""Measure the encoding of a gallery: its rate against the bare encoder, and its memory.

    python benchmarks/encode.py                                  ViT-B-32, a minute or two
    python benchmarks/encode.py --pictures 2048 --rounds 4       for a figure to quote
    python benchmarks/encode.py --runtime openvino-bf16          the default of index jobs where it is fastest
    python benchmarks/encode.py --device cuda --runtime cuda
    python benchmarks/encode.py --memory 100000                  peak memory over 100,000 images, minutes

- The bare encoder is the forward pass of the same runtime over one batch of pixels in memory. It takes turns with the
  job in rounds, so other load affects both. The ratio is the figure to quote; rates depend on the machine.
- The job is all of `dcar index build` up to the vectors: scan, read, decode, resize, encode, and write checksummed
  shards.
- Processor time is compared as well: on a shared machine it varies less than wall time.
- ViT-B-32 has random weights, which cost as much as trained ones. Images are JPEGs of 500 x 375 pixels, drawn here.
- The rate at which the device multiplies bfloat16 matrices, and the operations of an image, tell what a perfect job
  would reach.
- Memory is that of the job and its worker processes together, sampled over time; a small encoder leaves the most to the
  rest. 256 images are drawn; the others are hard links to them. The size of the gallery's table is printed separately,
  since only the table may grow with the gallery.
"""

import argparse
import io
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dcar_core import Encoder
from index_jobs.encoding.decode import worker_count
from index_jobs.encoding.devices import load_replicas
from index_jobs.encoding.encode import encode_gallery
from index_jobs.gallery.scan import scan
from index_jobs.spec import BuildOptions

DRAWN = 256
SHARD_ROWS = 1024
BASE = Path(__file__).resolve().parents[1] / "examples" / "emoji" / "base"


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG with large shapes, texture and grain, as photos have."""
    draw = np.random.default_rng(seed)
    width, height = size

    def cells(side: int) -> np.ndarray:
        small = draw.integers(0, 256, (height // side, width // side, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.float32)

    values = cells(40) + 0.25 * cells(3) - 32 + draw.normal(0, 4, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
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
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "open_clip_model.safetensors"))
    return folder


class Clock:
    """Wall seconds, and processor seconds of this process and its finished children."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])

    def stop(self) -> np.ndarray:
        """Return (wall, processor) seconds since the start."""
        return np.array([time.perf_counter() - self.wall, sum(os.times()[:4]) - self.cpu])


def bare(encoder: Encoder, batch: int, batches: int) -> np.ndarray:
    """Return seconds per image of the forward pass alone, over pixels in memory."""
    side = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), np.uint8)
    clock = Clock()
    for _ in range(batches):
        encoder.encode_pixels(pixels)
    return clock.stop() / (batch * batches)


def throughput(arguments: argparse.Namespace, folder: Path) -> None:
    model = random_model(folder / "model", arguments.model)
    os.environ["DCAR_RUNTIME_CACHE"] = str(folder / "runtimes")
    encoder = load_replicas(model, arguments.device, runtime=arguments.runtime)[0]
    source = gallery(folder / "pictures", arguments.pictures, tuple(arguments.size))
    batches = -(-arguments.pictures // arguments.batch_size)
    bare(encoder, arguments.batch_size, 1)
    ratios, rates = [], []
    for number in range(arguments.rounds):
        before = bare(encoder, arguments.batch_size, -(-batches // 2))
        clock = Clock()
        encoded = encode_gallery(
            scan(source),
            [encoder],
            folder / f"work{number}",
            BuildOptions(
                workers=arguments.workers, batch_size=arguments.batch_size, device=arguments.device, progress=False
            ),
        )
        job = clock.stop() / len(encoded)
        alone = (before + bare(encoder, arguments.batch_size, -(-batches // 2))) / 2
        ratios.append(alone / job)
        rates.append(1 / job[0])
        print(
            f"round {number + 1}: bare {1 / alone[0]:6.1f}/s, {alone[1] * 1e3:6.1f} ms of processor   "
            f"job {1 / job[0]:6.1f}/s, {job[1] * 1e3:6.1f} ms   ratio {ratios[-1][0]:.3f}, {ratios[-1][1]:.3f}",
            flush=True,
        )
    sizes = np.mean([path.stat().st_size for path in itertools.islice(source.rglob("*.jpg"), DRAWN)])
    workers = worker_count(arguments.workers, arguments.pictures) or "threads"
    cores = f"{torch.get_num_threads()} cores, workers: {workers}"
    print(f"{arguments.model} by {arguments.runtime}, {cores}, JPEGs of {sizes / 1000:.0f} KB")
    wall, cpu = np.mean(ratios, 0)
    print(f"the job reaches {wall:.1%} of the bare encoder's images per second; by processor time, {cpu:.1%}")
    operations, most = image_operations(encoder), matrix_rate(arguments.device)
    print(f"{arguments.device} multiplies bfloat16 matrices with {most / 1e12:.2f} TFLOP/s; an image takes "
          f"{operations / 1e9:.1f} GFLOP, so the job uses {np.mean(rates) * operations / most:.1%} of it")  # fmt: skip


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
    matrix, best = torch.randn(side, side, device=device, dtype=torch.bfloat16), 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        float(matrix[0, 0])  # waits for a GPU
        best = max(best, 20 * side**3 / (time.perf_counter() - start))
    return best


def resident(pid: int) -> int:
    """Return the bytes that a process and its children have in memory, without pages that mirror a file."""
    total, pids = 0, [pid]
    for process in pids:
        try:
            status = Path(f"/proc/{process}/status").read_text()
            threads = list(Path(f"/proc/{process}/task").iterdir())
            pids += [int(child) for t in threads for child in (t / "children").read_text().split()]
        except OSError:
            continue
        total += 1024 * sum(
            int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))
        )
    return total


@contextmanager
def sampled(shards: Path, samples: list[tuple[int, int]]) -> Iterator[None]:
    """Sample the memory twice a second: (encoded images, bytes)."""
    ended = threading.Event()

    def sample() -> None:
        while True:
            done = sum(1 for _ in shards.glob("*/*.json")) * SHARD_ROWS
            samples.append((done, resident(os.getpid())))
            if ended.wait(0.5):
                break

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    source, work, count = gallery(folder / "pictures", arguments.memory, (160, 120)), folder / "work", arguments.memory
    encoder = Encoder.load(BASE)
    encoder.encode_pixels(np.zeros((arguments.batch_size, 3, 48, 48), np.uint8))
    before, start = resident(os.getpid()), time.perf_counter()
    samples: list[tuple[int, int]] = []
    with sampled(work, samples):
        scanned = scan(source)
        table = scanned.table.nbytes
        print(f"scanned {count:,} pictures in {time.perf_counter() - start:.1f} s; the table takes {_mib(table)}, "
              f"{table / count:.0f} bytes a picture; the process {_mib(resident(os.getpid()))}, {_mib(before)} before",
              flush=True)  # fmt: skip
        encoded = encode_gallery(
            scanned,
            [encoder],
            work,
            BuildOptions(
                workers=arguments.workers, batch_size=arguments.batch_size, shard_rows=SHARD_ROWS, progress=False
            ),
        )
    for tenth in range(10):
        low, high = tenth * count // 10, (tenth + 1) * count // 10
        if part := [size for done, size in samples if low <= done < high]:
            print(f"pictures {low:8,} to {high:8,}: peak {_mib(max(part))}")
    first = max((size for done, size in samples if done < count // 10), default=0)
    whole = max(size for _, size in samples)
    print(f"encoded {len(encoded):,} pictures, {len(encoded) / encoded.seconds:.0f}/s; peak {_mib(whole)} in all, "
          f"{_mib(first)} over the first tenth")  # fmt: skip


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="decoding processes, 0 for threads; as the job does by default")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--memory", type=int, metavar="PICTURES", help="measure memory instead")
    parser.add_argument("--dir", type=Path, help="where pictures and shards are put for the while (default: temporary)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        (memory if arguments.memory else throughput)(arguments, Path(folder))


if __name__ == "__main__":
    main()
