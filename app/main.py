"""Assemble the application.

- The lifespan starts loading in the background and returns: /healthz works at once, /readyz once searches do.
- Shutdown finishes pending requests, then stops the batcher, the cache and the threads.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from app.api import error_handlers, openapi
from app.api.image_urls import ImageFetcher
from app.api.routes import add_routes
from app.core.metrics import Metrics
from app.core.rate_limit import RateLimiter
from app.core.settings import Settings
from app.core.tracing import Tracer
from app.middleware.access import Access
from app.middleware.body_limit import BodyLimit
from app.middleware.policy import Policies
from app.middleware.request_log import RequestLog
from app.service.collections import Collections
from app.service.embedding_cache import MemoryCache, RedisCache, make_cache
from app.service.reload_listener import ReloadListener
from app.service.retriever import Retriever
from app.writes.worker import WriteWorker
from dcar_core.util.errors import DcarError


def create_app(
    settings: Settings,
    *,
    on_start_failure: Callable[[DcarError], None] | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """Return the ASGI application.

    Args:
        settings: validated settings; the environment is not read again.
        on_start_failure: called if the first version cannot be loaded. Without it the application stays up, responds
            with 503 and the reason, and retries.
        tracer: records spans of the stages of a search.
    """
    metrics, policies, is_traced = Metrics(tracer), Policies(), tracer is not None
    rates = _make_rates(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        collections = Collections(settings, metrics, on_start_failure=on_start_failure)
        cache = make_cache(settings, metrics)
        retriever = Retriever(settings, cache, metrics)
        writer = WriteWorker(settings, collections, metrics)
        app.state.collections, app.state.retriever, app.state.writer = collections, retriever, writer
        _watch_indexes(metrics, collections)
        _watch_redis(metrics, cache, rates)
        async with AsyncExitStack() as stack:  # closes the last one first
            if tracer is not None:  # uvicorn re-raises the signal after this, which ends the process
                stack.push_async_callback(asyncio.to_thread, tracer.close)
            if rates is not None:
                stack.push_async_callback(rates.close)
            retriever.start()
            stack.push_async_callback(retriever.close)
            collections.start()
            stack.push_async_callback(collections.close)
            if settings.writes:
                writer.start()
                stack.push_async_callback(writer.close)
            if settings.redis_url is not None:
                listener = ReloadListener(settings.redis_url.get_secret_value(), collections, metrics)
                listener.start()
                stack.push_async_callback(listener.close)
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
    app.state.policies = policies
    error_handlers.install(app)
    add_routes(app, policies)
    openapi.install(app, policies)
    # From the inside out: a request meets the last one first.
    app.add_middleware(BodyLimit, settings=settings, metrics=metrics)
    app.add_middleware(Access, settings=settings, policies=policies, rates=rates, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(RequestLog, metrics=metrics, allowed_hosts=settings.allowed_hosts)
    return app


def _make_rates(settings: Settings) -> RateLimiter | None:
    if settings.rate_limit is None:
        return None
    url = settings.redis_url.get_secret_value() if settings.redis_url else None
    return RateLimiter(settings.rate_limit, redis_url=url, timeout_s=settings.redis_timeout_ms / 1000)


def _watch_redis(metrics: Metrics, cache: MemoryCache, rates: RateLimiter | None) -> None:
    """Register a gauge of the uses of Redis that pause; it is read at each scrape."""
    if isinstance(cache, RedisCache):
        breakers = {"read": cache.read_breaker, "write": cache.write_breaker}
        if rates is not None:
            breakers["count"] = rates.breaker
        description = "1 while Redis is not used because it failed."
        metrics.add_gauge(
            "dcar_redis_breaker_open",
            description,
            ["use"],
            lambda: [([use], float(breaker.is_open)) for use, breaker in breakers.items()],
        )


def _watch_indexes(metrics: Metrics, collections: Collections) -> None:
    """Register gauges about the served indexes; they are read at each scrape."""

    def read(value: Callable[[Any], Any]) -> Callable[[], list[tuple[list[str], float]]]:
        def current() -> list[tuple[list[str], float]]:
            values = [(name, value(s.live.artifact.manifest)) for name, s in collections if s.live]
            return [([name], float(each)) for name, each in values if each is not None]

        return current

    label = ["collection"]
    metrics.add_gauge("dcar_index_version", "Served version.", label, read(lambda m: m.version))
    metrics.add_gauge("dcar_index_items", "Items in the served version.", label, read(lambda m: m.count))
    recall = "Recall at 10 against exact search, as measured at build time."
    metrics.add_gauge("dcar_index_recall_at_10", recall, label, read(lambda m: m.measured.get("recall_at_10")))
    metrics.add_gauge(
        "dcar_index_degraded",
        "1 while a newer published version cannot be served, or a file of the served one is damaged.",
        label,
        lambda: [([name], float(s.fault is not None)) for name, s in collections],
    )


def _operation_id(route: APIRoute) -> str:
    return f"{route.name}_in" if route.path.startswith("/collections/{collection}/") else route.name
