"""The search page in a browser, and a service to show it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import uvicorn

from app.core.settings import Settings
from app.main import create_app


@contextmanager
def served(settings: Settings, below: str = "") -> Iterator[str]:
    """A server on a free port; gives its address. below: a path that is removed, as by a proxy."""
    app = create_app(settings)

    async def behind_proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(below) if scope["path"].startswith(below) else "/outside"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await app(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(behind_proxy if below else app, log_config=None, ws="none", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{below}"
    finally:
        server.should_exit = True
        thread.join(15)
        listener.close()


def ready(address: str) -> str:
    """Wait until a service answers and has loaded its indexes; return its address."""
    end = time.monotonic() + 60
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/readyz").status_code == 200:
                return address
        assert time.monotonic() < end
        time.sleep(0.05)


def until(condition: Any, seconds: float = 15) -> Any:
    """Wait until it is true and does not stumble over an element that was just replaced."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        found, last = None, None
        try:
            found = condition()
        except WebDriverException as error:
            last = error
        if found:
            return found
        assert time.monotonic() < end, f"it does not happen: {last or condition}"
        time.sleep(0.02)


def searched(url: str, **body: object) -> list[str]:
    """Return the ids that a search by the API finds."""
    results = httpx.post(f"{url}/search/text", json={"k": 24, **body}).json()["results"]
    return [result["id"] for result in results]


class Page:
    """The search page in a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def ids(self) -> list[str | None]:
        """Return the ids of the results that are shown."""
        return [card.get_attribute("data-id") for card in self.all("#results .card")]

    @contextmanager
    def script(self, source: str) -> Iterator[None]:
        """Run a script before those of every page that is opened."""
        added = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

    def open(self, address: str) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)

    def settled(self, cards: int) -> list[Any]:
        """Wait until this many results and their images are shown and no request runs; return them."""
        until(lambda: len(self.all("#results .card")) == cards and not self.all("#results[aria-busy]"))
        loaded = "return [...document.querySelectorAll('#results img')].every(i => i.complete && i.naturalWidth > 0)"
        self.driver.execute_script("document.querySelectorAll('#results img').forEach(i => i.loading = 'eager')")
        until(lambda: self.driver.execute_script(loaded))
        return self.all("#results .card")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
