"""Threads for work that would hold up the event loop."""

import asyncio
import logging
import os
import sys
import threading
import time
from collections import Counter
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

    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self, partial(call, *args))


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICE)


@dataclass(eq=False, slots=True)
class _Call:
    call: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)
    caller: str = field(default_factory=current_caller.get)
    request: str | None = field(default_factory=request_id.get)


class FairThreads(ComputeThreads):
    """Threads whose next call is of the caller, and then of the request, that has had them for the least time.

    Times count until neither has a call in progress.
    """

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        self._lock = threading.Lock()  # of what follows
        self._waiting: list[_Call] = []
        self._running: list[_Call] = []
        self._spent: dict[tuple[str, str | None], float] = {}  # seconds of (caller, request), and of (caller, None)
        self._mean_s = 0.0  # of the last calls

    async def run(self, call: Callable[..., T], *args: object) -> T:
        waiting = _Call(partial(call, *args))
        with self._lock:
            self._waiting.append(waiting)
        self.submit(self._run_next)
        result: T = await asyncio.wrap_future(waiting.done)
        return result

    def expected_wait(self) -> float:
        """Return the seconds after which the calls will have ended that have their turn before this caller's next."""
        with self._lock:
            counts = Counter(each.caller for each in (*self._waiting, *self._running) if not each.done.cancelled())
        own = counts.pop(current_caller.get(), 0)
        before = own + sum(min(count, own + 1) for count in counts.values())
        return before * self._mean_s / self._max_workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        for waiting in self._waiting if cancel_futures else ():
            waiting.done.cancel()

    def _run_next(self) -> None:
        with self._lock:
            following = min(self._waiting, key=self._spent_by) if len(self._waiting) > 1 else self._waiting[0]
            self._waiting.remove(following)
            self._running.append(following)
        started, finish = time.monotonic(), None
        if following.done.set_running_or_notify_cancel():
            try:
                finish = partial(following.done.set_result, following.call())
            except BaseException as error:
                finish = partial(following.done.set_exception, error)
        took = time.monotonic() - started
        with self._lock:
            self._end(following, took)
            if finish is not None:
                self._mean_s += _NEWEST_WEIGHT * (min(took, _LONGEST_S) - self._mean_s)
        if finish is not None:
            finish()

    def _end(self, ended: _Call, took: float) -> None:
        self._running.remove(ended)
        own = [each for each in (*self._waiting, *self._running) if each.caller == ended.caller]
        for request, is_left in (
            (ended.request, any(each.request == ended.request for each in own)),
            (None, bool(own)),
        ):
            spent = self._spent.pop((ended.caller, request), 0.0)
            if is_left:
                self._spent[ended.caller, request] = spent + took

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
