"""Measure the service under load over loopback.

    python benchmarks/serve.py cached       cached embeddings on one core, in the process and from Redis
    python benchmarks/serve.py feedback     processor time of a cached search with DCAR_FEEDBACK and without
    python benchmarks/serve.py uncached     unique texts and images at 1, 8, 32, 128 connections, in turns with the
                                            bare encoder in batches of the size that the service formed
    python benchmarks/serve.py overload     four times as many requests as the service can answer
    python benchmarks/serve.py mixed        600 requests a second for a minute: texts, known texts, filters and images
    python benchmarks/serve.py changes      PATCH of items: seconds from the request to the first search that shows it

- In `cached` and `overload` the server has core 0 to itself, and another core sends the load. In `uncached`
  and `mixed` it has every core, as in production. Each figure is the median of `--rounds`.
- `uncached` and `changes` run on a random ViT-B/32 with 100,000 vectors, or --count; --index takes any other index.
"""

import argparse
import asyncio
import io
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from load import Requests, Tally, ask, closed_loop, image_request, open_loop, same_answer, text_request, unique_texts
from PIL import Image
from service import Server, emoji, random_vit, serving

from tests.support.redis_server import RedisServer

T = TypeVar("T")
LOAD_CORES = set(range(1, os.cpu_count() or 1)) or {0}
MIXED_MB = 800  # of memory that a server may take in `mixed`


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
        small.resize((500, 500), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
        made.append(buffer.getvalue())
    return made


def new_images() -> Requests:
    """Return image searches that miss every cache: each file has unique bytes after the end of the image."""
    known, number = images(16), itertools.count()
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
                    known += len(run(closed_loop(server.port, lambda: next(asked), connections=4, seconds=1)).latencies)
                for connections in (1, 4, 8):
                    began = server.cpu_s()
                    tallies = [
                        run(closed_loop(server.port, lambda: next(asked), connections=connections, seconds=seconds))
                        for _ in range(rounds)
                    ]
                    cpu = (server.cpu_s() - began) / sum(len(tally.latencies) for tally in tallies)
                    print(f"{name:30} c={connections}  {median(tallies)}   {cpu * 1e6:.0f} us of CPU each", flush=True)


def feedback(index: Path, seconds: float, rounds: int) -> None:
    """Compare a server with itself while it logs feedback and while it does not; see `feedback_toggle`."""
    texts = [text_request(text) for text in itertools.islice(unique_texts(1), 500)]
    asked = itertools.cycle(texts)
    without, more = list[float](), list[float]()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as log:
            costs = Path(log, "costs.json")
            toggled = {"module": "benchmarks.feedback_toggle", "environment": {"FEEDBACK_COSTS": str(costs)}}
            with serving(index, cores={0}, threads=1, feedback=log, **toggled) as server:
                run(closed_loop(server.port, lambda: next(asked), connections=4, seconds=2))  # warms it up
                warm = len(json.loads(costs.read_text(encoding="utf-8")))
                run(closed_loop(server.port, lambda: next(asked), connections=4, seconds=seconds))
                pairs = json.loads(costs.read_text(encoding="utf-8"))[warm + 1 :]
            without.append(statistics.median(off for off, _ in pairs))
            differences = sorted(on - off for off, on in pairs)
            more.append(statistics.mean(differences[len(pairs) // 10 : -(len(pairs) // 10) or None]))
    cost, base = statistics.mean(more), statistics.mean(without)
    error = statistics.stdev(more) / len(more) ** 0.5
    print(f"{base:.0f} us of CPU for a search, {cost:+.1f} (+/- {error:.1f}) with feedback ({cost / base:+.1%})")


class Bare:
    """The encoder alone, in the same runtime, on as many cores."""

    def __init__(self, index: Path, runtime: str, cache: str | None) -> None:
        from dcar_core import Encoder
        from index_jobs.index.versions import open_current

        version = open_current(index)
        self.encoder = Encoder.load(
            version.checkpoint, device="cpu", runtime=runtime, cache=Path(cache) if cache else None
        )
        self._texts = unique_texts(9)
        self._pixels = np.stack([self.encoder.preprocess(each) for each in images(32)])

    def rate(self, kind: str, size: float) -> float:
        """Return items per second in batches of `size`, interpolated between whole sizes."""
        low, share = int(size), size - int(size)
        took = self._seconds(kind, low) * (1 - share) + (self._seconds(kind, low + 1) * share if share else 0.0)
        return size / took

    def _seconds(self, kind: str, size: int) -> float:
        """Return the seconds of one batch, as a mean over a second, since the service's rate is a mean too."""
        took: list[float] = []
        end = time.perf_counter() + 1
        while len(took) < 5 or time.perf_counter() < end:
            texts = list(itertools.islice(self._texts, size))
            began = time.perf_counter()
            if kind == "text":
                self.encoder.encode_text(texts)
            else:
                self.encoder.encode_pixels(self._pixels[np.arange(size) % len(self._pixels)])
            took.append(time.perf_counter() - began)
        return statistics.mean(took[1:])


def uncached(index: Path, seconds: float, rounds: int, settings: dict[str, Any]) -> None:
    with serving(index, cache_size=0, **settings) as server:
        print(f"ready after {server.ready_s:.1f} s, {server.memory_mb():.0f} MB", flush=True)
        bare = Bare(index, settings.get("runtime", "auto"), settings.get("runtime_cache"))
        for kind, make in (("text", lambda: new_texts(time.time_ns())), ("image", new_images)):
            run(closed_loop(server.port, make(), connections=8, seconds=min(2.0, seconds)))
            for connections in (1, 8, 32, 128):
                tallies, sizes, shares = [], [], []
                for _ in range(rounds):
                    before = server.batches()
                    tallies.append(run(closed_loop(server.port, make(), connections=connections, seconds=seconds)))
                    queries, passes = (now - then for now, then in zip(server.batches(), before, strict=True))
                    sizes.append(queries / passes)
                    shares.append(tallies[-1].rate / bare.rate(kind, sizes[-1]))
                print(f"{kind:5} c={connections:3}  {median(tallies)}   batches of {statistics.median(sizes):4.1f}, "
                      f"{statistics.median(shares):.0%} of the bare encoder's rate in such", flush=True)  # fmt: skip
        print(f"afterwards {server.memory_mb():.0f} MB", flush=True)


def overload(index: Path, seconds: float, rounds: int) -> None:
    """Measure peak and overload in turns, so other load affects both; then ask again what was answered."""
    answers = dict[bytes, bytes]()
    with serving(index, cores={0}, threads=1, cache_size=0) as server:
        run(closed_loop(server.port, new_texts(1), connections=8, seconds=2))
        peaks, loads = [], []
        for i in range(rounds):
            peaks.append(run(closed_loop(server.port, new_texts(10 + i), connections=32, seconds=seconds)))
            rate = 4 * peaks[-1].rate
            loads.append(
                run(open_loop(server.port, new_texts(100 + i), rate=rate, seconds=seconds, check=answers.__setitem__))
            )
        print(f"peak, 32 connections      {median(peaks)}")
        print(f"4 x that, open loop       {median(loads)}")
        shares = sorted(load.rate / peak.rate for peak, load in zip(peaks, loads, strict=True))
        spread = f"{shares[0]:.0%} to {shares[-1]:.0%}"
        print(f"goodput under overload: {statistics.median(shares):.0%} of the peak, {spread}", flush=True)
        _compare(server, answers)


def _compare(server: Server, answers: dict[bytes, bytes]) -> int:
    alone = {request: run(ask(server.port, request)) for request in list(answers)[:: 1 + len(answers) // 1000]}
    wrong = sum(not same_answer(answers[request], body) for request, body in alone.items())
    print(f"{len(alone)} answers compared with those without load: {wrong} wrong", flush=True)
    return wrong


def mixed(index: Path, seconds: float, rate: float, settings: dict[str, Any]) -> None:
    """Send of ten requests six new texts, a known one, two filters and an image, at a rate beyond what is possible.

    Exits with 1 if an answer is wrong, lost or 500, or if memory exceeds its goal; other missed goals are printed only,
    since machines differ.
    """
    known = itertools.cycle([text_request(text) for text in itertools.islice(unique_texts(1), 100)])
    texts, filtered, pictures, number = new_texts(2), unique_texts(3), new_images(), itertools.count()

    def filters() -> bytes:
        return text_request(
            next(filtered), filter={"category": {"not": [f"c{next(number) % 50}"]}}, facets=["category"]
        )

    kinds = itertools.cycle([texts, texts, texts, filters, lambda: next(known), texts, texts, filters, texts, pictures])
    answers, memory = dict[bytes, bytes](), list[float]()

    async def load(server: Server) -> Tally:
        async def watch() -> None:
            while True:
                memory.append(server.memory_mb())
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        tally = await open_loop(
            server.port, lambda: next(kinds)(), rate=rate, seconds=seconds, check=answers.__setitem__
        )
        watching.cancel()
        return tally

    with serving(index, **settings) as server:
        run(closed_loop(server.port, lambda: next(kinds)(), connections=8, seconds=2))
        peak = run(closed_loop(server.port, lambda: next(kinds)(), connections=32, seconds=min(10.0, seconds)))
        print(f"32 connections     {peak}", flush=True)
        with suppress(PermissionError):  # callers do not wait for the service's processors
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        tally = run(load(server))
        print(f"{rate:3.0f} a second, open loop   {tally}")
        shares = " and ".join(f"{np.percentile(tally.refused or [0], share) * 1000:.0f}" for share in (50, 99))
        refused = tally.statuses[503] / sum(tally.statuses.values())
        print(
            f"{refused:.0%} refused, p50 and p99 {shares} ms; memory {memory[0]:.0f} MB, at most {max(memory):.0f} MB"
        )
        faults = {
            "wrong": _compare(server, answers),
            "lost": tally.broken,
            "failed": tally.statuses[500],
            "MB": max(memory) > MIXED_MB and round(max(memory)),
        }
    goals = {"200s": (tally.percentile(99), 1000), "503s": (np.percentile(tally.refused or [0], 99) * 1000, 100)}
    for name, (p99, most) in goals.items():
        if p99 > most:
            print(f"missed: the p99 of {name} is {p99:.0f} ms, the goal {most}")
    if any(faults.values()):
        raise SystemExit("got through: " + ", ".join(f"{count} {name}" for name, count in faults.items() if count))


def changes(index: Path, rounds: int) -> None:
    """Change a copy of an index, whose files are hard links."""
    key = "an admin key"
    with tempfile.TemporaryDirectory(dir=index.parent) as folder:
        copy = Path(shutil.copytree(index, Path(folder) / "index", copy_function=os.link))
        with serving(copy, writes="true", admin_key=key) as server:
            url, headers = f"http://127.0.0.1:{server.port}", {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                count = client.get("/readyz").json()["count"]
                for name, field, chosen in (
                    ("a number of one item", "price", {"ids": ["7"]}),
                    ("a text of one item, with its words", "brand", {"ids": ["7"]}),
                    ("a number of 1,000 items", "price", {"ids": [f"{number}" for number in range(1000)]}),
                    ("a number of all items", "price", {"filter": {"category": {"not": None}}}),
                ):
                    took = [_seconds_to_change(client, field, chosen, count) for _ in range(rounds)]
                    print(f"{name:36} median {statistics.median(took):.2f} s, worst {max(took):.2f} s", flush=True)


def _seconds_to_change(client: httpx.Client, field: str, chosen: dict[str, Any], count: int) -> float:
    """Return the seconds from a request to the first search that finds every changed item by the new value."""
    value: Any = time.time_ns() % 10**9
    value = f"brand {value}" if field == "brand" else value
    expected, began = len(chosen["ids"]) if "ids" in chosen else count, time.perf_counter()
    client.patch("/items", json={**chosen, "metadata": {field: value}}).raise_for_status()
    while True:
        found = client.get("/items", params={"filter": json.dumps({field: value}), "k": 1})
        if found.status_code == 200 and found.json()["count"] == expected:  # before, no item has the field
            return time.perf_counter() - began
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cached", "feedback", "uncached", "overload", "mixed", "changes"])
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder of the indexes")
    parser.add_argument("--index", type=Path, help="serve this index instead")
    parser.add_argument("--count", type=int, default=100_000, help="vectors in the index of `uncached` and `changes`")
    parser.add_argument("--seconds", type=float, help="default: 60 of `mixed`, otherwise 5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=600.0, help="requests a second in `mixed`")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the server in `uncached` and `mixed`"
    )
    given = parser.parse_args()
    given.seconds = given.seconds or (60.0 if given.what == "mixed" else 5.0)
    settings = dict(each.split("=", 1) for each in given.set)
    is_large = given.what in ("uncached", "changes")
    index = given.index or (random_vit(given.work, given.count) if is_large else emoji(given.work))
    os.sched_setaffinity(0, LOAD_CORES)
    if given.what == "cached":
        cached(index, given.seconds, given.rounds)
    elif given.what == "feedback":
        feedback(index, given.seconds, given.rounds)
    elif given.what in ("uncached", "mixed"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        if given.what == "mixed":
            mixed(index, given.seconds, given.rate, settings)
        else:
            uncached(index, given.seconds, given.rounds, settings)
    elif given.what == "changes":
        changes(index, given.rounds)
    else:
        overload(index, given.seconds, given.rounds)


if __name__ == "__main__":
    main()
