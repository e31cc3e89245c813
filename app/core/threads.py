"""Scheduling of threads on shared cores.

- On Linux a woken thread usually takes its core from the running one. Each arriving request would then interrupt the
  model, which loses its cache contents and keeps its other threads waiting. With DCAR_BATCH_SCHEDULING the event loop's
  thread uses SCHED_BATCH: it waits for its turn, a few milliseconds at most.
- New threads inherit the policy, so threads that compute reset it: pass `use_default_scheduling` as initializer.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def run_in_new_thread(call: Callable[..., T], *args: object) -> T:
    """Run a call as `asyncio.to_thread` does, in a thread that ends with it. Cancelling the caller does not stop it.

    Use it for rare heavy work, such as loading a model: OpenMP keeps workers for each thread that ever computed, and
    idle workers slowed PyTorch by a fifth.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="dcar-once", initializer=use_default_scheduling)
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, call, *args)
    finally:
        executor.shutdown(wait=False)


def use_batch_scheduling() -> None:
    """Let this thread wait for a core instead of interrupting another thread. Does nothing outside Linux."""
    _set_policy("SCHED_BATCH")


def use_default_scheduling() -> None:
    """Reset the policy of this thread, which it inherited from the thread that started it."""
    _set_policy("SCHED_OTHER")


def _set_policy(name: str) -> None:
    if hasattr(os, name):
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))
