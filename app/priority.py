"""Which threads wait for their turn where all cores are busy: the event loop's, not those that compute."""

import contextlib
import os


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
