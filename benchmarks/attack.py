"""Attack the bundled example behind nginx, and measure honest requests meanwhile.

    python benchmarks/attack.py
    python benchmarks/attack.py --short    # some attacks, for one second each

- Each attack runs in a process of its own for `--seconds`, from an address of its own,
  as quotas are by caller. Beside it one client sends new texts, one sends new images,
  and one probes /healthz, which needs only the event loop.
- The table shows the responses to the attack, the latencies of the honest requests, the
  number of refused ones, and the peak of the memory of the server and its decoding
  processes.
- At the end the server starts again, with the collections that an attack has created.
- Exits with 1 if a request was answered 500, if a smuggled one was answered, if an
  answer under overload was wrong, if the attacker or an honest caller was left without
  an answer, or if memory exceeded `MEMORY_MB`.
"""

import argparse
import asyncio
import base64
import itertools
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop
from hostile_files import encoded, heif_bomb, many_extents, many_tags, two_headers
from load import Tally, address, ask, closed_loop, image_request, post, same_answer
from serve import new_images, new_texts
from service import Server, emoji, index_of, serving

from tests.support import hostile_images as hostile
from tests.support.servers import behind_nginx

ADMIN_KEY = "a key of the admin"
ATTACKER = "127.0.0.2"  # another caller than the honest ones
HOST = b"Host: 127.0.0.1\r\n"
PROBE = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
JSON = b"Content-Type: application/json\r\n"
FORM = (
    b"POST /search/image HTTP/1.1\r\n"
    + HOST
    + b"Content-Type: multipart/form-data; boundary=b\r\n"
)
MEMORY_MB = 2000  # of the server and its decoding processes
SHORT = {
    "unfinished uploads",
    "tiny chunks",
    "smuggling",
    "texts without pause",
    "nested JSON",
    "long filters",
    "slow filters",
    "long contains",
    "long names",
    "nested values",
    "spaces",
    "whole pages",
    "half heads",
    "batches of explanations",
    "200 mutated images",
    "batches of 12 megapixels",
}
LARGE_IMAGES = 8  # of 62 megapixels
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'


@dataclass
class Target:
    """What is attacked. until: end of the attack. outcomes: status codes, and
    connections that were closed.
    """

    port: int
    until: float
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until

    async def send(
        self,
        pieces: Iterator[bytes],
        *,
        every_s: float = 0.0,
        is_read: bool = True,
    ) -> bytes:
        """Send pieces over one connection, read until it is closed or the attack is
        over, and return the response.
        """
        response = b""
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1",
                self.port,
                local_addr=(address.get(), 0),
            )
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(every_s)
                    if self.is_over:
                        break
                while is_read and not self.is_over:
                    part = await asyncio.wait_for(
                        reader.read(65536), max(0.1, self.until - time.monotonic())
                    )
                    response += part[: 65536 - len(response)]
                    if not part:
                        self.outcomes["closed"] += 1
                        break
                while not (is_read or self.is_over or writer.is_closing()):
                    await asyncio.sleep(0.1)
            except TimeoutError:
                self.outcomes["still open"] += 1
            finally:
                writer.close()
        for part in response.split(b"HTTP/1.1 ")[1:]:
            self.outcomes[part[:3].decode()] += 1
        return response


Attack = Callable[[Target], Awaitable[None]]


def flood(*requests: bytes, connections: int = 2) -> Attack:
    """Return an attack that sends requests in a closed loop."""

    async def attack(target: Target) -> None:
        cycle = itertools.cycle(requests)
        seconds = target.until - time.monotonic()
        tally = await closed_loop(
            target.port, lambda: next(cycle), connections=connections, seconds=seconds
        )
        target.outcomes.update(
            {str(status): count for status, count in tally.statuses.items()}
        )
        target.outcomes["closed"] += tally.broken

    return attack


