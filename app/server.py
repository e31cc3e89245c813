"""Run the service: `dcar serve` calls `serve`.

- A missing index or a taken port is reported in one line before the model is loaded.
- One process serves while it loads. Several are uvicorn's workers on one socket, each
  of which accepts connections once it has loaded. Before that a process of its own
  loads once, which makes what a first start makes, such as an export, and says once why
  the service cannot start.
- At a signal to stop, running requests are finished.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.json import JsonFormatter
from threadpoolctl import threadpool_limits
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from app.core.callers import request_id
from app.core.metrics import SHARED_FOLDER, Metrics
from app.core.settings import Settings
from app.feedback.log import Store
from app.main import create_app
from app.service.collections import Collections
from app.service.write_worker import require_writable
from dcar_core.util.errors import DcarError
from dcar_core.util.machine import available_cores
from dcar_core.util.processes import in_own_process
from index_jobs.index.stores import store_of
from index_jobs.index.versions import require_index

logger = logging.getLogger(__name__)

FINISH_S = 10  # for pending requests at shutdown


def serve(settings: Settings) -> None:
    """Run until interrupted. Raise DcarError if the service cannot start: no index, a
    taken port, a broken model.
    """
    _configure_logs(settings)
    for index in settings.indexes.values():
        if store_of(index) is None:  # the first load reports a store's
            require_index(index)
    require_writable(settings)
    if settings.feedback_folder is not None:
        Store(settings.feedback_folder).close()
    with listen(settings.host, settings.port) as listener:
        logger.info("listening on %s", base_url(*listener.getsockname()[:2]))
        (_run if settings.workers == 1 else _run_workers)(settings, listener)


def _run(settings: Settings, listener: socket.socket) -> None:
    failures: list[DcarError] = []

    def fail(error: DcarError) -> None:
        failures.append(error)
        server.should_exit = True

    server = uvicorn.Server(server_config(_start(settings, fail)))
    # uvicorn raises it again after a clean shutdown
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def _run_workers(settings: Settings, listener: socket.socket) -> None:
    threads = settings.threads or max(1, available_cores() // settings.workers)
    settings = settings.model_copy(update={"threads": threads})
    config = server_config(
        partial(_start, settings),
        factory=True,
        workers=settings.workers,
    )
    with tempfile.TemporaryDirectory(prefix="dcar-metrics-") as folder:
        os.environ[SHARED_FOLDER] = folder
        supervisor = _Supervisor(config, [listener])
        in_own_process(_load_once, settings)
        supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        raise DcarError("a worker could not start; the log has the reason")


class _Supervisor(Multiprocess):
    """uvicorn's supervisor, which would wait 30 s for a killed worker while it holds
    the worker's end of the pipe.
    """

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            process.child_conn.close()
        super().keep_subprocess_alive()


def _load_once(settings: Settings) -> None:
    _configure_logs(settings)

    async def load() -> None:
        # it is raised as well
        collections = Collections(settings, Metrics(), on_start_failure=lambda _: None)
        for name in settings.indexes:
            await collections[name].reload()

    asyncio.run(load())


def _start(
    settings: Settings, on_start_failure: Callable[[DcarError], None] | None = None
) -> FastAPI:
    """Prepare this process, which may be one of several workers, and return the
    application.
    """
    _configure_logs(settings)
    # products are small here; beside a busy model two threads take longer than one
    threadpool_limits(1, "blas")
    # beside two busy threads the event loop gets twice as many turns as by default
    sys.setswitchinterval(0.001)
    return create_app(settings, on_start_failure=on_start_failure)


class _Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection, which ends if a request offers an upgrade.

    The parser would take the body behind the offer for the next request.
    """

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("The service offers no upgrade.")
            self.transport.close()
            raise ConnectionError("an offer to upgrade")  # the parser reads no further
        super().on_headers_complete()


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application, or for a function that makes
    it.
    """
    return uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=FINISH_S,
        timeout_worker_healthcheck=30,
        **options,
    )


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


def _configure_logs(settings: Settings) -> None:
    """Log to stderr, as lines or JSON objects with the request's id. No line has the
    text of a query or a key.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    line = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
    names = {"asctime": "time", "levelname": "level", "name": "logger"}
    handler.setFormatter(
        JsonFormatter(line, "%Y-%m-%dT%H:%M:%S%z", rename_fields=names)
        if settings.log_format == "json"
        else logging.Formatter(line, "%F %T")
    )
    # libraries log much while they load
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    levels = dict.fromkeys(
        ("app", "dcar_core", "index_jobs"), settings.log_level.upper()
    )
    levels |= {"py.warnings": "ERROR", "python_multipart": "ERROR"}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def base_url(host: str, port: int) -> str:
    """Return the URL of a service at an address; one of IPv6 stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise DcarError if the address or the port is not
    available.
    """
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        return socket.create_server(
            (host, port),
            family=family,
            backlog=1024,
            dualstack_ipv6=is_ipv6,
        )
    except OSError as error:
        raise DcarError(
            f"cannot listen on port {port} of {host}: {error.strerror}; choose others"
            " with --port and --host"
        ) from None
