"""Run a long mixed load with faults: the service must stay correct and its memory level.

    python benchmarks/soak.py --minutes 10

- Callers request cached and new texts, good images, items and their images. Others send broken images, bombs, oversized
  bodies, invalid JSON and unknown ids, or disconnect before the response.
- Meanwhile the index alternates between two versions every `--swap` seconds, and Redis is killed, restarted, and
  suspended for a while.
- The server has the memory of docker-compose.yml, 2 GiB, where this may be limited (root on Linux).
- Afterwards a server without load or caches answers the same requests: all that came again and again, and some of the
  others. An answer is wrong if it differs by more than scores in bfloat16 do.
- Exits with 1 if an answer was wrong, a response had an unexpected status, a connection broke, a process ended for lack
  of memory, or memory grew after the first five minutes, or the first quarter of a shorter run.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from load import Requests, ask, closed_loop, image_request, post, same_answer, text_request, unique_texts
from serve import images, new_images, new_texts
from service import ROOT, MemoryGroup, Server, emoji

from index_jobs.index.publish import rollback
from index_jobs.index.versions import open_current, read_manifest, version_numbers
from tests.support.hostile_images import png_of_size
from tests.support.redis_server import RedisServer

PAUSE_S = 0.01  # pause of each caller between two requests, so every caller gets its turn
LEAST_MINUTES = 0.5
GROWTH = 1.10  # limit of the growth from the median of a quarter after the start to that of the last quarter
SETTLED_S = 300.0  # after which memory may not grow
MEMORY = 2 * 2**30
MOST_NEW = 1500  # answers to requests that come once, of each kind, that are kept to be compared


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def loads(item: str) -> dict[str, tuple[Requests, set[int]]]:
    """Return name -> request and its valid statuses. 503 is valid: overload or a deadline."""
    known = itertools.cycle([text_request(text) for text in itertools.islice(unique_texts(1), 300)])
    whole, number, others = images(4), itertools.count(), unique_texts(5)

    def filtered() -> bytes:
        condition = {"category": {"not": [f"c{next(number) % 50}"]}}
        return text_request(next(others), filter=condition, facets=["category"])

    kind = "multipart/form-data; boundary=b"
    wrong = itertools.cycle(
        [
            post("/search/text", "application/json", b'{"query": '),
            post("/search/text", "application/json", json.dumps({"query": "x", "k": -1}).encode()),
            post("/search/text", "text/plain", b"red"),
            post("/search/image", kind, b"no form at all"),
        ]
    )
    absent = itertools.cycle([get("/items/..%2f..%2fetc%2fpasswd"), get("/nothing"), get("/items/x/image")])
    found = itertools.cycle([get(f"/items/{item}"), get(f"/items/{item}/image"), get(f"/items/{item}/similar?k=5")])
    return {
        "cached texts": (lambda: next(known), {200}),
        "new texts": (new_texts(2), {200, 503}),
        "filters": (filtered, {200, 503}),
        "images": (new_images(), {200, 503}),
        "items": (lambda: next(found), {200, 503}),
        "broken images": (lambda: image_request(whole[0][: 2000 + next(number) % 9000]), {422, 503}),
        "bombs": (lambda: image_request(png_of_size(30_000 + next(number) % 1000, 30_000)), {422, 503}),
        "large bodies": (lambda: post("/search/text", "application/json", bytes(300_000)), {413}),
        "wrong requests": (lambda: next(wrong), {400, 415, 422, 503}),
        "absent things": (lambda: next(absent), {404}),
        "health": (lambda: get("/readyz"), {200}),
    }


async def disconnect_early(port: int, until: float) -> None:
    """Disconnect before, while or after sending, without reading."""
    texts = new_texts(3)
    for n in itertools.count():
        if time.monotonic() > until:
            return
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            request = texts()
            writer.write(request[: (0, 30, len(request) - 5, len(request))[n % 4]])
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass
        await asyncio.sleep(0.05)


async def swaps(index: Path, until: float, every: float, log: list[str]) -> None:
    model = open_current(index).manifest.spec.fingerprint  # another one answers otherwise
    numbers = version_numbers(index)
    versions = itertools.cycle([n for n in numbers if read_manifest(index, n).spec.fingerprint == model])
    while time.monotonic() + every < until:
        await asyncio.sleep(every)
        version = next(versions)
        await asyncio.to_thread(rollback, index, version)
        log.append(f"version {version}")


async def disturb_redis(redis: RedisServer, began: float, seconds: float, log: list[str]) -> None:
    async def at(share: float) -> None:
        await asyncio.sleep(max(0.0, began + share * seconds - time.monotonic()))

    await at(0.2)
    redis.stop()
    log.append("redis killed")
    await at(0.4)
    await asyncio.to_thread(redis.start)
    log.append("redis started")
    await at(0.6)
    redis.send_signal(signal.SIGSTOP)
    log.append("redis stopped")
    await at(0.7)
    redis.send_signal(signal.SIGCONT)
    log.append("redis goes on")


async def watch(server: Server, until: float, samples: list[float]) -> None:
    while time.monotonic() < until:
        samples.append(server.memory_mb())
        await asyncio.sleep(2)


async def soak(server: Server, redis: RedisServer, index: Path, seconds: float, every: float) -> bool:
    began = time.monotonic()
    until = began + seconds
    samples: list[float] = []
    log: list[str] = []
    statuses: dict[str, Counter[int]] = defaultdict(Counter)
    broken: Counter[str] = Counter()
    slowest: dict[str, float] = {}
    expected, answers = loads("1f63f"), dict[str, Answers]()

    async def load(name: str) -> None:
        requests, _ = expected[name]
        kept = answers[name] = Answers()
        while time.monotonic() < until:
            part = min(5.0, until - time.monotonic())
            tally = await closed_loop(server.port, requests, connections=1, seconds=part, pause_s=PAUSE_S, check=kept)
            statuses[name] += tally.statuses
            broken[name] += tally.broken
            slowest[name] = max(slowest.get(name, 0.0), *tally.latencies, 0.0)

    await asyncio.gather(
        *(load(name) for name in expected),
        disconnect_early(server.port, until),
        swaps(index, until, every, log),
        disturb_redis(redis, began, seconds, log),
        watch(server, until, samples),
    )
    whole, alone = server.process.poll() is None, Server(index, cache_size=0)
    try:
        for name in ("cached texts", "new texts", "filters", "images", "items"):
            compared, wrong = await answers[name].compare(alone.port)
            whole &= not wrong
            print(f"{name:16} {compared} answers compared, {wrong} wrong")
    finally:
        alone.stop()
    for name, counts in statuses.items():
        wrong = {status: n for status, n in counts.items() if status not in expected[name][1]}
        whole &= not wrong and not broken[name]
        verdict = f"WRONG {wrong}, {broken[name]} broken" if wrong or broken[name] else "as it should be"
        print(f"{name:16} {dict(sorted(counts.items()))}, slowest {slowest[name] * 1000:.0f} ms: {verdict}")
    quarter = len(samples) // 4
    start = int(len(samples) * min(SETTLED_S / seconds, 0.25))
    early, late = statistics.median(samples[start : start + quarter]), statistics.median(samples[-quarter:])
    whole &= late < GROWTH * early
    print(f"memory: {early:.0f} MB in a quarter after the start, {late:.0f} MB in the last, at most {max(samples):.0f}")
    total = sum(sum(counts.values()) for counts in statuses.values())
    print(f"{total} answers, as {total / 86400:.1f} a second for 24 hours; {', '.join(dict.fromkeys(log))}")
    return whole


class Answers:
    """Answers under load to compare with those without it: all different ones, of some of the requests."""

    def __init__(self) -> None:
        self._kept: dict[bytes, dict[bytes, bytes]] = {}  # request -> what it says -> body
        self._seen = 0

    def __call__(self, request: bytes, body: bytes) -> None:
        self._seen += 1
        if request not in self._kept and self._seen % max(1, len(self._kept) * 10 // MOST_NEW):
            return  # one of 1, 2, ... 10 new ones
        if request in self._kept or len(self._kept) < MOST_NEW:
            self._kept.setdefault(request, {})[_said(body)] = body

    async def compare(self, port: int) -> tuple[int, int]:
        """Ask a server the same; return the number of compared answers, and of wrong ones."""
        wrong = 0
        for request, bodies in self._kept.items():
            alone = await ask(port, request)
            different = [body for body in bodies.values() if not same_answer(_said(body), _said(alone))]
            for body in different[:1]:
                print(f"wrong answer to {request[-300:]!r}: {_said(body)[:500]!r}, alone {_said(alone)[:500]!r}")
            wrong += len(different)
        return sum(map(len, self._kept.values())), wrong


def _said(body: bytes) -> bytes:
    """Return a body without what may differ: its version, times, and how it was found."""
    if body[:1] != b"{":
        return body
    values = json.loads(body)
    for name in ("index_version", "took_ms", "cached", "facets"):
        values.pop(name, None)
    return json.dumps(values).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder of the index")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--swap", type=float, default=15.0, help="seconds between swaps of the index")
    given = parser.parse_args()
    if given.minutes < LEAST_MINUTES:
        parser.error(f"--minutes must be at least {LEAST_MINUTES}, for some samples of the memory in each quarter")
    import uvloop

    index = emoji(given.work)
    if len(version_numbers(index)) < 2:  # a second version, of the same gallery
        from index_jobs.rebuild import rebuild

        example = ROOT / "examples" / "emoji" / "twemoji"
        rebuild(example, example / "checkpoint", index, force=True, progress=False)
    redis, group = RedisServer(), MemoryGroup(MEMORY)
    redis.start()
    server = Server(index, group=group, redis_url=redis.url, poll_s=0.5, cache_size=100, max_upload_bytes=2**20)
    try:
        whole = uvloop.run(soak(server, redis, index, 60 * given.minutes, given.swap))
    finally:
        server.stop()
        redis.stop()
        peak, ended = group.report()
        group.close()
    limit = "not limited here" if group.path is None else f"limited to {MEMORY / 1e6:.0f} MB, at most {peak:.0f}"
    print(f"memory was {limit}, with pages of files; {ended} processes ended for lack of it")
    whole &= not ended
    print("whole" if whole else "NOT WHOLE", f"(server ended with {server.process.returncode})")
    sys.exit(0 if whole and server.process.returncode in (0, -signal.SIGTERM) else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
