"""Declare a route in one place: its path, policy, body and responses; and what endpoints get from a request.

- A module with routes makes a `Routes` and decorates its endpoints; no other module knows their paths.
- Endpoints read bodies by hand (see `requests`). What FastAPI cannot see is declared here for the OpenAPI document.
- A route without a policy is not reachable, and a path without a route asks for a key before it says so.
"""

from collections.abc import Awaitable, Callable
from functools import cache
from inspect import signature
from typing import Annotated, Any, NotRequired, Protocol, TypeVar, cast

from fastapi import FastAPI, Path, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.api.requests import ImageFetcher, ImageForm
from app.core.callers import ApiKey
from app.core.metrics import Metrics
from app.core.problems import MEDIA_TYPE, Problem
from app.core.settings import Settings
from app.feedback.log import FeedbackLog
from app.http.access import API_KEY, UNKNOWN, Access, BodyLimit, Policy
from app.search.served_version import ServedVersion
from app.service.collections import Collections
from app.service.retriever import Retriever
from app.service.write_worker import WriteWorker

COLLECTION = "/collections/{collection}"
ItemId = Annotated[str, Path(description="the id of an item, as results give it", max_length=1024)]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Response]])


class FieldError(TypedDict):
    """One invalid field, under the name that the request used."""

    field: str
    message: str


class ProblemResponse(TypedDict):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: NotRequired[list[FieldError]]


_REFERENCE = "#/components/schemas/{model}"
_COLLECTION = {"name": "collection", "in": "path", "required": True, "schema": {"type": "string"}}
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "open": [],
    "read": [{}, {"key": []}],
    "monitor": [{}, {"key": []}, {"admin": []}],
    "write": [{"admin": []}, {"key": []}],
    "admin": [{"admin": []}],
}
_documented: list[Any] = [ProblemResponse]  # and the models of bodies


def _content(media_type: str, model: Any) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}}


class GuardedRoute(APIRoute):
    """A route that applies its policy before its endpoint sees a request."""

    policy: Policy | None = None

    def get_route_handler(self) -> Callable[[Request], Any]:
        # FastAPI's injection of dependencies would take 14 % of a cached search.
        takes_request = signature(self.endpoint).parameters.keys() == {"request"}
        return self.endpoint if takes_request else super().get_route_handler()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.policy is None:
            await refuse_unknown(scope, receive, send)
            return
        state: ServiceState = scope["app"].state
        await state.access.check(scope, self.policy)
        if scope["method"] not in (methods := self.methods or set()):
            allowed = sorted({*methods, "HEAD"} if "GET" in methods else methods)
            raise Problem(405, f"{scope['method']} is not allowed here.", headers={"Allow": ", ".join(allowed)})
        await state.bodies.run(self.app, self.policy, scope, receive, send)


async def refuse_unknown(scope: Scope, receive: Receive, send: Send) -> None:
    await scope["app"].state.access.check(scope, UNKNOWN)
    raise Problem(404, f"There is nothing at {scope['path'][:200]}; see /docs for the routes.")


class Routes:
    """The routes of a module."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, Policy, Callable[..., Any], dict[str, Any]]] = []

    def add(
        self,
        method: str,
        path: str,
        policy: Policy,
        returns: Any = None,
        *,
        accepts: type[BaseModel] | None = None,
        status: int = 200,
    ) -> Callable[[Endpoint], Endpoint]:
        """Return a decorator that declares an endpoint.

        returns: type of the JSON response, or the media type of another one. accepts: model of the body.
        """
        success = {"content": {returns: {}}} if isinstance(returns, str) else {"model": returns}
        extra: dict[str, Any] = {"security": _SECURITY[policy.access]}
        if accepts is not None:
            _documented.append(accepts)
            kind = "multipart/form-data" if accepts is ImageForm else "application/json"
            extra["requestBody"] = {"required": True, "content": _content(kind, accepts)}
        options: dict[str, Any] = {
            "methods": [method],
            "status_code": status,
            "tags": [path.split("/")[1]],
            "include_in_schema": not policy.is_private,
            "responses": {
                status: {"description": "Success", **(success if returns else {})},
                "default": {"description": "An error", "content": _content(MEDIA_TYPE, ProblemResponse)},
            },
            "openapi_extra": extra,
        }

        def declare(endpoint: Endpoint) -> Endpoint:
            self._routes.append((path, policy, endpoint, options))
            return endpoint

        return declare

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application; those of a collection also below /collections/{collection}."""
        for path, policy, endpoint, options in self._routes:
            is_inside = policy.scope == "collection" and not path.startswith(COLLECTION)
            for whole in (path, COLLECTION + path) if is_inside else (path,):
                extra = options["openapi_extra"] | ({"parameters": [_COLLECTION]} if COLLECTION in whole else {})
                # On the app itself: FastAPI matches the routes of an included router more slowly.
                app.router.add_api_route(whole, endpoint, response_class=Response, **options | {"openapi_extra": extra})
                added = app.router.routes[-1]
                assert isinstance(added, GuardedRoute)
                added.policy = policy


@cache
def openapi_document(app: FastAPI) -> bytes:
    """Return the OpenAPI document as JSON; the page and tools ask for it again and again."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    for model in _documented:
        schema = TypeAdapter(model).json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
    key = "An API key, if the service requires one; the header `X-API-Key` works too."
    document["components"]["securitySchemes"] = {
        name: {"type": "http", "scheme": "bearer", "description": text}
        for name, text in (("key", key), ("admin", "The admin key."))
    }
    return to_json(document)


class ServiceState(Protocol):
    """The parts of the service that handlers use, as `create_app` puts them into `app.state`."""

    settings: Settings
    metrics: Metrics
    access: Access
    bodies: BodyLimit
    collections: Collections
    retriever: Retriever
    writer: WriteWorker
    feedback: FeedbackLog | None
    fetcher: ImageFetcher


def state_of(request: Request) -> ServiceState:
    return cast(ServiceState, request.app.state)


def collection_of(request: Request) -> str | None:
    """Return the collection named in the path; None means the default one."""
    return cast(str | None, request.path_params.get("collection"))


async def served_version(request: Request) -> ServedVersion:
    """Return the current version of the collection named in the path; errors are those of `Collections.open`."""
    return state_of(request).collections.open(collection_of(request))


def may_read(request: Request, collection: str) -> bool:
    """Return True if the scope of the request's key, if it has one, opens a collection."""
    key: ApiKey | None = request.scope.get(API_KEY)
    return key is None or key.opens(collection)
