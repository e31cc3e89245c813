"""One process, two workers and two replicas under one load; and a day of two replicas.

    python benchmarks/scale.py                    the table, in Markdown
    python benchmarks/scale.py --day 60           a day in 60 minutes; exits with 1 if anything was lost or wrong
    python benchmarks/scale.py --day 60 --store   the same with the index in SeaweedFS, which is lost for a while

In a day, versions are published and rolled back, items change over HTTP, or with a store by jobs of another machine,
and replicas and Redis are killed. Each response is compared with a search here of the version that it names, and each
accepted change with it.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from load import closed_loop, text_request, unique_texts
from serve import median, new_texts, run
from service import ROOT, Server, emoji, serving

from app.core.settings import Settings
from app.search import Index
from app.search.snapshots import load_snapshot
from dcar_core.util.errors import LockedError, StoreUnavailableError
from index_jobs.index.changes import change_metadata
from index_jobs.index.publish import rollback
from index_jobs.index.versions import current_version, open_current, published_index
from index_jobs.jobs.update import add, remove
from tests.support.nginx import behind_nginx
from tests.support.object_store import Machines, ObjectStore
from tests.support.redis_server import RedisServer
from tests.support.versions import publish_copy

CONNECTIONS = 16
TIE = 0.002  # results whose scores differ by less may change places: batches in bfloat16 round differently
TEXTS = list(itertools.islice(unique_texts(1), 300))
ADMIN = {"Authorization": "Bearer an admin key"}
IMAGE = ROOT / "examples/emoji/query.png"
KEEP = 10**6  # all versions, to compare with
WRITES = {"writes": "true", "admin_key": "an admin key", "keep_writes": KEEP}


@contextmanager
def services(*each: dict[str, Any]) -> Iterator[tuple[int, list[Server]]]:
    """Services with these settings, several of them behind nginx; yield the port and the services."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(**settings)) for settings in each]
        port = servers[0].port
        if len(servers) > 1:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port = stack.enter_context(behind_nginx(folder, *(server.port for server in servers)))
        yield port, servers


