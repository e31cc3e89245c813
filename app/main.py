"""Assemble the application.

- The lifespan starts loading in the background and returns: /healthz works at once,
  /readyz once searches do. That of one of several workers waits for the first load: it
  accepts connections after it.
- Shutdown finishes pending requests, then stops the batcher, the cache and the threads.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from app.api.guard import Access, BodyLimit, Envelope
from app.api.plugins import make_plugins
from app.api.requests import ImageFetcher
from app.api.responses import add_error_handlers
from app.api.routes import add_routes
from app.api.routing import GuardedRoute, refuse_unknown
from app.core.callers import RateLimiter
from app.core.metrics import Metrics
from app.core.settings import Settings
from app.feedback.log import FeedbackLog
from app.search.served_version import ServedVersion
from app.service.collections import Collections
from app.service.retriever import Retriever
from app.service.write_worker import WriteWorker
from dcar_core.util.errors import DcarError


def create_app(
    settings: Settings,
    *,
    on_start_failure: Callable[[DcarError], None] | None = None,
) -> FastAPI:
    """Return the ASGI application.

    on_start_failure: called if the first version cannot be loaded. Without it the
        application responds with 503 and the reason, and retries.
    """
    metrics = Metrics()
    plugins = make_plugins(settings, metrics)
    rates = None
    if settings.rate_limit is not None:
        if settings.redis_url:
            redis_url = settings.redis_url.get_secret_value()
        else:
            redis_url = None
        rates = RateLimiter(settings.rate_limit, redis_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        collections = Collections(settings, metrics, on_start_failure=on_start_failure)
        retriever = Retriever(settings, metrics)
        writer = WriteWorker(settings, collections, metrics)
        app.state.collections = collections
        app.state.retriever = retriever
        app.state.writer = writer
        folder = settings.feedback_folder
        feedback = app.state.feedback = (
            FeedbackLog(folder, settings, metrics) if folder else None
        )
        _add_gauges(metrics, collections, retriever)
        async with AsyncExitStack() as stack:  # closes the last one first
            if rates is not None:
                stack.push_async_callback(rates.close)
            for part in (
                retriever,
                collections,
                writer if settings.writes else None,
                feedback,
                *plugins.values(),
            ):
                if part is not None:
                    part.start()
                    stack.push_async_callback(part.close)
            for name in settings.indexes if settings.workers > 1 else ():
                await collections[name].was_tried.wait()
            yield

    app = FastAPI(
        title="DCAR image search",
        version=version("dcar"),
        description=(
            "Search a gallery of images by text, by image or by one of its own items."
        ),
        openapi_url=None,  # `app.api.page` has these
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.fetcher = ImageFetcher(settings)
    app.state.access = Access(settings, rates)
    app.state.bodies = BodyLimit(settings)
    app.router.route_class = GuardedRoute
    app.router.default = refuse_unknown
    add_error_handlers(app)
    app.state.plugins = plugins
    add_routes(app, [plugin.routes for plugin in plugins])
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-API-Key",
                "X-Request-ID",
            ],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(Envelope, metrics=metrics, settings=settings)
    return app


def _add_gauges(
    metrics: Metrics,
    collections: Collections,
    retriever: Retriever,
) -> None:
    """Register gauges of searches in progress and of the served indexes."""

    def values(read: Callable[[ServedVersion], float]) -> Iterable[tuple[str, float]]:
        return [
            (name, read(collection.current))
            for name, collection in collections
            if collection.current is not None
        ]

    def degraded() -> Iterable[tuple[str, float]]:
        return [
            (name, collection.fault is not None) for name, collection in collections
        ]

    versions = partial(values, lambda served: served.version)
    counts = partial(values, lambda served: served.index.manifest.count)
    metrics.add_gauge("dcar_index_version", "Served version.", "collection", versions)
    metrics.add_gauge(
        "dcar_index_items",
        "Items in the served version.",
        "collection",
        counts,
    )
    metrics.add_gauge(
        "dcar_index_degraded",
        "1 while the published version cannot be used.",
        "collection",
        degraded,
    )
    about = "Searches and image requests in progress, of the worker that is asked."
    metrics.add_gauge("dcar_pending", about, "what", retriever.pending)


def _operation_id(route: APIRoute) -> str:
    if route.path.startswith("/collections/{collection}/"):
        return f"{route.name}_in"
    return route.name
