"""What a handler needs from the request and the application."""

from typing import Annotated

from fastapi import Path, Request

from app.api.image_urls import ImageFetcher
from app.core.keys import ApiKey, is_key, key_in
from app.core.metrics import Metrics
from app.core.problems import Problem
from app.core.settings import Settings
from app.middleware.access import API_KEY, out_of_scope, unauthorised
from app.search.collections import Collections
from app.search.retriever import Retriever
from app.search.snapshots import Snapshot
from app.writes.worker import WriteWorker

ItemId = Annotated[str, Path(description="the id of an item, as results give it", max_length=1024)]


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def retriever_of(request: Request) -> Retriever:
    retriever: Retriever = request.app.state.retriever
    return retriever


def fetcher_of(request: Request) -> ImageFetcher:
    fetcher: ImageFetcher = request.app.state.fetcher
    return fetcher


def collections_of(request: Request) -> Collections:
    collections: Collections = request.app.state.collections
    return collections


def writer_of(request: Request) -> WriteWorker:
    writer: WriteWorker = request.app.state.writer
    return writer


def collection_of(request: Request) -> str | None:
    """Return the collection named in the path; None means the default one."""
    name: str | None = request.path_params.get("collection")
    return name


def snapshot_of(request: Request) -> Snapshot:
    """Return the live version of the collection named in the path.

    Raises:
        CollectionNotFoundError: the collection is unknown.
        NotReadyError: it is not loaded yet.
    """
    return collections_of(request)[collection_of(request)].require()


def require_admin(request: Request) -> None:
    """Accept only the holder of the admin key. The client address proves nothing: behind a proxy it is loopback."""
    key = settings_of(request).admin_key
    if key is None:
        raise Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
    given = key_in(request.headers)
    if given is None or not is_key(given, key.get_secret_value()):
        metrics: Metrics = request.app.state.metrics
        metrics.refused.labels("key").inc()
        raise unauthorised("must be `Bearer` and the admin key")


def may_read(request: Request, collection: str) -> bool:
    """Return True if the scope of the request's key, if it has one, opens a collection."""
    key: ApiKey | None = request.scope.get(API_KEY)
    return key is None or key.opens(collection)


def require_writer(request: Request, collection: str) -> None:
    """Accept the admin key, and API keys that may write to a collection."""
    if not settings_of(request).writes:
        raise Problem(403, "Writing is disabled; set DCAR_WRITES=true to enable it.")
    key: ApiKey | None = request.scope.get(API_KEY)
    if key is None:  # no API keys are configured
        require_admin(request)
    elif not key.may_write or not key.opens(collection):
        raise out_of_scope()
