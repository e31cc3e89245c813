"""Calls in processes of their own, and locks between processes.

Processes are forked from a server process without threads, because a fork of this
process would break the threads that torch and faiss have started. Where the system has
no such server, each process starts from scratch.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from dcar_core.util.errors import LockedError

P = ParamSpec("P")
R = TypeVar("R")


def in_own_process(
    function: Callable[P, R],
    *arguments: P.args,
    **options: P.kwargs,
) -> R:
    """Return the result of a function, called in a process of its own. Raise
    BrokenProcessPool if that died.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
    else:
        method = "spawn"
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context(method)
    ) as process:
        return process.submit(function, *arguments, **options).result()


@contextmanager
def hold_lock(file: Path, message: str, wait_s: float = 0) -> Iterator[None]:
    """Lock a file, until the process ends at the latest. Raise LockedError if another
    one has it locked for so long.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(file, timeout=wait_s))
        except Timeout:
            raise LockedError(message) from None
        yield
