"""Pure ASGI, between the guard and FastAPI: searches by words, the bulk of the traffic, answered without its routing.

- FastAPI's way to a route (nested routers, dependencies, exit stacks) takes more time than a remembered search. The
  steps are the route's own, called in the same order, so answers and errors are the same; a test compares them. What
  the document says of the route, and every other route, is FastAPI's.
"""

from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.params import retriever_of, settings_of, snapshot_of, words_in
from app.api.responses import JsonResponse, search_response
from app.core.problems import answer_to


@dataclass(frozen=True, slots=True)
class _Template:
    """Stands where FastAPI puts the route, for whoever asks by which template a request was answered."""

    path: str


_DEFAULT = _Template("/search/text")
_NAMED = _Template("/collections/{collection}/search/text")
_NAMED_PATTERN = compile_path(_NAMED.path)[0]


class Express:
    """Answers POST to both routes of a search by words; all else goes on to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _claim(scope):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await _answer(request)
        except Exception as error:
            response = await answer_to(request, error)
        await response(scope, receive, send)


async def _answer(request: Request) -> Response:
    body = await _body(request.receive)
    snapshot = await snapshot_of(request)
    words = words_in(request.headers.get("content-type", ""), body, settings_of(request))
    found = await (await retriever_of(request)).search(snapshot, words)
    return JsonResponse(search_response(request, found))


async def _body(receive: Receive) -> bytes:
    """As Starlette's `Request.body`, without the two generators that each part passes through there."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _claim(scope: Scope) -> bool:
    """Whether the path is one of the two; then the scope says what a route would have said."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if path == _DEFAULT.path:
        scope["route"], scope["path_params"] = _DEFAULT, {}
        return True
    named = _NAMED_PATTERN.match(path) if path.endswith(_DEFAULT.path) else None
    if named is None:
        return False
    scope["route"], scope["path_params"] = _NAMED, named.groupdict()
    return True
