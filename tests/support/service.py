"""The application over a real index, in this process through ASGI or on a port."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from inspect import isawaitable
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from app.core.callers import key_hash, new_key
from app.core.settings import Settings
from app.main import create_app
from app.server import server_config
from dcar_core import Encoder
from dcar_core.util.errors import DcarError
from tests.support.commands import Command
from tests.support.processes import free_port

ALICE = new_key()
BOB = new_key()
ADMIN = "correct horse battery"
KEYS: dict[str, Any] = {
    "api_keys": f"alice:{key_hash(ALICE)}, bob:{key_hash(BOB)}",
    "admin_key": f"sha256:{key_hash(ADMIN)}",
}
ADMIN_ONLY: dict[str, Any] = {"admin_key": ADMIN}
WORDS = {"query": "red"}
SERVE = (
    "from app.server import serve; from app.core.settings import load_settings;"
    " serve(load_settings())"
)
ODD_ID = "été #1?/100%2F.png"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def until(
    condition: Callable[[], Awaitable[bool] | bool], seconds: float = 60
) -> None:
    """Wait for something that happens in the background."""
    end = time.monotonic() + seconds
    while not (await found if isawaitable(found := condition()) else found):
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


async def until_ready(client: httpx.AsyncClient, **expected: Any) -> dict[str, Any]:
    """Wait until /readyz has these values, and return its body."""
    body: dict[str, Any] = {}

    async def is_reached() -> bool:
        response = await client.get("/readyz")
        body.update(response.json())
        return {name: body.get(name) for name in expected} == expected

    await until(is_reached)
    return body


class _PatchedState:
    def __init__(self, state: Any, before: Callable[[list[str]], object]) -> None:
        self.patched = state
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.patched, name)

    def tokens(self, texts: list[str]) -> Any:
        self._before(texts)
        return self.patched.tokens(texts)


def before_encoding(encoder: Any, call: Callable[[list[str]], object]) -> None:
    """Call a function with the texts of each forward pass, in the model's thread;
    `restore` undoes it.
    """
    encoder.state = _PatchedState(encoder.state, call)


def restore(encoder: Any) -> None:
    """Undo `before_encoding` or `hold`."""
    encoder.state = encoder.state.patched


def hold(encoder: Any) -> tuple[threading.Event, list[str]]:
    """Block text encoding until the returned event is set; also return the texts that
    arrive.
    """
    gate = threading.Event()
    seen = list[str]()

    def held(texts: list[str]) -> None:
        seen.extend(texts)
        assert gate.wait(10)

    before_encoding(encoder, held)
    return gate, seen


class _Transport(httpx.ASGITransport):
    """Delay requests like a network, so other tasks and threads run: cached responses
    would never yield.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.001)
        return await super().handle_async_request(request)


class ServiceClient(httpx.AsyncClient):
    """A client of an application in this process."""

    app: FastAPI
    transport: httpx.ASGITransport

    @property
    def encoder(self) -> Encoder:
        """That of the served version."""
        encoder: Encoder = self.app.state.collections[None].current.encoder
        return encoder


@asynccontextmanager
async def opened(
    index: Path,
    *,
    ready: bool = True,
    on_start_failure: Callable[[DcarError], None] | None = None,
    **given: Any,
) -> AsyncIterator[ServiceClient]:
    """The application, started; its state is at `client.app`."""
    app = create_app(
        Settings(index=index, device="cpu", **given), on_start_failure=on_start_failure
    )
    transport = _Transport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        ServiceClient(transport=transport, base_url="http://localhost") as client,
    ):
        client.app = app
        client.transport = transport
        if ready:
            await until(lambda: _is_ready(app))
        yield client
    gc.unfreeze()  # what the first load has frozen


@contextmanager
def serving(
    index: Path,
    *,
    below: str = "",
    **given: Any,
) -> Iterator[tuple[FastAPI, int]]:
    """The application on a real port, in a thread of this process. below: a path that a
    proxy removes.
    """
    app = create_app(Settings(index=index, device="cpu", **given))

    async def behind_proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if scope["path"].startswith(below):
                path = scope["path"].removeprefix(below)
            else:
                path = "/outside"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await app(scope, receive, send)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(server_config(behind_proxy if below else app))
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
            gc.unfreeze()


@contextmanager
def _ready_client(
    port: int, process: subprocess.Popen[str] | None = None
) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        end = time.monotonic() + 150
        is_ready = False
        while not is_ready:
            assert process is None or process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "it does not become ready"
            time.sleep(0.1)  # each request is a line in a pipe that is not read yet
            with suppress(httpx.TransportError):
                is_ready = client.get("/readyz").status_code == 200
        yield client


@contextmanager
def serving_process(
    index: Path,
    script: str = SERVE,
    **settings: str,
) -> Iterator[tuple[Command, httpx.Client, list[str]]]:
    """The service in a process of its own, a client of it, and its log, which has all
    lines once it has ended.
    """
    port = free_port()
    log = list[str]()
    environment = {
        "DCAR_INDEX": str(index),
        "DCAR_PORT": str(port),
        "DCAR_DEVICE": "cpu",
        **settings,
    }
    process = Command("-c", script, environment=environment)
    try:
        with _ready_client(port) as client:
            yield process, client, log
    finally:
        process.send_signal(signal.SIGTERM)
        log += process.communicate(timeout=20)[1].splitlines()


@contextmanager
def serving_by(
    python: str,
    *command: str | Path,
    **environment: str,
) -> Iterator[httpx.Client]:
    """A client of a dcar command that serves, run by an interpreter with these
    variables.
    """
    port = free_port()
    arguments = [python, "-m", "app.cli", *command, "--port", str(port)]
    process = subprocess.Popen(
        arguments,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with _ready_client(port, process) as client:
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=20)


def _is_ready(app: FastAPI) -> bool:
    """True if /readyz would say so; a request for each look costs much in sum."""
    return app.state.collections.missing is None
