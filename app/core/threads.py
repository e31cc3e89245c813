"""Threads for work that would hold up the event loop."""

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from app.core.fair_queue import FairTurns, Turn

T = TypeVar("T")

_NICE = 5


class ComputeThreads(ThreadPoolExecutor):
    """Threads of one kind of work, which give way to the event loop. `run` waits for a call in one of them."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name, _give_way)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self, partial(call, *args))


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICE)


class FairThreads(ComputeThreads):
    """Threads that callers, and then their requests, use in turns; `turns` has those that wait and those at work.

    Args:
        each: threads of one caller at a time; all by default.
        may_start: a condition on a turn, whose item is what `run_item` is given.
    """

    def __init__(
        self, count: int, name: str, each: int | None = None, may_start: Callable[[Turn], bool] = lambda _: True
    ) -> None:
        super().__init__(count, name)
        self.turns = FairTurns(count, each or count, may_start)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await self.run_item(None, call, *args)

    async def run_item(self, item: Any, call: Callable[..., T], *args: object) -> T:
        loop, turn = asyncio.get_running_loop(), await self.turns.begin(item)

        def end(_: object) -> None:  # a caller that gives up stops no call that has begun
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.turns.end, turn)

        work = self.submit(call, *args)
        work.add_done_callback(end)
        return await asyncio.wrap_future(work)


async def run_in_new_thread(call: Callable[..., T], *args: object) -> T:
    """Run a call as `asyncio.to_thread` does, in a thread that ends with it. Cancelling the caller does not stop it.

    Use it for rare heavy work, such as loading a model: OpenMP keeps workers for each thread that ever computed, and
    idle workers slowed PyTorch by a fifth.
    """
    thread = ComputeThreads(1, "dcar-once")
    try:
        return await thread.run(call, *args)
    finally:
        thread.shutdown(wait=False)
