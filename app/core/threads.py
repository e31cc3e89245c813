"""Threads for work that would hold up the event loop."""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from app.core.fair_queue import FairQueue

logger = logging.getLogger(__name__)

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
    """Threads whose next call is that of the caller, and then of the request, that has had them for the least time."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        self._queue = FairQueue()

    async def run(self, call: Callable[..., T], *args: object) -> T:
        done = Future[T]()
        self._queue.put(partial(call, *args), done)
        self.submit(self._run_next)
        return await asyncio.wrap_future(done)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        for turn in [*self._queue.waiting] if cancel_futures else ():
            turn.future.cancel()

    def _run_next(self) -> None:
        turn, finish = self._queue.take(), None
        if turn is None:  # its caller has given up
            return
        done: Future[Any] = turn.future
        if done.set_running_or_notify_cancel():
            try:
                finish = partial(done.set_result, turn.item())
            except BaseException as error:
                finish = partial(done.set_exception, error)
        self._queue.end(turn)
        if finish is not None:
            finish()


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


def end_without_threads(wait_s: float) -> None:
    """End the process in `wait_s` seconds if a thread of the service, such as one that decodes an image, still runs.

    Python itself would wait for it, however long it takes.
    """
    running = [thread for thread in threading.enumerate() if thread.name.startswith("dcar-") and not thread.daemon]

    def end() -> None:
        left = [thread.name for thread in running if thread.is_alive()]
        if left:
            logger.warning("ending without the thread %s, which is still at work", left[0])
            os._exit(0)

    if running:
        timer = threading.Timer(wait_s, end)
        timer.daemon = True
        timer.start()
