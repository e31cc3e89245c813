"""Swaps under load: no request fails, each response is from one version, and old versions are freed."""

import asyncio
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest

from index_jobs.index.versions import rollback
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.service import ADMIN_ONLY, opened
from tests.support.writes import ADMINS


@pytest.mark.slow
async def test_swaps_under_load_drop_no_request_and_free_what_they_replace(
    index: Path, gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path
) -> None:
    checkpoints = {1: tiny_checkpoint, 2: other_checkpoint, 3: tiny_checkpoint}
    for version in (2, 3):
        rebuild(gallery, checkpoints[version], index, workers=0, progress=False, force=True, keep=3)
    rollback(index, 1)
    sizes = itertools.cycle(range(40, 90))
    words = (f"a red square {number}" for number in itertools.count())  # never cached
    seen, expected, asked, done = list[tuple[int, weakref.ref[Any]]](), dict[Path, Any](), 0, False

    async with opened(index, poll_s=0, deadline_ms=60_000, **ADMIN_ONLY) as client:

        async def ask(number: int) -> None:
            nonlocal asked
            search = "/search/text"
            while not done:
                sent = [
                    lambda: client.post(search, json={"query": "a red square", "k": 24}),
                    lambda: client.post(search, json={"query": next(words)}),
                    lambda: client.post(search, json={"query": next(words), "explain": True, "k": 2}),
                    lambda: client.post("/search/image", files={"file": png(size=(next(sizes), 40))}),
                    lambda: client.get("/items/circle%2Fred.png/similar"),
                ]
                response = await sent[number]()
                assert response.status_code == 200, response.text
                checkpoint, results = checkpoints[response.json()["index_version"]], response.json()["results"]
                assert number or results == expected.setdefault(checkpoint, results), "results of one version"
                asked += 1
                await asyncio.sleep(0.01)  # leave the interpreter to the loading thread

        async def swap(version: int) -> None:
            await asyncio.to_thread(rollback, index, version)
            reloaded = (await client.post("/admin/reload", headers=ADMINS)).json()
            assert (reloaded["index_version"], reloaded["changed"]) == (version, True)
            live = client.app.state.collections[None].live
            seen.extend((version, weakref.ref(part)) for part in (live.encoder, live.encoder.model, live.artifact))

        load = [asyncio.create_task(ask(number)) for number in (0, 0, 0, 0, 1, 2, 3, 4)]
        for version in [2, 1, 3, 1] * 3:
            await swap(version)
        done = True
        await asyncio.gather(*load)
        assert asked > 12
        assert len(expected) == 2
        assert (await client.post("/search/text", json={"query": next(words)})).is_success  # of the replaced version
        await swap(2)  # no search follows that would free memory
        for _ in range(50):  # threads of replaced versions may take a moment to end
            gc.unfreeze()  # what earlier modules left, and is garbage by now, may hold others
            gc.collect()
            alive = {(version, type(part).__name__) for version, each in seen if (part := each()) is not None}
            if len(alive) == 3:
                break
            await asyncio.sleep(0.1)
        assert alive == {(2, name) for name in ("DCAR", "Encoder", "IndexVersion")}
