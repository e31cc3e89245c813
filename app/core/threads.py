"""Scheduling of threads on shared cores.

- On Linux a woken thread usually takes its core from the running one. Each arriving request would then interrupt the
  model, which loses its cache contents and keeps its other threads waiting. With DCAR_BATCH_SCHEDULING the event loop's
  thread uses SCHED_BATCH: it waits for its turn, a few milliseconds at most.
- New threads inherit the policy, so threads that compute reset it: see `ComputeThreads`.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class ComputeThreads(ThreadPoolExecutor):
    """Threads that compute, with the default policy. `run` waits for a call in one of them."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name, lambda: _set_policy("SCHED_OTHER"))

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


def use_batch_scheduling() -> None:
    """Let this thread wait for a core instead of interrupting another thread. Does nothing outside Linux."""
    _set_policy("SCHED_BATCH")


def _set_policy(name: str) -> None:
    if hasattr(os, name):
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))
