"""How the threads of the service share its cores.

- The event loop's waits for its turn where all cores are busy, those that compute do not.
- What computes now and then, such as loading a model, has a thread that ends with it. OpenMP keeps workers for every
  thread that ever computed; once they are more than the cores, none of them waits awake for its next part any more, and
  PyTorch took a fifth longer for a text.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def in_own_thread(call: Callable[..., T], *args: object) -> T:
    """As `asyncio.to_thread`, in a thread that ends afterwards. A caller that is cancelled leaves it to its end."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="dcar-once", initializer=compute)
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, call, *args)
    finally:
        thread.shutdown(wait=False)


def give_way() -> None:
    """Let this thread, the event loop's, wait for its turn, some milliseconds at most.

    As Linux has it by default, each arrival takes the core from the model at once. That costs the model what it had in
    the core's caches, many times what reading a request takes; and one of its threads that was interrupted keeps the
    others waiting. Where a core is idle nothing is different.
    """
    _become("SCHED_BATCH")


def compute() -> None:
    """Be scheduled as threads are by default: a new thread takes after the one that starts it, which may give way."""
    _become("SCHED_OTHER")


def _become(policy: str) -> None:
    if hasattr(os, policy):
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
