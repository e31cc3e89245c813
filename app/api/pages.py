"""The search page and the API's documentation, served from files that lie in the package: nothing comes from elsewhere.

No page has an inline script or style, so the content security policy can forbid them. What is served is a fixed table
of names made at start; a requested name is looked up in it and never joined to a path.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.core.problems import Problem

_UI = files("app") / "ui"
_TYPES = {
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
_DOCS_POLICY = _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI styles its elements


@dataclass(frozen=True, slots=True)
class _Page:
    data: bytes
    kind: str
    tag: str


def _read(file: Traversable) -> _Page:
    data = file.read_bytes()
    kind = _TYPES["." + file.name.rpartition(".")[2]]
    charset = "" if kind == "image/png" else "; charset=utf-8"
    return _Page(data, kind + charset, f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"')


def make_pages() -> APIRouter:
    """GET /, /docs and the files that they need below /ui/."""
    router = APIRouter(include_in_schema=False)
    swagger = files("fastapi_offline") / "static"
    pages = {
        file.name: _read(file)
        for file in [
            *(file for file in _UI.iterdir() if "." + file.name.rpartition(".")[2] in _TYPES),
            *(swagger / name for name in ("swagger-ui-bundle.js", "swagger-ui.css")),
        ]
    }

    def send(request: Request, name: str, policy: str | None = None) -> Response:
        page = pages.get(name)
        if page is None:
            raise Problem(404, "There is no such file.")
        headers = {"ETag": page.tag, "Cache-Control": "no-cache"}
        if policy is not None:
            headers["Content-Security-Policy"] = policy
        if page.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(page.data, media_type=page.kind, headers=headers)

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
