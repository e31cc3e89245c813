"""Calls in processes of their own.

Processes are forked from a server process, which has no threads; torch and faiss have started some here. Where the
system has no such server, each process starts anew.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def process_context() -> BaseContext:
    """Return the context in which processes are started."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return multiprocessing.get_context(method)


def in_own_process(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Return the result of a function, called in a process of its own. Raise BrokenProcessPool if that died."""
    with ProcessPoolExecutor(1, mp_context=process_context()) as process:
        return process.submit(function, *arguments, **options).result()
