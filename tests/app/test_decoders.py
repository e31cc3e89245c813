"""Decoding is shared out between callers by time, and large images by memory."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from app.core.decoders import Decoders
from app.core.logs import request_id
from app.core.rate_limit import current_caller
from dcar_core.images import ALL_FORMATS, MAX_PIXELS, sniff_format
from dcar_core.images.decoding import make_thumbnail
from dcar_core.images.workers import Convert, DecodeWorker
from dcar_core.util.errors import ImageError
from tests.support import conversions
from tests.support.images import encoded, png
from tests.support.paths import ROOT


@pytest.fixture
async def decoders(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Decoders]:
    monkeypatch.setattr("app.core.decoders.available_cores", lambda: 2)
    decoders = Decoders(MAX_PIXELS)
    yield decoders
    decoders.close()


class Callers:
    """Sends images for callers and lists them in the order of their ends."""

    def __init__(self, decoders: Decoders) -> None:
        self.decoders, self.ended = decoders, list[str]()

    def send(self, who: str, request: str, tenths: int = 1, convert: Convert = conversions.sleep) -> Awaitable[None]:
        async def run() -> None:
            current_caller.set(who)
            request_id.set(request)
            data = encoded(Image.new("L", (tenths, 1)))
            try:
                await self.decoders.run(convert, data, MAX_PIXELS, ALL_FORMATS)
            finally:
                self.ended.append(request)

        return asyncio.create_task(run())


async def test_one_caller_leaves_workers_to_the_others(decoders: Decoders) -> None:
    callers = Callers(decoders)
    flood = [callers.send("flood", f"flood {number}", 30) for number in range(20)]
    await asyncio.sleep(0)
    assert len(decoders._running) == 2
    await callers.send("honest", "honest")
    assert callers.ended == ["honest"], "at once, though 18 images wait"
    for task in flood:
        task.cancel()  # type: ignore[attr-defined]


async def test_the_request_that_took_least_is_next(decoders: Decoders) -> None:
    """Of one address, too: a single upload does not wait for the rest of a batch of images."""
    callers = Callers(decoders)
    batch = [callers.send("same", "batch") for _ in range(8)]
    while not callers.ended:
        await asyncio.sleep(0.01)
    ended = len(callers.ended)
    await callers.send("same", "upload")
    assert callers.ended.count("batch") <= ended + 3, "those that ran, and one beside the upload"
    await asyncio.gather(*batch)
    assert decoders._spent.keys() <= {("same", "batch"), ("same", None)}, "nothing is kept of those that have ended"


async def test_expected_wait_is_that_of_the_next_request_of_a_caller(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(decoders)

    def wait_of(who: str) -> float:
        current_caller.set(who)
        return decoders.expected_wait()

    await asyncio.gather(*(callers.send("one", f"{number}") for number in range(8)))
    assert wait_of("one") == 0
    mean = decoders._mean_s["one"]
    assert 0.04 < mean < 0.6, "each takes a tenth of a second, and those before the first took none"
    batch = [callers.send("one", "batch") for _ in range(20)]
    tasks = [callers.send("one", f"{number}") for number in range(6)]
    await asyncio.sleep(0)
    assert wait_of("one") == 0, "seven requests"
    tasks += [callers.send("one", f"last {number}") for number in range(13)]
    await asyncio.sleep(0)
    assert wait_of("one") == 20 * mean / 2, "a batch has its next turn after the others"
    assert wait_of("two") == 0
    monkeypatch.setattr("app.core.decoders._MEANS", 1)
    await callers.send("two", "first")
    assert [*decoders._mean_s] == ["two"]
    for task in (*batch, *tasks):
        task.cancel()  # type: ignore[attr-defined]


async def test_an_image_that_is_given_up_is_not_decoded(decoders: Decoders) -> None:
    callers = Callers(decoders)
    tasks = [callers.send("one", str(number), 3) for number in range(4)]
    await asyncio.sleep(0)
    tasks[2].cancel()  # type: ignore[attr-defined]
    tasks[0].cancel()  # type: ignore[attr-defined]
    await asyncio.gather(tasks[1], tasks[3])
    assert not decoders._waiting
    while decoders._running:
        await asyncio.sleep(0.01)
    assert len(decoders._idle) == 4


async def test_large_images_take_turns(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.decoders._MEMORY", 10)
    found = list[int]()
    run = DecodeWorker.run

    def watched(self: DecodeWorker, *args: object) -> object:
        found.append(sum(turn.is_large for turn in decoders._running))
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeWorker, "run", watched)
    callers = Callers(decoders)
    names = ["one", "one", "one", "two", "three"]
    monkeypatch.setattr("app.core.decoders._MEMORY", 1)
    await asyncio.gather(*(callers.send(name, f"{name} {number}", 2) for number, name in enumerate(names)))
    assert max(found) == 2
    assert len(callers.ended) == len(names)


async def test_an_image_beyond_the_memory_of_the_largest_is_refused(decoders: Decoders) -> None:
    callers = Callers(decoders)
    with pytest.raises(ImageError, match="more than 96 MiB"):
        await callers.send("one", "fill", 1, conversions.fill)


def peak_mib(decoders: Decoders) -> float:
    """Return the highest resident memory of a decoding process so far."""
    started = [worker.process.pid for worker in decoders._workers if worker.process is not None]
    peaks = [Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0] for pid in started]
    return max(map(int, peaks)) / 2**10


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds memory in /proc")
async def test_a_thumbnail_of_62_megapixels_takes_no_more_memory_than_documented(decoders: Decoders) -> None:
    found = re.search(r"large ones, two at a time, (\d+) MiB", (ROOT / "docs/how-to/secure.md").read_text())
    assert found is not None
    make = partial(make_thumbnail, side=192, thumbnail_format="webp")
    data = encoded(Image.new("RGB", (7_874, 7_874), "red"), "PNG", compress_level=1)
    await decoders.run(make, png(), MAX_PIXELS, ALL_FORMATS)
    before = peak_mib(decoders)
    assert sniff_format(await decoders.run(make, data, MAX_PIXELS, ALL_FORMATS)) == "webp"
    assert 150 < peak_mib(decoders) - before < int(found[1])
