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
        each: turns of one caller at a time; all by default.
        may_start: a condition on a turn, whose item is what `run_item` is given.
        ahead: turns that begin before a thread is free, so that no thread waits for the event loop between two calls.
    """

    def __init__(
        self,
        count: int,
        name: str,
        each: int | None = None,
        may_start: Callable[[Turn], bool] = lambda _: True,
        ahead: int = 0,
    ) -> None:
        super().__init__(count, name)
        self.turns = FairTurns(count + ahead, each or count + ahead, may_start)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await self.run_item(None, call, *args)

    async def run_item(self, item: Any, call: Callable[..., T], *args: object) -> T:
        loop, turn = asyncio.get_running_loop(), await self.turns.begin(item)
        done: asyncio.Future[T] = loop.create_future()

        def finish(settle: Callable[[Any], None], outcome: Any) -> None:
            self.turns.end(turn)
            if not done.done():  # its caller has given up, which stops no call that has begun
                settle(outcome)

        def work() -> None:
            settled: tuple[Callable[[Any], None], Any]
            try:
                settled = done.set_result, call(*args)
            except BaseException as error:
                settled = done.set_exception, error
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish, *settled)

        self.submit(work)
        return await done


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
