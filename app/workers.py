"""Several worker processes behind one socket, and the process that supervises them: `dcar serve --workers N`.

- The first worker starts alone: what a first start makes, such as an export, is made once, and a service that cannot
  start says so once.
- All workers accept from the socket. The supervisor keeps it open, so connections that nobody has accepted yet survive
  the end of a worker, which is replaced.
- A signal to stop goes to every worker, which finishes its requests. Workers also end when their supervisor is gone.
- Metrics are files of one folder, which the worker that is asked for them adds up. The supervisor counts the workers
  that end.
"""

import logging
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from socket import socket
from threading import Thread
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from app.core.metrics import Metrics, share_metrics
from app.core.settings import Settings
from dcar_core.util.errors import DcarError
from dcar_core.util.processes import process_context

logger = logging.getLogger(__name__)

_LEAST_S = 10.0  # between two starts of a worker, so that one that cannot run does not take a core
_LOOK_S = 0.5


def supervise(count: int, work: Callable[..., None], settings: Settings, listener: socket) -> None:
    """Run `work(settings, listener, folder, on_ready)` in `count` processes until a signal to stop.

    Args:
        work: a function of a module. It gets the folder of metrics, and calls `on_ready` once it serves.
        listener: is closed at the signal, so nobody waits for a connection that no worker accepts.

    Raises:
        DcarError: the first worker cannot start.
    """
    with tempfile.TemporaryDirectory(prefix="dcar-metrics-") as folder:
        workers = _Workers(work, settings, listener, folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, workers.stop)
        workers.run(count)


class _Workers:
    def __init__(self, work: Callable[..., None], settings: Settings, listener: socket, folder: str) -> None:
        self._context = process_context()
        self._work, self._settings, self._listener, self._folder = work, settings, listener, folder
        self._running: list[tuple[Any, float]] = []  # processes, and when they were started
        share_metrics(folder)
        self._failures = Metrics().task_failures.labels("worker")
        self._is_stopping = False

    def run(self, count: int) -> None:
        try:
            self._run(count)
        finally:
            self._listener.close()
            for process, _ in self._running:
                process.terminate()
            for process, _ in self._running:
                process.join()

    def stop(self, *given: object) -> None:
        if not self._is_stopping:
            logger.info("received a signal: stopping %d workers", len(self._running))
        self._is_stopping = True
        for process, _ in self._running:
            process.terminate()  # a second signal ends a drain

    def _run(self, count: int) -> None:
        failure: DcarError | None
        first = self._start()
        try:
            failure = first.recv()
        except EOFError:
            failure = DcarError("the first worker ended before it was ready; the log may have the reason")
        if failure is not None and not self._is_stopping:
            raise failure
        while not self._is_stopping:
            if len(self._running) < count:
                self._start()
                continue
            wait([process.sentinel for process, _ in self._running if process.is_alive()], _LOOK_S)
            for ended in [each for each in self._running if not each[0].is_alive()]:
                if time.monotonic() - ended[1] >= _LEAST_S and not self._is_stopping:
                    logger.warning("a worker ended with status %s: starting another", ended[0].exitcode)
                    self._failures.inc()
                    mark_process_dead(ended[0].pid, self._folder)  # type: ignore[no-untyped-call]
                    self._running.remove(ended)

    def _start(self) -> Connection:
        receiver: Connection
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(sender, self._work, self._settings, self._listener, self._folder)
        )
        process.start()
        sender.close()
        self._running.append((process, time.monotonic()))
        if self._is_stopping:
            process.terminate()
        return receiver


def _work(sender: Connection, work: Callable[..., None], *arguments: Any) -> None:
    """Run a worker: in its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_supervisor, daemon=True).start()

    def tell(failure: DcarError | None) -> None:
        with suppress(OSError):  # nobody waits for it
            sender.send(failure)

    try:
        work(*arguments, partial(tell, None))
    except DcarError as error:
        logger.info("a worker cannot start: %s", error)
        tell(error)
        raise SystemExit(error.exit_code) from None


def _end_with_supervisor() -> None:
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    supervisor.join()
    os.kill(os.getpid(), signal.SIGTERM)