def table(index: Path, seconds: float, rounds: int) -> bool:
    one, half = {"index": index}, {"index": index, "threads": 1}
    with services(one), services(half):  # exports are made
        pass
    kinds = {
        "one process": services(one),
        "two workers": services(one | {"workers": 2}),
        "two replicas behind nginx": services(half, half),
    }
    expected, whole = list[list[str]](), True
    print("| | new texts/s | p99 ms | known texts/s | p99 ms | MB | answers |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, start in kinds.items():
        with start as (port, servers):
            time.sleep(10)  # further workers load their model
            url, known = f"http://127.0.0.1:{port}/search/text", itertools.cycle(map(text_request, TEXTS))
            bodies = [httpx.post(url, json={"query": text}, timeout=60).json() for text in TEXTS[:50]]
            found = [[each["id"] for each in body["results"]] for body in bodies]
            expected, cells = expected or found, list[str]()
            for requests in (new_texts(5), known.__next__):
                load = partial(closed_loop, port, requests, connections=CONNECTIONS, seconds=seconds)
                loads = [run(load()) for _ in range(rounds + 1)][1:]  # the first fills the caches
                whole &= all(set(each.statuses) == {200} and not each.broken for each in loads)
                cells += [f"{median(loads).rate:,.0f}", f"{median(loads).percentile(99):.1f}"]
            memory = sum(server.memory_mb(shared=True) for server in servers)
            whole &= found == expected
            same = f"{sum(map(list.__eq__, found, expected))} of {len(found)} equal"
            print(f"| {name} | {' | '.join(cells)} | {memory:,.0f} | {same} |", flush=True)
    return whole


class Day:
    """Two replicas on one index, and what was seen of them. index: where versions are published; store: of the index.

    other: the index on another machine with that store, whose jobs change items.
    """

    def __init__(self, index: Path, seconds: float, store: ObjectStore | None, other: Path) -> None:
        self.index, self.seconds, self.store, self.other = index, seconds, store, other
        self.found: dict[tuple[int, str], set[tuple[str, ...]]] = {}  # of a version and a text: the ids
        self.jobs: dict[str, tuple[str, Any]] = {}  # of accepted changes: the item, and its stamp; None: deleted
        self.ended: dict[str, dict[str, Any]] = {}
        self.statuses, self.events, self.faults = Counter[int](), Counter[str](), list[str]()

    async def until(self, share: float) -> None:
        await asyncio.sleep(max(0.0, self.began + share * self.seconds - time.monotonic()))

    async def run(self, port: int, servers: list[Server], redis: RedisServer) -> None:
        self.began, self.end = time.monotonic(), time.monotonic() + self.seconds
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=ADMIN) as client:
            work = [self.read(client), self.read(client), self.publish(), self.harm(servers, redis), self.write(client)]
            await asyncio.gather(*work)
            for _ in range(240):  # until all jobs have ended, and both serve the current version
                for job in self.jobs.keys() - self.ended.keys():
                    body = (await client.get(f"/jobs/{job}")).json()
                    self.ended |= {job: body} if body["status"] in ("done", "failed") else {}
                states = [httpx.get(f"http://127.0.0.1:{server.port}/readyz", timeout=60).json() for server in servers]
                ready = {(body["status"], body.get("index_version")) for body in states}
                current = current_version(published_index(self.index))
                if len(self.ended) == len(self.jobs) and ready == {("ready", current)}:
                    break
                await asyncio.sleep(0.5)
            else:
                self.faults.append(f"{len(self.jobs) - len(self.ended)} changes have not ended; replicas are {states}")

    async def read(self, client: httpx.AsyncClient) -> None:
        while time.monotonic() < self.end:
            text = random.choice(TEXTS[:20])
            try:
                answer = await client.post("/search/text", json={"query": text, "k": 10})
            except httpx.TransportError as error:
                self.faults.append(f"a search broke: {error!r}")
                continue
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                body = answer.json()
                ids = tuple(each["id"] for each in body["results"])
                self.found.setdefault((body["index_version"], text), set()).add(ids)
            await asyncio.sleep(0.02)

    async def write(self, client: httpx.AsyncClient) -> None:
        """Change fields, each of another item; every tenth change puts an item, or deletes it."""
        ids = [open_current(self.index).item(row).id for row in range(500)]
        for number in itertools.count():
            item, stamp, method = ids[number % len(ids)], number if number % 20 < 19 else None, "PATCH"
            if number % 10 == 9:
                item, method = f"day-{number // 20}", "DELETE" if stamp is None else "PUT"
            job = None
            while job is None:  # a client repeats what was not accepted
                if time.monotonic() > self.end:
                    return
                if self.store:
                    job = await asyncio.to_thread(self.publish_change, method, item, number)
                else:
                    job = await self.send(client, method, item, number)
                self.events["changes sent again"] += job is None
                await asyncio.sleep(self.seconds / 300)
            self.jobs[job] = item, stamp

    async def send(self, client: httpx.AsyncClient, method: str, item: str, stamp: int) -> str | None:
        """Send a change, and return the job; None if it was not accepted."""
        put = {"id": item, "image": base64.b64encode(IMAGE.read_bytes()).decode(), "metadata": {"stamp": stamp}}
        bodies: dict[str, Any] = {"PATCH": {"ids": [item], "metadata": put["metadata"]}, "PUT": {"items": [put]}}
        with suppress(httpx.TransportError):
            answer = await client.request(method, "/items", json=bodies.get(method, {"ids": [item]}))
            return str(answer.json()["id"]) if answer.status_code == 202 else None
        return None

    def publish_change(self, method: str, item: str, stamp: int) -> str | None:
        """Make a change on the other machine, as `send` does by the service."""
        try:
            if method == "PATCH":
                version = change_metadata(self.other, [(item, {"stamp": stamp})], "the day", keep=KEEP).version
            elif method == "PUT":
                gallery = self.other / "day.jsonl"
                gallery.write_text(json.dumps({"id": item, "file_name": str(IMAGE), "stamp": stamp}))
                given = {"replace_existing": True, "workers": 0, "device": "cpu", "progress": False}
                version = add(self.other, gallery, keep=KEEP, **given).version
            else:
                version = remove(self.other, [item], missing_ok=True, keep=KEEP).version
        except (LockedError, StoreUnavailableError):
            return None
        self.ended[job := f"{method} {stamp}"] = {"status": "done", "index_version": version}
        return job

    async def publish(self) -> None:
        """Publish twice, roll back once, and so on."""
        for number in range(1, 16):
            await self.until(number / 16)
            while time.monotonic() < self.end:
                try:
                    if number % 3 == 0:
                        await asyncio.to_thread(rollback, self.index)
                    else:
                        await asyncio.to_thread(publish_copy, self.index, KEEP)
                    self.events["rollbacks" if number % 3 == 0 else "publications"] += 1
                    break
                except (LockedError, StoreUnavailableError):  # a change is being applied, or the store is lost
                    await asyncio.sleep(0.1)

    async def harm(self, servers: list[Server], redis: RedisServer) -> None:
        first, second = servers
        steps: list[tuple[float, str, Callable[[], object]]] = [
            (0.1, "killed replicas", first.process.kill), (0.15, "", first.start),
            (0.3, "losses of Redis", redis.stop), (0.4, "", redis.start),
            (0.7, "killed replicas", second.process.kill), (0.75, "", second.start),
            (0.85, "losses of Redis", lambda: redis.send_signal(signal.SIGSTOP)),
            (0.95, "", lambda: redis.send_signal(signal.SIGCONT)),
        ]  # fmt: skip
        if (store := self.store) is not None:
            steps.append((0.5, "losses of the store", lambda: store.send_signal(signal.SIGSTOP)))
            steps.append((0.6, "", lambda: store.send_signal(signal.SIGCONT)))
        for share, name, call in sorted(steps, key=lambda step: step[0]):
            await self.until(share)
            await asyncio.to_thread(call)
            self.events.update([name] if name else [])

    def compare(self) -> None:
        """Compare all that was seen with the versions themselves."""
        settings, first = (
            Settings.model_construct(index=self.index),
            Index.open(self.index, device="cpu", runtime="auto").snapshot,
        )
        self.faults += [f"a change failed: {body}" for body in self.ended.values() if body["status"] == "failed"]
        changed = {job: body["index_version"] for job, body in self.ended.items() if body["status"] == "done"}
        for version in sorted({version for version, _ in self.found} | set(changed.values())):
            published_index(self.index, version)  # from a store, if it is not here
            opened = load_snapshot(self.index, settings, [first], version=version, warm_up=False)
            for text in [text for each, text in self.found if each == version]:
                best = Index(opened, settings).search(text, k=20)["results"]
                right = {each["id"]: each["score"] for each in best}
                for ids in self.found[version, text]:
                    pairs = zip(ids, [*right.values()][:10], strict=True)
                    if len(set(ids)) < 10 or any(abs(right.get(each, -1) - score) > TIE for each, score in pairs):
                        self.faults.append(f"version {version}, {text!r}: {ids}, not {right}")
            for item, stamp in (self.jobs[job] for job, each in changed.items() if each == version):
                row = opened.artifact.row_of(item)
                kept = None if row is None else opened.artifact.item(row).metadata.get("stamp")
                if kept != stamp:
                    self.faults.append(f"version {version} has {kept} for {item}, not {stamp}")


