"""The search page and the API documentation, served from files in the package; nothing is loaded from other sites.

- No page has an inline script or style, so the content security policy forbids them.
- Files are read once at start. A requested name is looked up in that table and never joined to a path.
"""

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.core.problems import Problem

_UI = files("app") / "ui"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_DOCS_POLICY = _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI sets inline styles


class _Page(NamedTuple):
    data: bytes
    media_type: str
    etag: str


def make_pages() -> APIRouter:
    """Return the routes of /, /docs and their files below /ui/."""
    router = APIRouter(include_in_schema=False)
    swagger = _UI / "vendor" / "swagger-ui"
    own = [file for file in _UI.iterdir() if _suffix(file) in _MEDIA_TYPES]
    pages = {file.name: _read(file) for file in (*own, swagger / "swagger-ui-bundle.js", swagger / "swagger-ui.css")}

    def send(request: Request, name: str, policy: str | None = None) -> Response:
        page = pages.get(name)
        if page is None:
            raise Problem(404, "There is no such file.")
        headers = {"ETag": page.etag, "Cache-Control": "no-cache"}
        if policy is not None:
            headers["Content-Security-Policy"] = policy
        if page.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(page.data, media_type=page.media_type, headers=headers)

    @router.get("/")
    async def page(request: Request) -> Response:
        return send(request, "index.html", _POLICY)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return send(request, "docs.html", _DOCS_POLICY)

    @router.get("/favicon.ico")
    async def favicon(request: Request) -> Response:
        return send(request, "icon.svg")

    @router.get("/ui/{name}")
    async def file(request: Request, name: str) -> Response:
        return send(request, name)

    return router


def _suffix(file: Traversable) -> str:
    return "." + file.name.rpartition(".")[2]


def _read(file: Traversable) -> _Page:
    data = file.read_bytes()
    media_type = _MEDIA_TYPES[_suffix(file)]
    charset = "" if media_type == "image/png" else "; charset=utf-8"
    return _Page(data, media_type + charset, f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"')
