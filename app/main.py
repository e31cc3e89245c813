"""Assemble the application.

- The lifespan starts loading in the background and returns: /healthz works at once, /readyz once searches do. That of
  one of several workers waits for the first load: it accepts connections after it.
- Shutdown finishes pending requests, then stops the batcher, the cache and the threads.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from app.api import error_handlers
from app.api.image_urls import ImageFetcher
from app.api.routes import add_routes
from app.api.routing import GuardedRoute, refuse_unknown
from app.core.metrics import Metrics, start_tracing
from app.core.rate_limit import RateLimiter
from app.core.settings import Settings
from app.feedback.log import FeedbackLog
from app.http.access import Access
from app.http.body_limit import BodyLimit
from app.http.envelope import Envelope
from app.service.collections import Collections, ServedIndex
from app.service.retriever import Retriever
from app.service.write_worker import WriteWorker
from dcar_core.util.errors import DcarError
from index_jobs.index.manifest import Manifest


def create_app(settings: Settings, *, on_start_failure: Callable[[DcarError], None] | None = None) -> FastAPI:
    """Return the ASGI application.

    Args:
        settings: validated settings; the environment is not read again.
        on_start_failure: called if the first version cannot be loaded. Without it the application stays up, responds
            with 503 and the reason, and retries.
    """
    tracer, end_tracing = start_tracing() if settings.tracing else (None, None)
    metrics, is_traced = Metrics(tracer), tracer is not None
    rates = None
    if settings.rate_limit is not None:
        redis_url = settings.redis_url.get_secret_value() if settings.redis_url else None
        rates = RateLimiter(settings.rate_limit, redis_url=redis_url, timeout_s=settings.redis_timeout_ms / 1000)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        collections = Collections(settings, metrics, on_start_failure=on_start_failure)
        retriever = Retriever(settings, metrics)
        writer = WriteWorker(settings, collections, metrics)
        app.state.collections, app.state.retriever, app.state.writer = collections, retriever, writer
        folder = settings.feedback_folder
        feedback = app.state.feedback = FeedbackLog(folder, settings, metrics) if folder else None
        _add_gauges(metrics, collections, rates)
        async with AsyncExitStack() as stack:  # closes the last one first
            if end_tracing is not None:  # uvicorn re-raises the signal after this, which ends the process
                stack.push_async_callback(asyncio.to_thread, end_tracing)
            if rates is not None:
                stack.push_async_callback(rates.close)
            retriever.start()
            stack.push_async_callback(retriever.close)
            collections.start()
            stack.push_async_callback(collections.close)
            if settings.workers > 1:
                for name in settings.indexes:
                    await collections[name].was_tried.wait()
            if settings.writes:
                writer.start()
                stack.push_async_callback(writer.close)
            if feedback is not None:
                feedback.start()
                stack.push_async_callback(feedback.close)
            yield

    app = FastAPI(
        title="DCAR image search",
        version=version("dcar"),
        description="Search a gallery of images by text, by image or by one of its own items.",
        openapi_url=None,  # `pages` has these
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": is_traced, "metrics": is_traced, "logs": is_traced},
        generate_unique_id_function=_operation_id,
        lifespan=lifespan,
    )
    app.state.settings, app.state.metrics, app.state.fetcher = settings, metrics, ImageFetcher(settings)
    app.state.access, app.state.bodies = Access(settings, rates), BodyLimit(settings)
    app.router.route_class, app.router.default = GuardedRoute, refuse_unknown
    error_handlers.install(app)
    add_routes(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Client-ID", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(Envelope, metrics=metrics, allowed_hosts=settings.allowed_hosts)
    return app


def _add_gauges(metrics: Metrics, collections: Collections, rates: RateLimiter | None) -> None:
    """Register gauges of the served indexes and of Redis; they are read at each scrape."""

    def of_manifest(read: Callable[[Manifest], float | None]) -> Callable[[ServedIndex], float | None]:
        return lambda served: read(served.live.artifact.manifest) if served.live else None

    created = "When the served version was made, in Unix seconds."
    recall = "Recall at 10 against exact search, as measured at build time."
    degraded = "1 while the published version or its vector store cannot be used."
    gauges: dict[str, tuple[str, Callable[[ServedIndex], float | None]]] = {
        "dcar_index_version": ("Served version.", of_manifest(lambda manifest: manifest.version)),
        "dcar_index_items": ("Items in the served version.", of_manifest(lambda manifest: manifest.count)),
        "dcar_index_created_timestamp_seconds": (created, of_manifest(lambda manifest: manifest.created_s)),
        "dcar_index_recall_at_10": (recall, of_manifest(lambda manifest: manifest.measured.get("recall_at_10"))),
        "dcar_index_degraded": (degraded, lambda served: served.fault is not None),
    }

    def values(read: Callable[[ServedIndex], float | None]) -> list[tuple[str, float]]:
        return [(name, float(value)) for name, served in collections if (value := read(served)) is not None]

    for name, (description, read) in gauges.items():
        metrics.add_gauge(name, description, "collection", partial(values, read))
    if rates is not None:
        breaker = rates.breaker
        metrics.add_gauge(
            "dcar_redis_breaker_open",
            "1 while Redis is not used because it failed, up to a minute after the last request for it.",
            "use",
            lambda: [("count", float(breaker.is_known_open))],
        )


def _operation_id(route: APIRoute) -> str:
    return f"{route.name}_in" if route.path.startswith("/collections/{collection}/") else route.name
