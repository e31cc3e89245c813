"""The service as a whole: `create_app` puts it together, `serve` runs it.

- Whatever can be wrong is said before the model is loaded, in one line: no index, a taken port.
- The lifespan starts loading in the background and returns: /healthz answers at once, /readyz when searches can be.
- Ending: no new connections, requests under way are finished, then the batcher, the cache and the threads.
"""

import logging
import logging.config
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app import problems
from app.cache import make_cache
from app.metrics import Metrics
from app.middleware import Guard
from app.pages import make_pages
from app.queries import JSON_BYTES_PER_CHAR
from app.retriever import Retriever
from app.routes import make_router
from app.schemas import ProblemAnswer
from app.settings import Settings
from app.snapshots import Snapshots, require_index
from dcar_core.errors import DcarError

log = logging.getLogger(__name__)

_FORM_BYTES = 64 * 2**10  # boundaries, headers and the other fields of a form
_DRAIN_S = 10


def create_app(settings: Settings, *, on_start_failure: Callable[[DcarError], None] | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        settings: checked already; nothing else is read from the environment.
        on_start_failure: told when the first version cannot be loaded. Without it the application stays up, answers
            503 with the reason, and tries again.
    """

    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        require_index(settings)
        snapshots = Snapshots(settings, on_start_failure=on_start_failure)
        retriever = Retriever(settings, snapshots, make_cache(settings, metrics), metrics)
        app.state.snapshots, app.state.retriever = snapshots, retriever
        retriever.start()
        snapshots.start()
        try:
            yield
        finally:
            await snapshots.close()
            await retriever.close()

    app = FastAPI(
        title="DCAR image search",
        version=version("dcar"),
        description="Search a gallery of pictures by text, by picture or by one of its own items.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
    )
    app.state.settings, app.state.metrics = settings, metrics
    problems.install(app)
    app.include_router(make_router(settings))
    app.include_router(make_pages())
    app.add_middleware(Guard, limit=lambda path: _body_limit(settings, path))
    _document_problems(app)
    return app


def _body_limit(settings: Settings, path: str) -> tuple[int, str]:
    """The most bytes that a body may have, and the field that is at fault when it has more."""
    if path.endswith("/search/image"):
        return settings.max_upload_bytes + _FORM_BYTES, "file"
    return max(_FORM_BYTES, settings.max_query_chars * JSON_BYTES_PER_CHAR + 1024), "body"


def _document_problems(app: FastAPI) -> None:
    """Put the form of the errors into the OpenAPI document, in place of FastAPI's own, which is never sent."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                openapi_version=app.openapi_version,
                routes=app.routes,
            )
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            problem = ProblemAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs", {}))
            schemas[ProblemAnswer.__name__] = problem
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def serve(settings: Settings) -> None:
    """Run until interrupted.

    Raises:
        DcarError: with one line that says why it cannot start: no index, a taken port, a broken model.
    """
    logging.config.dictConfig(_log_config(settings.log_level))
    failures: list[DcarError] = []
    require_index(settings)
    listener = _listen(settings.host, settings.port)

    def fail(error: DcarError) -> None:
        failures.append(error)
        server.should_exit = True

    with listener:
        app = create_app(settings, on_start_failure=fail)
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        config = uvicorn.Config(
            app, log_config=None, ws="none", server_header=False, timeout_graceful_shutdown=_DRAIN_S
        )  # fmt: skip
        server = uvicorn.Server(config)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after it has shut down properly
            log.info("stopped")
    if failures:
        raise failures[0]


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
        if isinstance(error, PermissionError):
            raise DcarError(f"port {port} needs more rights; choose one above 1023 with --port") from None
        raise DcarError(f"port {port} on {host} is taken or not to be had; choose another with --port") from None
    return listener


class _NoProbes(logging.Filter):
    """Leaves out the accesses of health checks that went well; they come every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "uvicorn.access" or not isinstance(record.args, tuple) or len(record.args) < 5:
            return True
        return not (record.args[2] in ("/healthz", "/readyz") and record.args[4] == 200)


def _log_config(level: str) -> dict[str, Any]:
    """One line an event, on stderr; of uvicorn only the accesses and what went wrong."""
    form = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s", "datefmt": "%Y-%m-%d %H:%M:%S"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": form},
        "filters": {"no_probes": {"()": _NoProbes}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["no_probes"]}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},  # libraries tell much while they load
        "loggers": {
            **{name: {"level": level.upper()} for name in ("app", "dcar_core", "index_jobs", "uvicorn.access")},
            "uvicorn.error": {"level": "DEBUG" if level == "debug" else "WARNING"},
            "python_multipart": {"level": "ERROR"},
        },
    }