def connections(
    count: int,
    make: Callable[[], Iterator[bytes]],
    every_s: float = 0.0,
    is_read: bool = True,
) -> Attack:
    """Return an attack that holds `count` connections, each sending the same pieces."""

    async def attack(target: Target) -> None:
        await asyncio.gather(
            *(
                target.send(make(), every_s=every_s, is_read=is_read)
                for _ in range(count)
            )
        )

    return attack


def again(attack: Attack) -> Attack:
    """Return an attack that connects again when its connections were closed."""

    async def repeated(target: Target) -> None:
        while not target.is_over:
            await attack(target)

    return repeated


async def smuggle(target: Target) -> None:
    """Send bodies that look like requests behind offers to upgrade; report if one of
    them is answered.
    """
    inner = b"GET /collections HTTP/1.1\r\n" + HOST + b"\r\n"
    head = (
        b"POST /search/text HTTP/1.1\r\n"
        + HOST
        + JSON
        + b"Content-Length: %d\r\n" % len(inner)
    )
    attacks = (
        [head + b"Connection: Upgrade\r\n", b"Upgrade: h2c\r\n\r\n", inner],
        [PROBE + head + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", inner],
    )
    responses = await asyncio.gather(
        *(target.send(iter(pieces), every_s=0.1) for pieces in attacks)
    )
    target.outcomes["SMUGGLED"] += sum(
        b'"collections"' in response for response in responses
    )


async def overload(target: Target) -> None:
    """Ask for new texts over 256 connections without pause, and compare some answers
    with those afterwards.
    """
    seconds = target.until - time.monotonic()
    answers = dict[bytes, bytes]()
    load = partial(
        closed_loop,
        connections=256,
        seconds=seconds,
        check=answers.__setitem__,
    )
    tally = await load(target.port, new_texts(time.time_ns()))
    target.outcomes.update(
        {str(status): count for status, count in tally.statuses.items()}
    )
    target.outcomes["closed"] += tally.broken
    for request in list(answers)[:: 1 + len(answers) // 50]:
        target.outcomes["WRONG"] += not same_answer(
            answers[request], await ask(target.port, request)
        )


def endless(head: bytes, piece: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: itertools.chain([head], itertools.repeat(piece))


def text(**body: object) -> bytes:
    return post("/search/text", "application/json", json.dumps(body).encode())


def batch(count: int = 32, **query: object) -> bytes:
    """Return a batch of queries that differ in their texts."""
    queries = [
        query | ({"query": f"{query['query']} {n}"} if "query" in query else {})
        for n in range(count)
    ]
    return post(
        "/search/batch",
        "application/json",
        json.dumps({"queries": queries}, ensure_ascii=False).encode(),
    )


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n"


def change(method: str, path: str, **body: object) -> bytes:
    """Return a request of a caller that has the admin key."""
    request = post(path, "application/json", json.dumps(body).encode() if body else b"")
    return request.replace(b"POST", method.encode(), 1).replace(
        b"\r\n",
        f"\r\nX-API-Key: {ADMIN_KEY}\r\n".encode(),
        1,
    )


def changes() -> dict[str, Attack]:
    """Return the attacks of callers that may change items, and on their results."""
    small = base64.b64encode(encoded("PNG", 8)).decode()
    numbers = itertools.count()
    metadata = {"text": "x" * 66_000}
    items = [{"id": f"{n}", "image": small, "metadata": metadata} for n in range(200)]
    path = "/collections/dropped"
    dropped = [change("PUT", path), change("PUT", f"{path}/items/1", image=small)]
    dropped += [change("DELETE", f"{path}/items", ids=["1"]), change("DELETE", path)]
    patches = [
        change("PATCH", "/collections/hostile/items/1", metadata={"price": n})
        for n in range(200)
    ]
    pages = [get(f"/collections/hostile/items?k={k}") for k in (200, 2)]
    # so that few of them are cached
    sizes = itertools.product(range(LARGE_IMAGES), (192, 384, 1280))
    large = [
        get(f"/collections/hostile/items/large{n}/image?size={size}")
        for n, size in sizes
    ]
    grouped = [{"query": f"cat {n}", "k": 200, "group_by": "text"} for n in range(32)]
    hosts = ("localhost", "[::ffff:127.0.0.1]")
    return {
        "pages of large metadata": flood(*pages),
        "unread pages of large metadata": connections(
            250, lambda: iter(pages[:1]), is_read=False
        ),
        "groups of long values": flood(
            change("POST", "/collections/hostile/search/batch", queries=grouped)
        ),
        "items of large metadata": flood(
            change("PUT", "/collections/hostile/items", items=items), connections=8
        ),
        "thumbnails of 62 megapixels": flood(*large, connections=8),
        "images by URL": flood(*(batch(8, image=f"http://{host}/x") for host in hosts)),
        "changes of items": flood(*patches, connections=8),
        "changes of dropped collections": flood(*dropped, connections=8),
        "many collections": flood(
            *(change("PUT", f"/collections/new{next(numbers)}") for _ in range(200))
        ),
    }


def attacks() -> dict[str, Attack]:
    """Return every attack by name."""
    upload = FORM + b"Content-Length: 20971000\r\n\r\n" + PART
    chunked = (
        b"POST /search/text HTTP/1.1\r\n"
        + HOST
        + JSON
        + b"Transfer-Encoding: chunked\r\n\r\n"
    )
    large = get("/ui/swagger-ui-bundle.js")
    nested = b'{"queries":[{"query":"x","filter":{"id":%s}}]}' % (
        b"[" * 190 + b'"",' * 300_000 + b'""' + b"]" * 190
    )
    picture = base64.b64encode(encoded("PNG", 3_464)).decode()
    slow = itertools.count()

    def slow_filters() -> bytes:
        words = [
            {"caption": {"contains": f"{next(slow)} no such words"}} for _ in range(64)
        ]
        return batch(query="cat", filter={"$or": words})

    batches = {
        "batches of explanations": batch(query="a cat", explain=True),
        "long filters": batch(
            query="cat",
            filter={"caption": ["\U0001f600" * 62_000]},
            facets=["category"],
        ),
        "long contains": batch(
            query="cat", filter={"caption": {"contains": "x" * 700_000}}
        ),
        "whole pages": batch(query="cat", k=200, fields=["*"]),
        "all facets": batch(
            query="cat",
            min_score=-1,
            facets=["id", "caption", "category"],
        ),
        "batches of 12 megapixels": batch(image=picture),
        "nested JSON": post(
            "/search/batch",
            "application/json",
            b'{"queries":' + b'{"a":[' * 4_000_000,
        ),
        "long names": post(
            "/search/batch",
            "application/json",
            b'{"queries":[{"%s":1}]}' % (b"A" * 26_000_000),
        ),
        "nested values": post("/search/batch", "application/json", nested),
    }
    images = {
        "PNG bomb": hostile.png_of_size(60_000, 60_000),
        "JPEG bomb": encoded("JPEG", 9_000),
        "WebP bomb": encoded("WEBP", 9_000),
        "AVIF bomb": encoded("AVIF", 6_000),
        "HEIF bomb": heif_bomb(60_000),
        "TIFF bomb": encoded("TIFF", 9_000, compression="tiff_adobe_deflate"),
        "TIFF with 5,000 tags": many_tags(5_000),
        "AVIF of many extents": many_extents(20_000),
        "TIFF tile bomb": hostile.tiff_with_tile(12_000),
        "JPEG with 2,000 scans": hostile.jpeg_with_scans(2_000),
        "PNG with two headers": two_headers(2_500),
        "JPEG with 50,000 segments": hostile.jpeg_with_segments(50_000),
        "PNG with 200,000 chunks": hostile.png_with_chunks(200_000, b"tEXt"),
        "GIF with 1,000,000 blocks": hostile.gif_with_comment_blocks(1_000_000),
    }
    return {
        "half heads": connections(600, lambda: iter([b"GET / HTTP/1.1\r\n"])),
        "slow bodies": connections(300, endless(upload, b"x"), every_s=1.0),
        "unfinished uploads": connections(
            13, lambda: iter([upload, bytes(20_000_000)])
        ),
        "tiny chunks": again(connections(4, endless(chunked, b"1\r\n \r\n" * 10_000))),
        "pipelined requests": again(connections(20, lambda: iter([PROBE * 2000]))),
        "unread responses": connections(100, lambda: iter([large * 20]), is_read=False),
        "smuggling": smuggle,
        "texts without pause": overload,
        "deep JSON": flood(
            post("/search/text", "application/json", b'{"filter":' + b'{"a":' * 12_000)
        ),
        "spaces": flood(text(query="<" + " " * 495 + "endoftext" + " " * 490)),
        "nested entities": flood(text(query="&" + "amp;" * 249)),
        "bodies of 26 MB": flood(batch(image="A" * 800_000), connections=16),
        "slow filters": flood(*(slow_filters() for _ in range(20)), connections=8),
        **{name: flood(request) for name, request in batches.items()},
        **{name: flood(image_request(data)) for name, data in images.items()},
        "200 mutated images": flood(
            *(image_request(data) for data in hostile.mutants(200))
        ),
        **changes(),
    }


def measure(
    server: Server,
    port: int,
    attack: Attack | None,
    seconds: float,
) -> tuple[str, list[str]]:
    """Run one attack beside honest requests; return the cells of its row, and what must
    not happen.
    """
    _wait_until_idle(server)
    target = Target(port, time.monotonic() + seconds)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(
        target=_run_attack,
        args=(attack, target, sender),
        daemon=True,
    )
    process.start()
    sender.close()
    tallies, peak = asyncio.run(_send_honest(server, port, seconds))
    outcomes: Counter[str] = (
        receiver.recv() if receiver.poll(20) else Counter({"attacker hangs": 1})
    )
    process.kill()
    process.join()
    faults = [
        name
        for name in ("500", "SMUGGLED", "WRONG", "attacker hangs")
        if outcomes[name]
    ]
    lost = sum(each.broken for each in tallies)
    failed = sum(each.statuses[500] for each in tallies)
    wrong = {
        f"{lost} lost": lost,
        f"{failed} failed": failed,
        f"{peak:.0f} MB": peak > MEMORY_MB,
    }
    faults += [name for name, is_wrong in wrong.items() if is_wrong]
    described = ", ".join(
        f"{count} x {outcome}" for outcome, count in sorted(outcomes.items()) if count
    )
    worst = " | ".join(
        f"{max(each.latencies, default=float('nan')) * 1000:7.0f} ms"
        for each in tallies
    )
    refused = sum(
        sum(each.statuses.values()) - each.statuses[200] + each.broken
        for each in tallies
    )
    usual = f"{tallies[0].percentile(99):7.0f} ms"
    return (
        f"{described or '-':40} | {usual} | {worst} | {refused:7} | {peak:7.0f} MB",
        faults,
    )


def _wait_until_idle(server: Server) -> None:
    """Wait until the server has read what the attack before has left in its sockets."""
    used = server.cpu_s()
    last = -1.0
    while used - last > 0.05:
        time.sleep(0.5)
        used, last = server.cpu_s(), used


def _run_attack(attack: Attack | None, target: Target, sender: Connection) -> None:
    address.set(ATTACKER)

    async def run() -> None:
        if attack is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    attack(target), target.until + 5 - time.monotonic()
                )

    uvloop.run(run())
    sender.send(target.outcomes)


async def _send_honest(
    server: Server,
    port: int,
    seconds: float,
) -> tuple[list[Tally], float]:
    """Send texts, images and probes; return their tallies, and the peak of the server's
    memory in MB.
    """
    peak = 0.0
    until = time.monotonic() + seconds

    async def watch() -> None:
        nonlocal peak
        while time.monotonic() < until:
            peak = max(peak, server.memory_mb(shared=True))
            await asyncio.sleep(0.1)

    loop = partial(closed_loop, port, connections=1, seconds=seconds)
    async with asyncio.timeout(seconds + 60):
        texts = loop(new_texts(time.time_ns()), pause_s=0.05)
        images = loop(new_images(), pause_s=0.1)
        *tallies, _ = await asyncio.gather(
            texts,
            images,
            loop(lambda: PROBE, pause_s=0.02),
            watch(),
        )
    return tallies, peak


async def _explain_once(port: int) -> None:
    """Let the service load its full model, which only the first explanation waits
    for.
    """
    request = text(query="cat", k=1, explain=True)
    await closed_loop(port, lambda: request, connections=1, seconds=0.1)


def hostile_collection(work: Path) -> Path:
    """Return an index of items with as much metadata as they may have, and of images of
    62 megapixels.
    """
    small = encoded("PNG", 8)
    lines = list[str]()
    gallery = work / "hostile-gallery"
    gallery.mkdir(parents=True, exist_ok=True)
    for number in range(256):
        (gallery / f"{number}.png").write_bytes(small + number.to_bytes(2, "big"))
        text = f"{number:03}" + "x" * 60_000
        lines.append(
            json.dumps({"file_name": f"{number}.png", "id": f"{number}", "text": text})
        )
    large = encoded("PNG", 7_874)
    for number in range(LARGE_IMAGES):
        (gallery / f"large{number}.png").write_bytes(large)
        lines.append(
            json.dumps({"file_name": f"large{number}.png", "id": f"large{number}"})
        )
    (gallery / "metadata.jsonl").write_text("\n".join(lines))
    return index_of(gallery, work / "hostile")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks"),
        help="directory of the index",
    )
    parser.add_argument("--index", type=Path, help="attack this index instead")
    parser.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        help="duration of each attack",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="NAME",
        help="run these attacks alone",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="run some attacks, for one second each",
    )
    given = parser.parse_args()
    if given.short:
        given.only = SHORT
        given.seconds = 1.0
    rows: dict[str, Attack | None] = {"(none)": None, **attacks(), "(none) again": None}
    if unknown := set(given.only or ()) - rows.keys():
        parser.error(
            f"--only names no attack: {', '.join(sorted(unknown))}; there are:"
            f" {', '.join(rows)}"
        )
    failed = list[str]()
    created = tempfile.TemporaryDirectory()
    proxy = tempfile.TemporaryDirectory()
    settings = dict[str, object]()
    if given.only is None or not changes().keys().isdisjoint(given.only):
        settings = {
            "collections": json.dumps({"hostile": str(hostile_collection(given.work))}),
            "collections_dir": created.name,
            "writes": "true",
            "admin_key": ADMIN_KEY,
            "max_jobs": 50,
            "image_hosts": "localhost,::ffff:127.0.0.1",
        }
    with (
        created,
        proxy,
        serving(given.index or emoji(given.work), **settings) as server,
        behind_nginx(Path(proxy.name), server.port) as port,
    ):
        asyncio.run(_explain_once(server.port))
        columns = (
            "text p99   | worst text | worst image | worst probe | refused | memory"
        )
        print(f"{'attack':28} | {'responses':40} | {columns}")
        for name, attack in rows.items():
            if given.only is None or name in given.only or name.startswith("("):
                row, faults = measure(server, port, attack, given.seconds)
                print(f"{name:28} | {row}", flush=True)
                failed += [f"{name}: {fault}" for fault in faults]
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        print(
            "highest memory of all:"
            f" {int(status.split('VmHWM:')[1].split()[0]) * 1024 / 1e6:.0f} MB"
        )
        if settings:
            server.stop()
            server.start()
            count = sum(1 for _ in Path(created.name).glob("*/collection.json"))
            print(
                f"with {count} created collections, ready again after"
                f" {server.ready_s:.1f} s"
            )
    if failed:
        raise SystemExit("got through: " + "; ".join(failed))


if __name__ == "__main__":
    main()
