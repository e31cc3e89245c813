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
COLUMNS = """
    const tops = [...document.querySelectorAll('#results .card')]
        .map((card) => card.getBoundingClientRect().top);
    return tops.filter((top) => top === tops[0]).length;
"""
LOADED = """
    const images = [...document.querySelectorAll(arguments[0])];
    for (const image of images) image.loading = 'eager';
    return images.every((image) => image.complete && image.naturalWidth > 0);
"""


@contextmanager
def served(index: Path, **given: Any) -> Iterator[str]:
    """The service on a free port; gives its address."""
    with serving(index, **given) as (_, port):
        yield f"http://127.0.0.1:{port}{given.get('below', '')}"


def ready(address: str) -> str:
    """Wait until a service answers and has loaded its indexes; return its address."""
    until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
    return address


def until(condition: Any, seconds: float = 60) -> Any:
    """Wait until it is true and does not stumble over an element that was just
    replaced, or over a missing service.
    """
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    found = None
    while not found:
        assert time.monotonic() < end, f"it does not happen: {condition}"
        with suppress(WebDriverException, httpx.TransportError):
            found = condition()
        if not found:
            time.sleep(0.02)
    return found


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

    def texts(self, selector: str) -> list[str]:
        """Return the text of each element, shown or not."""
        return [str(each.get_attribute("textContent")) for each in self.all(selector)]

    @property
    def url(self) -> str:
        return str(self.driver.current_url)

    def parameter(self, name: str) -> list[str]:
        """Return the values of a parameter behind the # of the address."""
        return parse_qs(urlsplit(self.url).fragment).get(name, [])

    def js(self, source: str, *given: object) -> Any:
        return self.driver.execute_script(source, *given)

    def later(self, source: str, *given: object) -> Any:
        """Run a script that calls its last argument with what it gives."""
        return self.driver.execute_async_script(source, *given)

    def cdp(self, command: str, **given: object) -> Any:
        return self.driver.execute_cdp_cmd(command, given)

    def emulate(self, **features: object) -> None:
        named = [
            {"name": name.replace("_", "-"), "value": value}
            for name, value in features.items()
        ]
        self.cdp("Emulation.setEmulatedMedia", features=named)

    def text(self, selector: str) -> str:
        return str(self.one(selector).text)

    def value(self, selector: str) -> str:
        return str(self.one(selector).get_attribute("value"))

    def has(self, selector: str) -> bool:
        return bool(self.one(selector).is_displayed())

    def ids(self) -> list[str]:
        """Return the ids of the results that are shown."""
        return list(
            self.js(
                "return [...document.querySelectorAll('#results .card')].map((card) =>"
                " card.dataset.id)"
            )
        )

    def click(self, selector: str, place: int = 0) -> None:
        self.all(selector)[place].click()

    def type(self, selector: str, *keys: str) -> None:
        self.one(selector).send_keys(*keys)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def scroll(self, top: int) -> None:
        self.js("scrollTo({top: arguments[0], behavior: 'instant'})", top)

    def back(self, times: int = 1) -> None:
        for _ in range(times):
            self.driver.back()

    def appears(self, selector: str) -> Any:
        """Wait until an element is displayed; return it."""
        return until(lambda: self.one(selector).is_displayed() and self.one(selector))

    def vanishes(self, selector: str) -> None:
        until(lambda: not self.one(selector).is_displayed())

    def says(self, selector: str, *words: str) -> None:
        """Wait until an element's text contains these words."""
        until(lambda: all(word in self.one(selector).text for word in words))

    def arrives(self, *parts: str) -> None:
        """Wait until the address contains these parts."""
        until(lambda: all(part in self.url for part in parts))

    def counts(self, count: int, selector: str = "#results .card") -> None:
        """Wait until there are so many elements."""
        until(lambda: len(self.all(selector)) == count)

    def shows(self, ids: list[str]) -> None:
        """Wait until exactly these results are shown."""
        until(lambda: not self.all("#results[aria-busy]") and self.ids() == ids)

    def loads(self, selector: str) -> None:
        """Wait until the images that match are loaded."""
        until(lambda: self.js(LOADED, selector))

    def detail(self, place: int = 0, of: str = "#results") -> Any:
        """Open the detail view of a card."""
        self.js(
            "document.querySelectorAll(arguments[0])[arguments[1]].click()",
            f"{of} .open",
            place,
        )
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
        found = self.later(
            "axe.run({resultTypes: ['violations']}).then(({violations}) =>"
            " arguments[0](violations))"
        )
        return [
            (each["id"], [node["html"][:120] for node in each["nodes"][:3]])
            for each in found
        ]

    @contextmanager
    def script(self, source: str) -> Iterator[None]:
        """Run a script before those of every page that is opened."""
        added = self.cdp("Page.addScriptToEvaluateOnNewDocument", source=source)
        try:
            yield
        finally:
            self.cdp("Page.removeScriptToEvaluateOnNewDocument", **added)

    def open(self, address: str, cards: int | None = None) -> list[Any]:
        """Open a page anew, and wait for its cards."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)
        return [] if cards is None else self.settled(cards)

    def settled(self, cards: int) -> list[Any]:
        """Wait until this many results and their images are shown and no request runs;
        return them.
        """
        until(
            lambda: (
                len(self.all("#results .card")) == cards
                and not self.all("#results[aria-busy]")
            )
        )
        self.loads("#results img")
        return self.all("#results .card")

    def errors(self) -> list[str]:
        """Return what the browser logged, except refused images, which the page loads
        again, and an ended service.
        """
        logged = [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] != "INFO"
        ]
        shown = [
            message
            for message in logged
            if "net::ERR_CONNECTION_REFUSED" not in message
        ]
        return [
            message
            for message in shown
            if not ("/image?size=" in message and "status of 503" in message)
        ]


def fetching(body: str) -> str:
    """Return a script that has the page's requests go through `body` first: of `path`,
    `options` and `whole(...)`.
    """
    return f"""
        const whole = window.fetch;
        let asked = 0;
        window.fetch = async (path, options) => {{
            {body} return whole(path, options); }};
    """
