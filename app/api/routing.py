"""Declare a route in one place: its path, policy, body and responses. Read the JSON of
its requests, and send it.

- A module with routes makes a `Routes` and decorates its endpoints; no other module
  knows their paths.
- JSON is parsed and validated by pydantic in one step: FastAPI's own handling costs 11
  to 15 % of a cached search. What FastAPI cannot see is declared here for the OpenAPI
  document.
- A route without a policy is not reachable, and a path without a route asks for a key
  before it says so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from inspect import signature
from typing import Annotated, Any, NotRequired, Protocol, TypeVar, cast
from urllib.parse import quote

from fastapi import FastAPI, Path, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.api.guard import API_KEY, UNKNOWN, Access, BodyLimit, Policy, byte_counter
from app.core.callers import ApiKey
from app.core.metrics import Metrics
from app.core.problems import MEDIA_TYPE, Problem, field_problem, from_validation
from app.core.settings import Settings
from app.feedback.log import FeedbackLog
from app.search.query import MAX_TEXT_BYTES
from app.search.served_version import ServedVersion
from app.service.collections import Collections
from app.service.retriever import Retriever
from app.service.write_worker import WriteWorker

_LARGE_JSON_BYTES = 64 * 2**10
# images make a body large, but not its number of values, which take time and memory
_MAX_JSON_VALUES = 50_000
# of texts that are made into JSON in the event loop, in about a millisecond
QUICK_BYTES = 64 * 2**10
COLLECTION = "/collections/{collection}"
ItemId = Annotated[
    str, Path(description="the id of an item, as results give it", max_length=1024)
]
M = TypeVar("M", bound=BaseModel)
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
_COLLECTION = {
    "name": "collection",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
}
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
            raise Problem(
                405,
                f"{scope['method']} is not allowed here.",
                headers={"Allow": ", ".join(allowed)},
            )
        await state.bodies.run(self.app, self.policy, scope, receive, send)


async def refuse_unknown(scope: Scope, receive: Receive, send: Send) -> None:
    await scope["app"].state.access.check(scope, UNKNOWN)
    raise Problem(
        404, f"There is nothing at {scope['path'][:200]}; see /docs for the routes."
    )


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
        body_type: str = "application/json",
        status: int = 200,
    ) -> Callable[[Endpoint], Endpoint]:
        """Return a decorator that declares an endpoint.

        returns: type of the JSON response, or the media type of another one. accepts:
        model of the body.
        """
        success: dict[str, Any] = {"model": returns}
        if isinstance(returns, str):
            success = {"content": {returns: {}}}
        extra: dict[str, Any] = {"security": _SECURITY[policy.access]}
        if accepts is not None:
            _documented.append(accepts)
            extra["requestBody"] = {
                "required": True,
                "content": _content(body_type, accepts),
            }
        options: dict[str, Any] = {
            "methods": [method],
            "status_code": status,
            "tags": [path.split("/")[1]],
            "include_in_schema": not policy.is_private,
            "responses": {
                status: {"description": "Success", **(success if returns else {})},
                "default": {
                    "description": "An error",
                    "content": _content(MEDIA_TYPE, ProblemResponse),
                },
            },
            "openapi_extra": extra,
        }

        def declare(endpoint: Endpoint) -> Endpoint:
            self._routes.append((path, policy, endpoint, options))
            return endpoint

        return declare

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application; those of a collection also below
        /collections/{collection}.
        """
        for path, policy, endpoint, options in self._routes:
            is_inside = policy.scope == "collection" and not path.startswith(COLLECTION)
            for whole in (path, COLLECTION + path) if is_inside else (path,):
                extra = options["openapi_extra"] | (
                    {"parameters": [_COLLECTION]} if COLLECTION in whole else {}
                )
                # On the app itself: FastAPI matches the routes of an included router
                # more slowly.
                app.router.add_api_route(
                    whole,
                    endpoint,
                    response_class=Response,
                    **options | {"openapi_extra": extra},
                )
                added = app.router.routes[-1]
                assert isinstance(added, GuardedRoute)
                added.policy = policy


