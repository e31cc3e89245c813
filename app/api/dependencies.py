"""Parts of the request and of the application, for handlers."""

from typing import Annotated, Protocol

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


class ServiceState(Protocol):
    """The parts of the service that handlers use, as `create_app` puts them into `app.state`."""

    settings: Settings
    metrics: Metrics
    collections: Collections
    retriever: Retriever
    writer: WriteWorker
    fetcher: ImageFetcher


def state_of(request: Request) -> ServiceState:
    state: ServiceState = request.app.state
    return state


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
    return state_of(request).collections[collection_of(request)].require()


def require_admin(request: Request) -> None:
    """Accept only the holder of the admin key. The client address proves nothing: behind a proxy it is loopback."""
    key = state_of(request).settings.admin_key
    if key is None:
        raise Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
    given = key_in(request.headers)
    if given is None or not is_key(given, key.get_secret_value()):
        state_of(request).metrics.refused.labels("key").inc()
        raise unauthorised("must be `Bearer` and the admin key")


def may_read(request: Request, collection: str) -> bool:
    """Return True if the scope of the request's key, if it has one, opens a collection."""
    key: ApiKey | None = request.scope.get(API_KEY)
    return key is None or key.opens(collection)


def require_writer(request: Request, collection: str) -> None:
    """Accept the admin key, and API keys that may write to a collection."""
    if not state_of(request).settings.writes:
        raise Problem(403, "Writing is disabled; set DCAR_WRITES=true to enable it.")
    key: ApiKey | None = request.scope.get(API_KEY)
    if key is None:  # no API keys are configured
        require_admin(request)
    elif not key.may_write or not key.opens(collection):
        raise out_of_scope()
