"""The application over a real index, in this process through ASGI or on a port."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from app.core.keys import key_hash, new_key
from app.core.settings import Settings
from app.main import create_app
from app.search.errors import NotReadyError
from app.server import server_config

ALICE, BOB, ADMIN = new_key(), new_key(), "correct horse battery"
KEYS: dict[str, Any] = {
    "api_keys": f"alice:{key_hash(ALICE)}, bob:{key_hash(BOB)}",
    "admin_key": f"sha256:{key_hash(ADMIN)}",
}
WORDS = {"query": "red"}
ODD_ID = "été #1?/100%2F.png"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    """Wait for something that happens in the background."""
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


class _PatchedState:
    def __init__(self, state: Any, before: Callable[[list[str]], object]) -> None:
        self.patched, self._before = state, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.patched, name)

    def tokens(self, texts: list[str]) -> Any:
        self._before(texts)
        return self.patched.tokens(texts)


def before_encoding(encoder: Any, call: Callable[[list[str]], object]) -> None:
    """Call a function with the texts of each forward pass, in the model's thread; `restore` undoes it."""
    encoder.state = _PatchedState(encoder.state, call)


def restore(encoder: Any) -> None:
    """Undo `before_encoding` or `hold`."""
    encoder.state = encoder.state.patched


def hold(encoder: Any) -> tuple[threading.Event, list[str]]:
    """Block text encoding until the returned event is set; also return the texts that arrive."""
    gate, seen = threading.Event(), list[str]()

    def held(texts: list[str]) -> None:
        seen.extend(texts)
        assert gate.wait(10)

    before_encoding(encoder, held)
    return gate, seen


class _Transport(httpx.ASGITransport):
    """Delay requests like a network, so other tasks and threads run: cached responses would never yield."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.001)
        return await super().handle_async_request(request)


class ServiceClient(httpx.AsyncClient):
    """A client of an application in this process."""

    app: FastAPI


@asynccontextmanager
async def opened(index: Path, *, ready: bool = True, **given: Any) -> AsyncIterator[ServiceClient]:
    """The application, started; its state is at `client.app`."""
    app = create_app(Settings(index=index, device="cpu", **given))
    transport = _Transport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        ServiceClient(transport=transport, base_url="http://testserver") as client,
    ):
        client.app = app

        async def is_ready() -> bool:
            return _is_ready(app)

        if ready:
            await until(is_ready)
        yield client


@contextmanager
def serving(index: Path, **given: Any) -> Iterator[tuple[FastAPI, int]]:
    """The application on a real port, in a thread of this process."""
    app = create_app(Settings(index=index, device="cpu", **given))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(server_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = int(listener.getsockname()[1])
        try:
            end = time.monotonic() + 30
            while not server.started or not _is_ready(app):
                assert thread.is_alive()
                assert time.monotonic() < end, "it does not become ready"
                time.sleep(0.02)
            yield app, port
        finally:
            server.should_exit = True
            thread.join(20)


def _is_ready(app: FastAPI) -> bool:
    """True if /readyz would say so; a request for each look costs much in sum."""
    try:
        app.state.collections.require_all()
    except NotReadyError:
        return False
    return True
