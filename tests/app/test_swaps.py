"""Swaps under load: no request fails, each response is from one version, and old versions are freed."""

import asyncio
import gc
import itertools
import logging
import weakref
from pathlib import Path
from typing import Any

import httpx
import pytest

from index_jobs.index.publish import rollback
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.service import ADMIN_ONLY, ServiceClient, opened
from tests.support.writes import ADMINS

SWAPS = 12
WARM = 8  # swaps after which the size of the process is stable
ROOM = 8 * 2**20  # bytes; a backbone alone has 13 MB


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class LiveParts:
    """Encoders and indexes that were served and are still in memory."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def note(self, client: ServiceClient) -> None:
        live = client.app.state.collections[None].live
        for part in (live.encoder, live.encoder.model, live.artifact):
            self._seen[id(part)] = live.version, weakref.ref(part)

    def alive(self) -> list[tuple[int, str]]:
        """Return the version and the type of each."""
        found = [(version, part()) for version, part in self._seen.values()]
        return [(version, type(part).__name__) for version, part in found if part is not None]


async def swap(client: httpx.AsyncClient, version: int) -> None:
    reloaded = await client.post("/admin/reload", headers=ADMINS)
    assert (reloaded.json()["index_version"], reloaded.json()["changed"]) == (version, True)


@pytest.mark.slow
async def test_swaps_under_load_drop_no_request_and_leak_no_memory(
    index: Path, gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)  # pytest would keep thousands of lines
    checkpoints = {1: tiny_checkpoint, 2: other_checkpoint, 3: tiny_checkpoint}
    for version in (2, 3):
        rebuild(gallery, checkpoints[version], index, workers=0, progress=False, force=True, keep=3)
    rollback(index, 1)
    kept, sizes = LiveParts(), []
    words = (f"a red square {number}" for number in itertools.count())  # never cached

    async with opened(index, poll_s=0, deadline_ms=60_000, **ADMIN_ONLY) as client:

        async def ask() -> tuple[int, list[dict[str, Any]]]:
            response = await client.post("/search/text", json={"query": "a red square", "k": 24})
            assert response.status_code == 200, response.text
            return response.json()["index_version"], response.json()["results"]

        expected = {tiny_checkpoint: (await ask())[1]}
        asked, done = 0, False

        async def same() -> None:
            while not done:
                version, results = await ask()
                assert results == expected.setdefault(checkpoints[version], results), "results of one version"
                await asyncio.sleep(0.01)  # leave the interpreter to the loading thread

        async def other(send: Any) -> None:
            nonlocal asked
            while not done:
                response = await send()
                assert response.status_code == 200, response.text
                assert response.json()["index_version"] in checkpoints
                asked += 1
                await asyncio.sleep(0.01)

        sent = [
            lambda: client.post("/search/text", json={"query": next(words)}),
            lambda: client.post("/search/text", json={"query": next(words), "explain": True, "k": 2}),
            lambda: client.post("/search/image", files={"file": png(size=(40 + asked % 50, 40))}),
            lambda: client.get("/items/circle%2Fred.png/similar"),
        ]
        load = [asyncio.create_task(same()) for _ in range(4)] + [asyncio.create_task(other(send)) for send in sent]
        for newer, older in [(2, 1), (3, 1)] * (SWAPS // 4):  # to a newer version, then back
            for version in (newer, older):
                rollback(index, version)
                await swap(client, version)
                kept.note(client)
            gc.collect()
            sizes.append(resident())
        done = True
        await asyncio.gather(*load)
        assert asked > SWAPS
        assert len(expected) == 2
        await sent[0]()  # the model's last work is for the replaced version
        await asyncio.to_thread(rollback, index, 2)
        await swap(client, 2)  # no search follows that would free memory
        kept.note(client)
        served = [(2, name) for name in ("DCAR", "Encoder", "IndexVersion")]
        for _ in range(50):  # threads of replaced versions may take a moment to end
            gc.unfreeze()  # what earlier modules left, and is garbage by now, may hold others
            gc.collect()
            if sorted(kept.alive()) == served:
                break
            await asyncio.sleep(0.1)
        assert sorted(kept.alive()) == served

    assert sizes[-1] - sizes[WARM // 2 - 1] < ROOM, sizes
