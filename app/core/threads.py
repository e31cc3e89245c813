"""Threads for work that would hold up the event loop."""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from app.core.logs import request_id
from app.core.rate_limit import current_caller

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NEWEST_WEIGHT = 0.05  # of the last call in the mean of their seconds,
_LONGEST_S = 1.0  # of which one that hung tells nothing
_NICE = 5


class ComputeThreads(ThreadPoolExecutor):
    """Threads of one kind of work, which give way to the event loop. `run` waits for a call in one of them."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name, _give_way)
        self._in_progress, self._mean_s = 0, 0.0

    async def run(self, call: Callable[..., T], *args: object) -> T:
        self._in_progress += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self, self._timed, call, args)
        finally:
            self._in_progress -= 1

    def _timed(self, call: Callable[..., T], args: tuple[object, ...]) -> T:
        started = time.perf_counter()
        try:
            return call(*args)
        finally:
            took = min(time.perf_counter() - started, _LONGEST_S)
            self._mean_s += _NEWEST_WEIGHT * (took - self._mean_s)

    def expected_wait(self) -> float:
        """Return the seconds after which all calls in progress will have ended, by the mean of the last ones."""
        return self._in_progress * self._mean_s / self._max_workers


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICE)


@dataclass(eq=False, slots=True)
class _Call:
    call: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)
    caller: str = field(default_factory=current_caller.get)
    request: str | None = field(default_factory=request_id.get)


class FairThread(ComputeThreads):
    """A thread whose next call is of the caller, and then of the request, that has had it for the least time.

    Times count until neither has a call in progress.
    """

    def __init__(self, name: str) -> None:
        super().__init__(1, name)
        self._waiting: list[_Call] = []
        self._spent: dict[tuple[str, str | None], float] = {}  # seconds of (caller, request), and of (caller, None)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        waiting = _Call(partial(call, *args))
        self._waiting.append(waiting)
        self.submit(self._run_next)
        result: T = await asyncio.wrap_future(waiting.done)
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        for waiting in self._waiting if cancel_futures else ():
            waiting.done.cancel()

    def _run_next(self) -> None:
        following = min(self._waiting, key=self._spent_by)
        self._waiting.remove(following)
        started = time.monotonic()
        if following.done.set_running_or_notify_cancel():
            try:
                following.done.set_result(following.call())
            except BaseException as error:
                following.done.set_exception(error)
        kept = {(each.caller, request) for each in (*self._waiting, following) for request in (each.request, None)}
        self._spent = {key: self._spent.get(key, 0.0) for key in kept}
        for request in (following.request, None):
            self._spent[following.caller, request] += time.monotonic() - started

    def _spent_by(self, waiting: _Call) -> tuple[float, float]:
        owners = (waiting.caller, None), (waiting.caller, waiting.request)
        return self._spent.get(owners[0], 0.0), self._spent.get(owners[1], 0.0)


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