@cache
def openapi_document(app: FastAPI) -> bytes:
    """Return the OpenAPI document as JSON; the page and tools ask for it again and
    again.
    """
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


class ImageReader(Protocol):
    """`ImageFetcher` of `requests`: images in base64 or at URLs, by their names ->
    their files.
    """

    async def read(
        self,
        scope: Scope,
        images: Mapping[str, str],
    ) -> dict[str, bytes]: ...


class ServiceState(Protocol):
    """The parts of the service that handlers use, as `create_app` puts them into
    `app.state`.
    """

    settings: Settings
    metrics: Metrics
    access: Access
    bodies: BodyLimit
    collections: Collections
    retriever: Retriever
    writer: WriteWorker
    feedback: FeedbackLog | None
    fetcher: ImageReader
    plugins: Mapping[type[Any], Any]


def state_of(request: Request) -> ServiceState:
    return cast(ServiceState, request.app.state)


def collection_of(request: Request) -> str | None:
    """Return the collection named in the path; None means the default one."""
    return cast(str | None, request.path_params.get("collection"))


def items_path(request: Request) -> str:
    """Return the URL path of the items of the request's collection."""
    collection = collection_of(request)
    if collection is None:
        return "/items"
    return f"/collections/{quote(collection, safe='')}/items"


async def version_of(request: Request) -> ServedVersion:
    """Return the current version of the collection named in the path; errors are those
    of `Collections.open`.
    """
    return state_of(request).collections.open(collection_of(request))


def may_read(request: Request, collection: str) -> bool:
    """Return True if the scope of the request's key, if it has one, opens a
    collection.
    """
    key: ApiKey | None = request.scope.get(API_KEY)
    return key is None or key.opens(collection)


def validated(model: type[M], fields: dict[str, Any] | bytes, settings: Settings) -> M:
    """Return the model of fields, or of JSON, checked against the limits of the
    settings. Raise Problem if invalid.
    """
    try:
        if isinstance(fields, bytes):
            return model.model_validate_json(fields, context=settings)
        return model.model_validate(fields, context=settings)
    except ValidationError as error:
        raise from_validation(error) from None


def check_content_type(request: Request, *expected: str) -> None:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type not in expected:
        raise field_problem(
            "Content-Type",
            f"must be {expected[0]}, not {media_type or 'absent'}",
            status=415,
        )


async def read_json(request: Request, model: type[M], *media_types: str) -> M:
    """Read a body of JSON, or of another type, and check it against the limits of the
    settings.
    """
    body = await request.body()
    settings = request.app.state.settings
    check_content_type(request, "application/json", *media_types)
    if len(body) <= _LARGE_JSON_BYTES:
        return validated(model, body, settings)
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise field_problem("body", f"at most {_MAX_JSON_VALUES:,} values", status=413)
    return await asyncio.to_thread(validated, model, body, settings)


class JsonResponse(Response):
    """Plain data as JSON, several times as fast as by the standard library; NaN and
    infinities become null.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


async def send_items(request: Request, body: Any, texts: int) -> Response:
    """Return a body whose items have so many bytes of texts. Long ones count as the
    body of the request does.
    """
    if texts > MAX_TEXT_BYTES:
        message = (
            f"the texts and metadata take more than {MAX_TEXT_BYTES // 2**20} MiB; "
        )
        raise field_problem(
            "k", message + "request fewer results at a time, or leave `fields` out"
        )
    if texts <= QUICK_BYTES:
        return JsonResponse(body)
    byte_counter(request.scope)(texts)
    return await asyncio.to_thread(JsonResponse, body)


def not_modified(request: Request, headers: dict[str, str]) -> Response | None:
    """Return the response to a client that has what the ETag names."""
    is_known = headers["ETag"] in request.headers.get("if-none-match", "")
    return Response(status_code=304, headers=headers) if is_known else None
