"""Declare a route in one place: its path, policy, body, responses and errors; and what endpoints get from a request.

- A module with routes makes a `Routes` and decorates its endpoints; no other module knows their paths.
- Endpoints read bodies by hand (see `bodies`). What FastAPI cannot see is declared here for the OpenAPI document.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.api.image_urls import ImageFetcher
from app.api.schemas import ProblemResponse
from app.core.keys import ApiKey
from app.core.metrics import Metrics
from app.core.problems import MEDIA_TYPE
from app.core.settings import Settings
from app.middleware.access import API_KEY
from app.middleware.policy import Policies, Policy
from app.search.snapshots import Snapshot
from app.service.collections import Collections
from app.service.retriever import Retriever
from app.writes.worker import WriteWorker

COLLECTION = "/collections/{collection}"
PROBLEM_REF = {"$ref": f"#/components/schemas/{ProblemResponse.__name__}"}
_BODY_ERRORS = (400, 408, 413, 415, 422)
_COLLECTION_ERRORS = (404, 422, 503)
_GUARDED_ERRORS = (401, 403, 429, 500)  # sent by the middleware

ItemId = Annotated[str, Path(description="the id of an item, as results give it", max_length=1024)]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Response]])


class DirectRoute(APIRoute):
    """A route whose endpoint takes only the request: injected dependencies would take 14 % of a cached search."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        return self.endpoint


class _Route(NamedTuple):
    method: str
    path: str
    policy: Policy
    endpoint: Callable[..., Any]
    options: dict[str, Any]


class Routes:
    """The routes of a module. tag: their heading in the documentation."""

    def __init__(self, tag: str = "") -> None:
        self._tag = tag
        self._routes: list[_Route] = []

    def add(
        self,
        method: str,
        path: str,
        policy: Policy,
        returns: type[BaseModel] | dict[str, Any] | None = None,
        *,
        accepts: type[BaseModel] | None = None,
        media_type: str = "application/json",
        status: int = 200,
        others: dict[int, dict[str, Any]] | None = None,
        errors: tuple[int, ...] = (),
        route_class: type[APIRoute] = APIRoute,
    ) -> Callable[[Endpoint], Endpoint]:
        """Return a decorator that declares an endpoint.

        Args:
            returns: model of the JSON response, or the OpenAPI response object of another one.
            accepts: model of the body; `openapi` adds its schema.
            media_type: of the body.
            others: OpenAPI response objects by status, beside that of success and those of errors.
            errors: statuses of errors beside those that follow from the body, the collection and the policy.
        """
        success: Any = {"model": returns} if isinstance(returns, type) else returns or {}
        statuses = {*errors, *(_COLLECTION_ERRORS if policy.scope == "collection" else ())}
        statuses |= {*(_BODY_ERRORS if accepts else ()), *(_GUARDED_ERRORS if policy.access != "open" else ())}
        problem = {"description": "", "content": {MEDIA_TYPE: {"schema": PROBLEM_REF}}}
        options: dict[str, Any] = {
            "responses": {status: success, **(others or {}), **dict.fromkeys(sorted(statuses), problem)},
            "status_code": status,
            "response_class": Response,
            "route_class_override": route_class,
            "include_in_schema": not policy.is_private,
            "tags": [self._tag] if self._tag else None,
        }
        if accepts is not None:
            content = {media_type: {"schema": {"$ref": f"#/components/schemas/{accepts.__name__}"}}}
            options["openapi_extra"] = {"requestBody": {"required": True, "content": content}}

        def declare(endpoint: Endpoint) -> Endpoint:
            self._routes.append(_Route(method, path, policy, endpoint, options))
            return endpoint

        return declare

    def add_to(self, app: FastAPI, policies: Policies) -> None:
        """Add the routes to an application; those of a collection also below /collections/{collection}."""
        for route in self._routes:
            self._add(app, policies, route, route.path)
            if route.policy.scope == "collection" and not route.path.startswith(COLLECTION):
                self._add(app, policies, route, COLLECTION + route.path)

    def _add(self, app: FastAPI, policies: Policies, route: _Route, path: str) -> None:
        # On the app itself: FastAPI matches the routes of an included router more slowly.
        app.router.add_api_route(path, route.endpoint, methods=[route.method], **route.options)
        added = app.router.routes[-1]
        assert isinstance(added, APIRoute)
        policies.add(path, added.path_regex, route.method, route.policy)


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


def may_read(request: Request, collection: str) -> bool:
    """Return True if the scope of the request's key, if it has one, opens a collection."""
    key: ApiKey | None = request.scope.get(API_KEY)
    return key is None or key.opens(collection)
