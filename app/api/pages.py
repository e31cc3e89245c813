"""The search page and the API documentation, served from files in the package; nothing is loaded from other sites.

- No page has an inline script or style, so the content security policy forbids them.
- Files are read once. A requested name is looked up in that table and never joined to a path.
"""

import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from fastapi import Request
from fastapi.responses import Response

from app.api.responses import JsonResponse
from app.api.routing import Routes
from app.core.problems import Problem
from app.middleware.policy import Policy

routes = Routes()
_POLICY = Policy("open", "service", cost=0, is_private=True)
_UI = files("app") / "ui"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_DOCS_CONTENT_POLICY = _CONTENT_POLICY.replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)  # Swagger UI sets inline styles


class _Page(NamedTuple):
    data: bytes
    media_type: str
    etag: str


@routes.add("GET", "/", _POLICY)
async def index(request: Request) -> Response:
    return _send(request, "index.html", _CONTENT_POLICY)


@routes.add("GET", "/docs", _POLICY)
async def docs(request: Request) -> Response:
    return _send(request, "docs.html", _DOCS_CONTENT_POLICY)


@routes.add("GET", "/openapi.json", _POLICY)
async def openapi(request: Request) -> Response:
    root = request.scope.get("root_path", "").rstrip("/")
    return JsonResponse(request.app.openapi() | ({"servers": [{"url": root}]} if root else {}))


@routes.add("GET", "/favicon.ico", _POLICY)
async def favicon(request: Request) -> Response:
    return _send(request, "icon.svg")


@routes.add("GET", "/ui/{name}", _POLICY)
async def file(request: Request, name: str) -> Response:
    return _send(request, name)


def _send(request: Request, name: str, content_policy: str | None = None) -> Response:
    page = _pages().get(name)
    if page is None:
        raise Problem(404, "There is no such file.")
    headers = {"ETag": page.etag, "Cache-Control": "no-cache"}
    if content_policy is not None:
        headers["Content-Security-Policy"] = content_policy
    if page.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(page.data, media_type=page.media_type, headers=headers)


@cache
def _pages() -> dict[str, _Page]:
    """Return the files by name."""
    swagger = _UI / "vendor" / "swagger-ui"
    own = [file for file in _UI.iterdir() if _suffix(file) in _MEDIA_TYPES]
    return {file.name: _read(file) for file in (*own, swagger / "swagger-ui-bundle.js", swagger / "swagger-ui.css")}


def _suffix(file: Traversable) -> str:
    return "." + file.name.rpartition(".")[2]


def _read(file: Traversable) -> _Page:
    data = file.read_bytes()
    media_type = _MEDIA_TYPES[_suffix(file)]
    charset = "" if media_type == "image/png" else "; charset=utf-8"
    return _Page(data, media_type + charset, f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"')
