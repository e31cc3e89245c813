"""Run the service: `dcar serve` calls `serve`.

- A missing index or a taken port is reported in one line before the model is loaded.
- With DCAR_WORKERS, several processes accept connections of one socket: see `app.workers`. Each accepts the first one
  once it can search.
- Shutdown: for `drain_s` the service responds but is not ready; then it refuses connections and finishes its requests.
  A thread that does not finish, such as one that decodes an image, does not keep the process.
"""

import asyncio
import contextlib
import gc
import logging
import logging.config
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from threadpoolctl import threadpool_limits

from app.core.logs import log_config
from app.core.metrics import Metrics, share_metrics, start_tracing
from app.core.settings import Settings
from app.core.threads import end_without_threads
from app.feedback.store import prepare
from app.main import create_app
from app.middleware.http_protocol import BoundedProtocol, track_requests
from app.service.collections import Collections
from app.service.write_worker import require_writable
from app.workers import supervise
from dcar_core.util.errors import DcarError
from dcar_core.util.machine import available_cores
from index_jobs.index.location import store_of
from index_jobs.index.versions import require_index

logger = logging.getLogger(__name__)

_FINISH_S = 10  # for pending requests at shutdown
_IDLE_S = 60  # of connections; `BoundedProtocol` ends them earlier
_THREADS_S = 3  # for threads, after that
_LISTENERS = 16  # uvloop accepts one connection of each in a turn of the event loop
_SWITCH_S = 0.001  # beside two busy threads of Python code the event loop gets twice as many turns as by default


def serve(settings: Settings) -> None:
    """Run until interrupted. Raise DcarError if the service cannot start: no index, a taken port, a broken model.

    With logs in JSON, the error is logged, and SystemExit raised instead.
    """
    _configure_logs(settings)
    with _as_json(settings):
        _serve(settings)


