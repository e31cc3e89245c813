"""Measure the service under load over loopback.

    python benchmarks/serve.py cached       cached embeddings on one core, in the
                                            process and from Redis
    python benchmarks/serve.py uncached     unique texts and images at 1, 8, 32, 128
                                            connections, in turns with the bare encoder
                                            in batches of the size that the service
                                            formed; the processor time of the server's
                                            own process, and the load's share of the
                                            cores
    python benchmarks/serve.py changes      PATCH of items: seconds from the request to
                                            the first search that shows it

- In `cached` the server has core 0 to itself, and another core sends the load. In
  `uncached` it has every core, as in production. Each figure is the median of
  `--rounds`.
- `uncached` and `changes` run on a random ViT-B/32 with 100,000 vectors, or --count;
  --index takes any other index.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from load import Requests, Tally, closed_loop, image_request, text_request, unique_texts
from numpy.typing import NDArray
from PIL import Image
from service import emoji, random_vit, serving

from tests.support.servers import RedisServer

T = TypeVar("T")
Vector = NDArray[np.float64]
LOAD_CORES = set(range(1, os.cpu_count() or 1)) or {0}


def run(loop: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, so the load generator is not the bottleneck."""
    import uvloop

    result: T = uvloop.run(loop)
    return result


def median(tallies: list[Tally]) -> Tally:
    """Return the median round, by rate."""
    return sorted(tallies, key=lambda tally: tally.rate)[len(tallies) // 2]


def images(count: int) -> list[bytes]:
    """Return different JPEGs of about 40 KB."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 255, (62, 62, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((500, 500), Image.Resampling.BICUBIC).save(
            buffer,
            "JPEG",
            quality=88,
        )
        made.append(buffer.getvalue())
    return made


def new_images() -> Requests:
    """Return image searches that miss every cache: each file has unique bytes after the
    end of the image.
    """
    known = images(16)
    number = itertools.count()
    return lambda: image_request(known[(n := next(number)) % 16] + n.to_bytes(8, "big"))


def new_texts(seed: int) -> Requests:
    texts = unique_texts(seed)
    return lambda: text_request(next(texts))


def cached(index: Path, seconds: float, rounds: int) -> None:
    texts = list(itertools.islice(unique_texts(1), 500))
    asked = itertools.cycle([text_request(text) for text in texts])
    with RedisServer() as redis:
        for name, settings in (
            ("embeddings in the process", {"redis_url": redis.url}),
            ("from Redis alone", {"redis_url": redis.url, "cache_size": 0}),
        ):
            with serving(index, cores={0}, threads=1, **settings) as server:
                known = 0
                while known < len(texts):  # a hit however slow the machine is
                    known += len(
                        run(
                            closed_loop(
                                server.port,
                                lambda: next(asked),
                                connections=4,
                                seconds=1,
                            )
                        ).latencies
                    )
                for connections in (1, 4, 8):
                    began = server.cpu_s()
                    load = partial(
                        closed_loop,
                        server.port,
                        lambda: next(asked),
                        connections=connections,
                    )
                    tallies = [run(load(seconds=seconds)) for _ in range(rounds)]
                    cpu = (server.cpu_s() - began) / sum(
                        len(tally.latencies) for tally in tallies
                    )
                    print(
                        f"{name:30} c={connections}  {median(tallies)}  "
                        f" {cpu * 1e6:.0f} us of CPU each",
                        flush=True,
                    )


class Bare:
    """The encoder alone, in the same runtime, on as many cores."""

    def __init__(self, index: Path, runtime: str, cache: str | None) -> None:
        from dcar_core import Encoder
        from index_jobs.index.versions import open_current

        version = open_current(index)
        folder = Path(cache) if cache else None
        self.encoder = Encoder.load(
            version.checkpoint,
            device="cpu",
            runtime=runtime,
            cache=folder,
        )
        self._texts = unique_texts(9)
        self._pixels = np.stack([self.encoder.preprocess(each) for each in images(32)])

    def measure(self, kind: str, size: float) -> tuple[float, float]:
        """Return items per second, and processor seconds of each, in batches of `size`,
        or between two sizes.
        """
        low = int(size)
        share = size - int(size)
        wall, cpu = self._seconds(kind, low) * (1 - share) + (
            self._seconds(kind, low + 1) * share if share else 0.0
        )
        return size / wall, cpu / size

    def _seconds(self, kind: str, size: int) -> Vector:
        """Return the seconds and processor seconds of one batch, as means over a
        second, as the service's are.
        """
        took: list[tuple[float, float]] = []
        end = time.perf_counter() + 1
        while len(took) < 5 or time.perf_counter() < end:
            texts = list(itertools.islice(self._texts, size))
            began = time.perf_counter()
            used = time.process_time()
            if kind == "text":
                self.encoder.encode_text(texts)
            else:
                self.encoder.encode_pixels(
                    self._pixels[np.arange(size) % len(self._pixels)]
                )
            took.append((time.perf_counter() - began, time.process_time() - used))
        return np.mean(took[1:], axis=0)


def matrix_rate() -> float:
    """Return the operations per second of products of float32 matrices in OpenVINO: the
    processor's limit.
    """
    import openvino
    from openvino import opset13

    side = 2048
    matrix = np.random.default_rng(0).standard_normal((side, side), np.float32)
    given = opset13.parameter([side, side], np.float32)
    model = openvino.Model(
        [opset13.matmul(given, opset13.constant(matrix), False, True)], [given]
    )
    multiply = openvino.Core().compile_model(
        model,
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    took = []
    for _ in range(12):
        began = time.perf_counter()
        multiply([matrix])
        took.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(took)


def uncached(
    index: Path,
    seconds: float,
    rounds: int,
    settings: dict[str, Any],
) -> None:
    print(
        f"float32 matrices are multiplied with {matrix_rate() / 1e9:.0f} GFLOP/s",
        flush=True,
    )
    with serving(index, cache_size=0, **settings) as server:
        print(
            f"ready after {server.ready_s:.1f} s, {server.memory_mb():.0f} MB",
            flush=True,
        )
        bare = Bare(
            index,
            settings.get("runtime", "auto"),
            settings.get("runtime_cache"),
        )
        for kind, make in (
            ("text", lambda: new_texts(time.time_ns())),
            ("image", new_images),
        ):
            run(
                closed_loop(
                    server.port,
                    make(),
                    connections=8,
                    seconds=min(2.0, seconds),
                )
            )
            for connections in (1, 8, 32, 128):
                tallies = []
                figures = []
                for _ in range(rounds):
                    before = server.batches()
                    used = server.cpu_s()
                    own = time.process_time()
                    tally = run(
                        closed_loop(
                            server.port,
                            make(),
                            connections=connections,
                            seconds=seconds,
                        )
                    )
                    load = (
                        (time.process_time() - own)
                        / tally.seconds
                        / (os.cpu_count() or 1)
                    )
                    cpu = (server.cpu_s() - used) / len(tally.good)
                    queries, passes = (
                        now - then
                        for now, then in zip(server.batches(), before, strict=True)
                    )
                    rate, encoding = bare.measure(kind, queries / passes)
                    tallies.append(tally)
                    figures.append(
                        (
                            queries / passes,
                            tally.rate / rate,
                            rate,
                            cpu * 1000,
                            encoding * 1000,
                            load,
                        )
                    )
                size, share, rate, cpu, encoding, load = np.median(figures, axis=0)
                print(
                    f"{kind:5} c={connections:3}  {median(tallies)}   batches of"
                    f" {size:4.1f}, {share:.0%} of the bare encoder's {rate:.0f}/s; ms"
                    f" of processor: {cpu:.1f}, bare {encoding:.1f}; load {load:.0%}",
                    flush=True,
                )
        print(f"afterwards {server.memory_mb():.0f} MB", flush=True)


def changes(index: Path, rounds: int) -> None:
    """Change a copy of an index, whose files are hard links."""
    key = "a key of the admin"
    with tempfile.TemporaryDirectory(dir=index.parent) as folder:
        copy = Path(
            shutil.copytree(index, Path(folder) / "index", copy_function=os.link)
        )
        with serving(copy, writes="true", admin_key=key) as server:
            url = f"http://127.0.0.1:{server.port}"
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                count = client.get("/readyz").json()["count"]
                for name, field, chosen in (
                    ("a number of one item", "price", {"ids": ["7"]}),
                    ("a text of one item, with its words", "brand", {"ids": ["7"]}),
                    (
                        "a number of 1,000 items",
                        "price",
                        {"ids": [f"{number}" for number in range(1000)]},
                    ),
                    (
                        "a number of all items",
                        "price",
                        {"filter": {"category": {"not": None}}},
                    ),
                ):
                    took = [
                        _seconds_to_change(client, field, chosen, count)
                        for _ in range(rounds)
                    ]
                    print(
                        f"{name:36} median {statistics.median(took):.2f} s, worst"
                        f" {max(took):.2f} s",
                        flush=True,
                    )


def _seconds_to_change(
    client: httpx.Client,
    field: str,
    chosen: dict[str, Any],
    count: int,
) -> float:
    """Return the seconds from a request to the first search that finds every changed
    item by the new value.
    """
    value: Any = time.time_ns() % 10**9
    value = f"brand {value}" if field == "brand" else value
    expected = len(chosen["ids"]) if "ids" in chosen else count
    began = time.perf_counter()
    client.patch(
        "/items", json={**chosen, "metadata": {field: value}}
    ).raise_for_status()
    while True:
        found = client.get(
            "/items", params={"filter": json.dumps({field: value}), "k": 1}
        )
        # before, no item has the field
        if found.status_code == 200 and found.json()["count"] == expected:
            return time.perf_counter() - began
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cached", "uncached", "changes"])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks"),
        help="folder of the indexes",
    )
    parser.add_argument("--index", type=Path, help="serve this index instead")
    parser.add_argument(
        "--count",
        type=int,
        default=100_000,
        help="vectors in the index of `uncached` and `changes`",
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings in `uncached`",
    )
    args = parser.parse_args()
    if args.what == "cached":
        os.sched_setaffinity(0, LOAD_CORES)
        cached(args.index or emoji(args.work), args.seconds, args.rounds)
        return
    index = args.index or random_vit(args.work, args.count)
    if args.what == "uncached":
        uncached(
            index,
            args.seconds,
            args.rounds,
            dict(pair.split("=", 1) for pair in args.set),
        )
    else:
        os.sched_setaffinity(0, LOAD_CORES)
        changes(index, args.rounds)


if __name__ == "__main__":
    main()