def day(source: Path, minutes: float, has_store: bool) -> bool:
    import uvloop

    with tempfile.TemporaryDirectory(dir=source.parent) as temporary, ExitStack() as stack:
        folder, redis, store = Path(temporary), stack.enter_context(RedisServer()), None
        shared = {"redis_url": redis.url, "poll_s": 0.5, "threads": 1}
        if has_store:
            (folder / "store").mkdir()
            store, machines = ObjectStore(folder / "store"), Machines(folder, "s3://bucket/index")
            store.start()
            stack.callback(store.stop)
            os.environ.update(store.environment)
            index, other, shared = machines["here"], machines["there"], shared | {"index": machines.url}
            given = [shared | {"runtime_cache": folder / name} for name in "ab"]
            publish_copy(index, source=source)
        else:
            index = other = Path(shutil.copytree(source, folder / source.name))
            given = [shared | WRITES | {"index": index}] * 2
        seen = Day(index, 60 * minutes, store, other)
        with services(*given) as (port, servers):
            uvloop.run(seen.run(port, servers, redis))
        seen.compare()
        seen.faults += [f"{count} searches got {status}" for status, count in seen.statuses.items() if status != 200]
        print(*seen.faults[:20], sep="\n", end="\n" * bool(seen.faults))
        events = ", ".join(f"{count} {name}" for name, count in seen.events.items())
        versions = len({version for version, _ in seen.found})
        print(f"{events}; {seen.statuses[200]:,} searches of {versions} versions; {len(seen.jobs)} changes")
        print("VIOLATED" if seen.faults else "held: nothing lost, no wrong answer, no failed search")
        return not seen.faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="take this index instead of the bundled emoji")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--day", type=float, metavar="MINUTES", help="run a day instead of the table")
    parser.add_argument("--store", action="store_true", help="with the index in an object store")
    given = parser.parse_args()
    index = given.index or emoji(Path("data/benchmarks"))
    whole = day(index, given.day, given.store) if given.day else table(index, given.seconds, given.rounds)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    os.environ.setdefault("DCAR_DEVICE", "cpu")
    main()