def _serve(settings: Settings) -> None:
    for index in settings.indexes.values():
        if store_of(index) is None:  # the first load reports a store's
            require_index(index)
    require_writable(settings)
    if settings.feedback_folder is not None:
        prepare(settings.feedback_folder)
    with listen(settings.host, settings.port) as listener:
        logger.info("listening on %s", base_url(*listener.getsockname()[:2]))
        if settings.workers == 1:
            _run(settings, listener)
        else:
            threads = settings.threads or max(1, available_cores() // settings.workers)
            supervise(settings.workers, _work, settings.model_copy(update={"threads": threads}), listener)


def _work(settings: Settings, listener: socket.socket, folder: str, on_ready: Callable[[], None]) -> None:
    """Run one of several workers, in a process of its own."""
    _configure_logs(settings)
    share_metrics(folder)
    with listener, _as_json(settings, passes=DcarError):  # the supervisor gets it
        _run(settings, listener, on_ready)


def _configure_logs(settings: Settings) -> None:
    logging.config.dictConfig(log_config(settings.log_level, settings.log_format))
    logging.captureWarnings(True)


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        logger.error("unexpected error in a thread", exc_info=failed.exc_value)


@contextlib.contextmanager
def _as_json(settings: Settings, passes: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Log the error that ends the process, if logs are JSON; otherwise it is printed as text."""
    try:
        yield
    except Exception as error:
        if settings.log_format != "json" or isinstance(error, passes):
            raise
        logger.critical("%s", error, exc_info=not isinstance(error, DcarError))
        raise SystemExit(getattr(error, "exit_code", 1)) from None


def _run(settings: Settings, listener: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
    """Serve in this process. Raise DcarError if the first version cannot be loaded."""
    failures: list[DcarError] = []

    def fail(error: DcarError) -> None:
        failures.append(error)
        server.should_exit = True

    threading.excepthook = _log_thread
    tracer = start_tracing() if settings.tracing else None
    threadpool_limits(1, "blas")  # products are small here; beside a busy model two threads take longer than one
    _raise_open_file_limit()
    sys.setswitchinterval(_SWITCH_S)
    listener.setblocking(False)  # for all workers: `dup` would change it, and a worker would wait for a connection
    server = _Server(create_app(settings, on_start_failure=fail, tracer=tracer), settings, on_ready)
    try:
        server.run(sockets=[listener, *(listener.dup() for _ in range(_LISTENERS - 1))])
    except KeyboardInterrupt:  # uvicorn raises it again after a clean shutdown
        logger.info("stopped")
    if failures:
        raise failures[0]
    end_without_threads(_THREADS_S)


def server_config(app: ASGIApp, metrics: Metrics) -> uvicorn.Config:
    """Return uvicorn's configuration for an application, with limited connections."""
    refused = metrics.refused.labels("event_loop").inc
    return uvicorn.Config(
        track_requests(app),
        http=cast(type[asyncio.Protocol], partial(BoundedProtocol, refused=refused)),  # uvicorn only calls it
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_FINISH_S,
    )


class _Server(uvicorn.Server):
    """uvicorn's server with a drain period, which a second signal ends, and without pauses for garbage collection.

    Once everything is loaded, the objects of the libraries are frozen: otherwise each full garbage collection stops
    every request for a quarter of a second. So are those of the full model, which an explanation may load later.

    on_ready: called by one of several workers when it accepts connections, which it does once everything is loaded.
    """

    def __init__(self, app: FastAPI, settings: Settings, on_ready: Callable[[], None] | None = None) -> None:
        super().__init__(server_config(app, app.state.metrics))
        self._app = app
        self._on_ready = on_ready
        self._drain_s = settings.drain_s
        self._timer: threading.Timer | None = None
        self._frozen = 0  # of the indexes in the settings, created collections, and the full model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._on_ready is None:
            await super().startup(sockets)
            return
        await super().startup([])
        while self._app.state.collections.missing is not None:
            if self.should_exit:
                return
            await asyncio.sleep(0.02)
        connect = partial(
            self.config.http_protocol_class,
            self.config,
            self.server_state,
            self.lifespan.state,  # type: ignore[call-arg]
        )
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(connect, sock=each, backlog=self.config.backlog) for each in sockets or ()
        ]
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        collections: Collections | None = getattr(self._app.state, "collections", None)
        if collections is not None and collections.missing is None:
            has_full_model = any(each.live and each.live.encoder.backbone is not None for _, each in collections)
            loaded = 1 + (collections.opening == 0) + has_full_model
            if loaded > self._frozen:
                gc.freeze()
                self._frozen = loaded
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._on_ready is not None and sig == signal.SIGINT:
            return  # Ctrl-C reaches all processes of a terminal; the supervisor tells its workers to end
        collections: Collections | None = getattr(self._app.state, "collections", None)
        if self._timer is not None:
            self._timer.cancel()  # uvicorn treats a further signal as a demand to drop pending requests
        if self._timer is not None or self._drain_s == 0 or collections is None or collections[None].live is None:
            if not self.should_exit:
                logger.info("received a signal: shutting down")
            super().handle_exit(sig, frame)
            return
        collections.is_draining = True
        logger.info("received a signal: shutting down in %g s", self._drain_s)
        self._timer = threading.Timer(self._drain_s, super().handle_exit, (sig, frame))
        self._timer.daemon = True
        self._timer.start()


def _raise_open_file_limit() -> None:
    """Raise the limit of open files as far as allowed: the usual 1,024 are few for connections."""
    with contextlib.suppress(ValueError, OSError):  # the system forbids raising it
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def base_url(host: str, port: int) -> str:
    """Return the URL of a service at an address; one of IPv6 stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise DcarError if the address or the port is not available."""
    listener = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # now, so that a second server fails to bind
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = f"cannot listen on port {port} of {host}: {error.strerror}"
        raise DcarError(f"{reason}; choose others with --port and --host") from None
    return listener
