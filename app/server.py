"""Run the service: `dcar serve` calls `serve`.

- A missing index or a taken port is reported in one line before the model is loaded.
- One process serves while it loads. Several are uvicorn's workers on one socket, each of which accepts connections once
  it has loaded. Before that a process of its own loads once, which makes what a first start makes, such as an export,
  and says once why the service cannot start.
- At a signal to stop, running requests are finished. A thread that does not finish, such as one that decodes an image,
  does not keep the process.
"""

import asyncio
import contextlib
import logging
import logging.config
import os
import resource
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from threadpoolctl import threadpool_limits
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from app.core.logs import log_config
from app.core.metrics import SHARED_FOLDER, Metrics, drop_dead_workers
from app.core.settings import Settings
from app.feedback.store import Store
from app.http.protocol import Connection
from app.main import create_app
from app.service.collections import Collections
from app.service.write_worker import require_writable
from dcar_core.util.errors import DcarError
from dcar_core.util.machine import available_cores
from dcar_core.util.processes import in_own_process
from index_jobs.index.storage import store_of
from index_jobs.index.versions import require_index

logger = logging.getLogger(__name__)

FINISH_S = 10  # for pending requests at shutdown
_THREADS_S = 3  # for threads at shutdown
_ANSWER_S = 30  # for a worker to import the application and say that it lives
_SWITCH_S = 0.001  # beside two busy threads of Python code the event loop gets twice as many turns as by default


def serve(settings: Settings) -> None:
    """Run until interrupted. Raise DcarError if the service cannot start: no index, a taken port, a broken model.

    With logs in JSON, the error is logged, and SystemExit raised instead.
    """
    _configure_logs(settings)
    try:
        for index in settings.indexes.values():
            if store_of(index) is None:  # the first load reports a store's
                require_index(index)
        require_writable(settings)
        if settings.feedback_folder is not None:
            Store(settings.feedback_folder).close()
        with listen(settings.host, settings.port) as listener:
            logger.info("listening on %s", base_url(*listener.getsockname()[:2]))
            (_run if settings.workers == 1 else _run_workers)(settings, listener)
    except Exception as error:
        if settings.log_format != "json":
            raise
        logger.critical("%s", error, exc_info=not isinstance(error, DcarError))
        raise SystemExit(getattr(error, "exit_code", 1)) from None


def _run(settings: Settings, listener: socket.socket) -> None:
    failures: list[DcarError] = []

    def fail(error: DcarError) -> None:
        failures.append(error)
        server.should_exit = True

    server = uvicorn.Server(server_config(_start(settings, fail)))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again after a clean shutdown
        logger.info("stopped")
        timer = threading.Timer(_THREADS_S, os._exit, [0])  # a thread at work, such as a decoder's, may take longer
        timer.daemon = True
        timer.start()
    if failures:
        raise failures[0]


def _run_workers(settings: Settings, listener: socket.socket) -> None:
    threads = settings.threads or max(1, available_cores() // settings.workers)
    settings = settings.model_copy(update={"threads": threads})
    config = server_config(partial(_start, settings), factory=True, workers=settings.workers)
    with tempfile.TemporaryDirectory(prefix="dcar-metrics-") as folder:
        os.environ[SHARED_FOLDER] = folder
        supervisor = Multiprocess(config, [listener])
        try:
            in_own_process(_load_once, settings)
        except BrokenProcessPool:
            raise DcarError("the process that loads the index ended; the log may have the reason") from None
        supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        raise DcarError("a worker could not start; the log has the reason")


def _load_once(settings: Settings) -> None:
    _configure_logs(settings)

    async def load() -> None:
        collections = Collections(settings, Metrics(), on_start_failure=lambda _: None)  # it is raised as well
        try:
            for name in settings.indexes:
                await collections[name].reload()
        finally:
            await collections.close()

    asyncio.run(load())


def _start(settings: Settings, on_start_failure: Callable[[DcarError], None] | None = None) -> FastAPI:
    """Prepare this process, which may be one of several workers, and return the application."""
    _configure_logs(settings)
    drop_dead_workers()
    threading.excepthook = _log_thread
    threadpool_limits(1, "blas")  # products are small here; beside a busy model two threads take longer than one
    with contextlib.suppress(ValueError, OSError):  # the usual 1,024 open files are few for connections
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    sys.setswitchinterval(_SWITCH_S)
    return create_app(settings, on_start_failure=on_start_failure)


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application, or for a function that makes it."""
    return uvicorn.Config(
        app, http=Connection, ws="none", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=FINISH_S, timeout_worker_healthcheck=_ANSWER_S, **options,
    )  # fmt: skip


def _configure_logs(settings: Settings) -> None:
    logging.config.dictConfig(log_config(settings.log_level, settings.log_format))
    logging.captureWarnings(True)


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        logger.error("unexpected error in a thread", exc_info=failed.exc_value)


def base_url(host: str, port: int) -> str:
    """Return the URL of a service at an address; one of IPv6 stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise DcarError if the address or the port is not available."""
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=is_ipv6)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise DcarError(
            f"cannot listen on port {port} of {host}: {reason}; choose others with --port and --host"
        ) from None
