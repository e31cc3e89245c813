"""Runs the service: `serve` is what `dcar serve` calls.

- Whatever can be wrong is said before the model is loaded, in one line: no index, a taken port.
- Ending: for `drain_s` it goes on but is not ready; then no new connections, and requests under way are finished.
"""

import errno
import gc
import logging
import logging.config
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from app.core.logs import log_config
from app.core.settings import Settings
from app.core.threads import use_batch_scheduling
from app.core.tracing import start_tracing
from app.main import create_app
from app.middleware.http_protocol import BoundedProtocol, track_requests
from app.search.collections import Collections
from dcar_core.util.errors import DcarError
from index_jobs.store.versions import require_index

log = logging.getLogger(__name__)

_FINISH_S = 10  # for requests under way at the end


def serve(settings: Settings) -> None:
    """Run until interrupted.

    Raises:
        DcarError: with one line that says why it cannot start: no index, a taken port, a broken model.
    """
    logging.config.dictConfig(log_config(settings.log_level, settings.log_format))
    failures: list[DcarError] = []
    for index in settings.indexes.values():
        require_index(index)
    tracer = start_tracing() if settings.tracing else None
    listener = _listen(settings.host, settings.port)

    def fail(error: DcarError) -> None:
        failures.append(error)
        server.should_exit = True

    _allow_connections()
    with listener:
        app = create_app(settings, on_start_failure=fail, tracer=tracer)
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        server = _Server(
            server_config(app),
            collections_of=lambda: getattr(app.state, "collections", None),
            drain_s=settings.drain_s,
            batch_scheduling=settings.batch_scheduling,
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after it has shut down properly
            log.info("stopped")
    if failures:
        raise failures[0]


def server_config(app: ASGIApp) -> uvicorn.Config:
    """Return uvicorn's configuration for an application, with limited connections."""
    return uvicorn.Config(
        track_requests(app),
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_FINISH_S,
    )


class _Server(uvicorn.Server):
    """uvicorn's, with what it lacks at both ends.

    - At the first signal it says through /readyz that it is about to end, and goes on for drain_s, so that whoever
      balances the load can turn to others before connections are refused. A second signal ends it at once.
    - When all is loaded, the hundreds of thousands of objects of the libraries are taken out of the garbage collector's
      sight: looking through them stops every request for a third of a second, again and again under load.
    - From then on, with `batch_scheduling`, the event loop does not interrupt the model: see `app.core.threads`.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        collections_of: Callable[[], Collections | None],
        drain_s: float,
        batch_scheduling: bool,
    ) -> None:
        super().__init__(config)
        self._collections_of = collections_of
        self._drain_s = drain_s
        self._batch_scheduling = batch_scheduling
        self._timer: threading.Timer | None = None
        self._settled = False

    async def on_tick(self, counter: int) -> bool:
        collections = self._collections_of()
        if not self._settled and collections is not None and all(each.live is not None for _, each in collections):
            gc.freeze()
            if self._batch_scheduling:
                use_batch_scheduling()
            self._settled = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        collections = self._collections_of()
        if self._timer is not None:
            self._timer.cancel()  # uvicorn takes another signal for a demand to leave all where it stands
        if self._timer is not None or self._drain_s == 0 or collections is None or collections[None].live is None:
            super().handle_exit(sig, frame)
            return
        collections.is_draining = True
        log.info("told to end: going on for %g s, then ending", self._drain_s)
        self._timer = threading.Timer(self._drain_s, super().handle_exit, (sig, frame))
        self._timer.daemon = True
        self._timer.start()


def _allow_connections() -> None:
    """As many open files as the system lets this process have: the usual 1,024 are few for connections."""
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, ValueError, OSError):  # not a system that has them, or that lets them be raised
        pass


def require_free_port(host: str, port: int) -> None:
    """Say now that a port is taken, before minutes are spent on what would be served there.

    Raises:
        DcarError: it cannot be listened on.
    """
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model is loaded.

    Raises:
        DcarError: with a message for the user.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError:
        raise DcarError(f"{host} is no address of this machine; try --host 127.0.0.1") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)  # claims the port: a second bind to it fails from here on
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise DcarError(f"{host} is no address of this machine; try --host 127.0.0.1") from None
        if isinstance(error, PermissionError):
            raise DcarError(f"port {port} needs more rights; choose one above 1023 with --port") from None
        raise DcarError(f"port {port} on {host} is taken or not to be had; choose another with --port") from None
    return listener
