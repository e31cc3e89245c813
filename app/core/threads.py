"""Threads for work that would hold up the event loop."""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ComputeThreads(ThreadPoolExecutor):
    """Threads of one kind of work. `run` waits for a call in one of them."""

    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self, call, *args)


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


class SharedCall(Generic[T]):
    """A call that may hang, such as a read of a network disk. Concurrent callers share one run in one thread.

    Attributes:
        wait_s: longest wait for a result.
        fresh_s: seconds after the start of a run during which its result is returned again.
        known_s: age up to which the last result stands in for a run that takes longer than `wait_s`.
    """

    wait_s, fresh_s, known_s = 1.0, 5.0, 60.0

    def __init__(self, call: Callable[[], T], otherwise: T) -> None:
        """Prepare the call. `otherwise` is returned while there is no result of that age."""
        self._call, self._otherwise = call, otherwise
        self._known = (-math.inf, otherwise)  # time and result of the last complete run
        self._started = -math.inf
        self._run: Future[T] | None = None

    async def result(self) -> T:
        """Return the result of the call, or raise its error."""
        if self._run is None or (self._run.done() and time.monotonic() - self._started > self.fresh_s):
            self._started, self._run = time.monotonic(), Future()
            self._run.set_running_or_notify_cancel()  # a caller that gives up cancels nothing
            threading.Thread(target=self._work, args=[self._run], name="dcar-shared", daemon=True).start()
        try:
            async with asyncio.timeout(self.wait_s):
                return await asyncio.wrap_future(self._run)
        except TimeoutError:
            ended, result = self._known
            return result if time.monotonic() - ended <= self.known_s else self._otherwise

    def _work(self, run: Future[T]) -> None:
        try:
            result = self._call()
        except Exception as error:
            run.set_exception(error)
        else:
            self._known = (time.monotonic(), result)
            run.set_result(result)
