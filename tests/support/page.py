"""The search page in a browser, and a service to show it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

from tests.support.service import serving

COUNT = 130  # images of the large index


@contextmanager
def served(index: Path, **given: Any) -> Iterator[str]:
    """The service on a free port; gives its address."""
    with serving(index, **given) as (_, port):
        yield f"http://127.0.0.1:{port}{given.get('below', '')}"


def ready(address: str) -> str:
    """Wait until a service answers and has loaded its indexes; return its address."""
    end = time.monotonic() + 60
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/readyz").status_code == 200:
                return address
        assert time.monotonic() < end
        time.sleep(0.05)


def until(condition: Any, seconds: float = 60) -> Any:
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

    @property
    def url(self) -> str:
        return str(self.driver.current_url)

    def parameter(self, name: str) -> list[str]:
        """Return the values of a parameter behind the # of the address."""
        return parse_qs(urlsplit(self.url).fragment).get(name, [])

    def js(self, source: str, *given: object) -> Any:
        return self.driver.execute_script(source, *given)

    def emulate(self, **features: object) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]})  # fmt: skip

    def text(self, selector: str) -> str:
        return str(self.one(selector).text)

    def value(self, selector: str) -> str:
        return str(self.one(selector).get_attribute("value"))

    def has(self, selector: str) -> bool:
        return bool(self.one(selector).is_displayed())

    def ids(self) -> list[str | None]:
        """Return the ids of the results that are shown."""
        return [card.get_attribute("data-id") for card in self.all("#results .card")]

    def click(self, selector: str, place: int = 0) -> None:
        self.all(selector)[place].click()

    def type(self, selector: str, *keys: str) -> None:
        self.one(selector).send_keys(*keys)

    def scroll(self, top: int) -> None:
        self.js("scrollTo({top: arguments[0], behavior: 'instant'})", top)

    def appears(self, selector: str) -> Any:
        """Wait until an element is displayed; return it."""
        return until(lambda: self.one(selector).is_displayed() and self.one(selector))

    def vanishes(self, selector: str) -> None:
        until(lambda: not self.one(selector).is_displayed())

    def says(self, selector: str, *words: str) -> None:
        """Wait until an element's text contains these words."""
        until(lambda: all(each in self.one(selector).text for each in words))

    def arrives(self, *parts: str) -> None:
        """Wait until the address contains these parts."""
        until(lambda: all(each in self.url for each in parts))

    def shows(self, ids: list[str]) -> None:
        """Wait until exactly these results are shown."""
        until(lambda: not self.all("#results[aria-busy]") and self.ids() == ids)

    def detail(self, place: int = 0, of: str = "#results") -> Any:
        """Open the detail view of a card."""
        self.click(f"{of} .open", place)
        return self.appears("#detail")

    def close(self) -> None:
        self.click("#close")
        self.vanishes("#detail")

    def similar(self, cards: int) -> list[Any]:
        """Search for what is like the item of the detail view."""
        self.click("#similar")
        self.arrives("item=")
        return self.settled(cards)

    def barriers(self) -> list[Any]:
        """Return the violations of accessibility that axe finds."""
        self.js((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
        run = "axe.run({resultTypes: ['violations']}).then((result) => arguments[0](result.violations))"
        found = self.driver.execute_async_script(run)
        return [(each["id"], [node["html"][:120] for node in each["nodes"][:3]]) for each in found]

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
        """Return what the browser logged, except refused images, which the page loads again, and an ended service."""
        logged = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]
        shown = [message for message in logged if "net::ERR_CONNECTION_REFUSED" not in message]
        return [message for message in shown if not ("/image?size=" in message and "status of 503" in message)]
