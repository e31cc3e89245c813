"""The page and the documentation in a real browser, before a real server with the tiny index."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import uvicorn

from app.main import create_app
from app.settings import Settings
from index_jobs.rebuild import rebuild

pytestmark = pytest.mark.browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1100,900",
)  # fmt: skip


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """A server on a free port; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(settings), log_config=None, ws="none", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        listener.close()


def ready(address: str) -> str:
    end = time.monotonic() + 60
    while httpx.get(f"{address}/readyz").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    return address


@pytest.fixture(scope="module")
def site(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    index = tmp_path_factory.mktemp("page") / "index"
    rebuild(tiny_gallery, tiny_checkpoint, index, workers=0, progress=False)
    with served(Settings(index=index, device="cpu")) as address:
        yield ready(address)


@pytest.fixture(scope="module")
def two(
    tiny_data: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Two collections; in the default one a cut-off is calibrated."""
    path = tmp_path_factory.mktemp("two")
    rebuild(tiny_data, tiny_checkpoint, path / "shapes", workers=0, progress=False, validation=tiny_data)
    rebuild(tiny_data / "circle", other_checkpoint, path / "circles", workers=0, progress=False)
    settings = Settings(index=path / "shapes", collections={"circles": path / "circles"}, device="cpu")
    with served(settings) as address:
        yield ready(address)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no browser to drive: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'dcar[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


def until(condition: Any, seconds: float = 15) -> Any:
    """Wait until it is true and does not stumble over an element that was just replaced."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        found: Any = None
        try:
            found = condition()
        except WebDriverException as error:
            found, last = None, error
        else:
            last = None
        if found:
            return found
        assert time.monotonic() < end, f"it does not happen: {last or condition}"
        time.sleep(0.05)


class Page:
    """What a visitor sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def open(self, address: str) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(address)

    def settled(self, cards: int) -> list[Any]:
        """The results, once there are this many, their pictures shown and no request under way."""
        until(lambda: len(self.all("#results .card")) == cards and not self.all("#results[aria-busy]"))
        loaded = "return [...document.querySelectorAll('#results img')].every(i => i.complete && i.naturalWidth > 0)"
        self.driver.execute_script("document.querySelectorAll('#results img').forEach(i => i.loading = 'eager')")
        until(lambda: self.driver.execute_script(loaded))
        return self.all("#results .card")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture
def page(browser: Any) -> Page:
    return Page(browser)


def test_search_by_text_and_by_result(page: Page, site: str) -> None:
    page.open(site)
    assert page.one("#empty").is_displayed()
    assert page.driver.switch_to.active_element == page.one("#query")
    page.one("#query").send_keys("red circle")  # no key is needed to begin
    cards = page.settled(24)
    assert "#q=red+circle&k=24" in page.driver.current_url
    assert "24 results" in page.one("#status").text
    assert "index version 1" in page.one("#status").text
    assert not page.one("#empty").is_displayed()
    caption = cards[0].find_element("css selector", ".caption").text
    assert caption.startswith("a ")
    assert cards[0].find_element("css selector", "img").size == {"width": 96, "height": 96}

    cards[0].click()
    page.settled(23)
    assert "#item=" in page.driver.current_url
    assert page.one("#chip").is_displayed()
    assert caption in page.one("#chip").text
    assert page.one("#query").get_attribute("value") == ""
    item_address = page.driver.current_url

    page.driver.back()
    page.settled(24)
    assert page.one("#query").get_attribute("value") == "red circle"
    assert "cached" in page.one("#status").text
    assert not page.one("#chip").is_displayed()

    page.open(item_address)  # shared with somebody else
    page.settled(23)
    until(lambda: caption in page.one("#chip").text)
    page.one("#chip-clear").click()
    until(lambda: page.one("#empty").is_displayed())
    assert page.errors() == []


def test_what_is_typed_while_the_page_loads_is_kept(page: Page, two: str) -> None:
    slow = {"offline": False, "latency": 400, "downloadThroughput": -1, "uploadThroughput": -1}
    page.open(f"{two}/#q=red&k=24&in=circles")
    page.settled(6)
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        page.driver.execute_script("history.replaceState(null, '', '#in=circles'); location.reload()")
        until(lambda: page.one("#query").get_attribute("value") == "" and page.all("#collection") != [])
        page.one("#query").send_keys("a blue circle")
        until(lambda: "q=a+blue+circle" in page.driver.current_url)
        page.settled(6)
        assert page.one("#query").get_attribute("value") == "a blue circle"
        assert "in=circles" in page.driver.current_url
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow | {"latency": 0})
    assert page.errors() == []


def test_a_link_never_shows_what_it_does_not_name(page: Page, two: str) -> None:
    page.open(f"{two}/#q=red&k=24&in=gone")
    until(lambda: "no collection “gone”" in page.one("#error").text)
    page.open(f"{two}/#picture=1&k=24")
    until(lambda: "A picture is not part of a link" in page.one("#error").text)
    assert page.all("#results .card") == []
    fails_twice = """
        const whole = window.fetch; let asked = 0;
        window.fetch = (url, ...more) => (url === 'collections' && ++asked < 3
            ? Promise.resolve(new Response('{"detail": "Too busy."}', {status: 503})) : whole(url, ...more));
    """
    script = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": fails_twice})
    try:
        page.open(f"{two}/#q=red&k=24&in=circles")
        until(lambda: page.one("#error").text == "Too busy.")
        page.settled(6)
        assert not page.one("#error").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    assert page.errors() == []


def test_the_keyboard_stays_among_the_results(page: Page, site: str) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(f"{site}/#q=red&k=24")
    page.settled(24)
    page.all("#results .category")[0].send_keys(Keys.ENTER)
    page.settled(6)
    assert page.driver.switch_to.active_element == page.one("#results")
    page.one("#category").send_keys(Keys.ENTER)
    page.settled(24)
    assert page.driver.switch_to.active_element == page.one("#results")
    page.all("#results .caption")[0].send_keys(Keys.ENTER)
    page.settled(23)
    assert page.driver.switch_to.active_element == page.one("#results")
    assert page.errors() == []


def test_examples_and_the_number_of_results(page: Page, site: str) -> None:
    page.open(site)
    examples = until(lambda: page.all("#examples button"))
    words = [each.text for each in examples]
    assert len(set(words)) == 6
    known = {item["caption"] for item in httpx.get(f"{site}/items", params={"k": 100}).json()["items"]}
    assert set(words) <= known, "of the gallery"
    examples[1].click()
    page.settled(24)
    assert page.one("#query").get_attribute("value") == words[1]
    assert examples[1].get_attribute("aria-pressed") == "true"
    page.one("#k option").click()
    page.settled(12)
    assert "k=12" in page.driver.current_url
    assert page.errors() == []


def test_search_by_picture(page: Page, site: str, tiny_gallery: Path) -> None:
    page.open(site)
    page.one("#file").send_keys(str(tiny_gallery / "circle/blue.png"))
    cards = page.settled(24)
    assert page.one("#chip").is_displayed()
    assert "blue.png" in page.one("#chip").text
    assert float(cards[0].find_element("css selector", ".number").text) > 0.999
    assert page.driver.execute_script("return document.getElementById('chip-image').naturalWidth") > 0

    page.one("#query").send_keys("green")  # words take the place of the picture
    until(lambda: "#q=green" in page.driver.current_url)
    page.settled(24)
    assert not page.one("#chip").is_displayed()
    assert page.errors() == []


def test_a_dropped_and_a_pasted_picture(page: Page, site: str) -> None:
    make = """
        const done = arguments[1], canvas = document.createElement('canvas');
        canvas.width = canvas.height = 20;
        canvas.toBlob((blob) => {
            const carried = new DataTransfer();
            carried.items.add(new File(['words'], 'notes.txt', {type: 'text/plain'}));
            carried.items.add(new File([blob], `${arguments[0]}.png`, {type: 'image/png'}));
            const event = arguments[0] === 'paste'
                ? new ClipboardEvent('paste', {clipboardData: carried, bubbles: true})
                : new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true});
            document.body.dispatchEvent(event);
            done();
        });
    """
    page.open(site)
    for way in ("drop", "paste"):
        page.driver.execute_async_script(make, way)
        until(lambda way=way: f"{way}.png" in page.one("#chip").text)
        page.settled(24)
    assert page.errors() == []


def test_an_error_is_told_in_words(page: Page, site: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.open(site)
    page.one("#file").send_keys(str(broken))
    until(lambda: page.one("#error").is_displayed())
    assert "not an image" in page.one("#error").text
    assert page.all("#results .card") == []
    page.one("#query").send_keys("red")
    page.settled(24)
    assert not page.one("#error").is_displayed()
    refused = page.errors()  # Chromium itself notes every 4xx
    assert len(refused) == 1
    assert "422" in refused[0]


def test_the_collection_is_chosen(page: Page, site: str, two: str) -> None:
    page.open(site)
    assert not page.one("#where").is_displayed(), "there is nothing to choose"
    page.open(two)
    until(lambda: page.one("#where").is_displayed())
    assert [option.text for option in page.all("#collection option")] == ["shapes", "circles"]
    page.one("#query").send_keys("red")
    page.settled(24)
    page.all("#collection option")[1].click()
    cards = page.settled(6)
    assert "in=circles" in page.driver.current_url
    until(lambda: all("circle" in each.text for each in page.all("#examples button")))
    assert page.one("#query").get_attribute("value") == "red"
    cards[0].click()
    page.settled(5)
    assert "/collections/circles/" in page.one("#chip-image").get_attribute("src")
    address = page.driver.current_url
    page.driver.back()
    page.settled(6)
    page.driver.back()
    page.settled(24)
    assert page.one("#collection").get_attribute("value") == "shapes"
    until(lambda: any("square" in each.text for each in page.all("#examples button")))
    page.open(address)  # shared with somebody else
    page.settled(5)
    assert page.one("#collection").get_attribute("value") == "circles"
    assert page.errors() == []


def test_a_category_filters(page: Page, site: str) -> None:
    page.open(f"{site}/#q=red&k=24")
    cards = page.settled(24)
    category = cards[0].find_element("css selector", ".category")
    name = category.text
    category.click()
    cards = page.settled(6)
    assert {card.find_element("css selector", ".category").text for card in cards} == {name}
    assert page.one("#category").text == name
    query = page.one("#query")
    query.clear()
    query.send_keys("green")  # the filter stays
    until(lambda: "q=green" in page.driver.current_url)
    page.settled(6)
    page.one("#category").click()
    page.settled(24)
    assert not page.one("#category").is_displayed()
    page.open(f"{site}/#q=red&k=24&category=nothing")
    until(lambda: page.one("#nothing").is_displayed())
    assert "in the category “nothing”" in page.one("#nothing").text
    assert page.errors() == []


def test_explanations_are_drawn(page: Page, site: str) -> None:
    from selenium.webdriver import ActionChains

    page.open(f"{site}/#q=a+red+square&k=24")
    page.settled(24)
    assert not page.one("#words").is_displayed()
    page.one("#explain").click()
    until(lambda: page.one("#words").is_displayed())
    page.settled(24)
    assert "explain=1" in page.driver.current_url
    assert [word.text.split()[0] for word in page.all("#words .word")] == ["a", "red", "square"]
    explained = page.all("#results .card.explained")
    assert len(explained) == 8
    assert len(explained[0].find_elements("css selector", ".words .word")) == 3
    colors = page.driver.execute_script("""
        const map = document.querySelector('#results .map');
        const data = map.getContext('2d').getImageData(0, 0, map.width, map.height).data;
        return [map.width, map.height, new Set(Array.from({length: data.length / 4}, (_, i) => data[4 * i + 3])).size];
    """)
    assert colors[:2] == [4, 4], "a value a patch"
    assert colors[2] > 3, "not all alike"
    picture = page.all("#results .explained img")[0]
    ActionChains(page.driver).move_to_element(picture).click().perform()  # the whole card is its button
    page.settled(23)
    assert "#item=" in page.driver.current_url
    page.driver.back()
    page.settled(24)
    page.one("#explain").click()
    until(lambda: not page.all("#results .explained"))
    assert not page.one("#words").is_displayed()
    assert page.errors() == []


def test_what_does_not_fit_is_told_apart(page: Page, two: str) -> None:
    cut = httpx.get(f"{two}/collections").json()["collections"][0]["min_score"]
    best: dict[str, float] = {}
    fitting: dict[str, int] = {}
    for query in (
        "a red circle",
        "blue",
        "xkqz",
        "a",
        "wiring plan",
        "tax report",
        "square",
        "cathedral",
        "!",
        "9 9 9",
    ):
        found = httpx.post(f"{two}/search/text", json={"query": query, "k": 24}).json()["results"]
        best[query] = found[0]["score"]
        fitting[query] = sum(result["score"] >= cut for result in found)
    some = next(query for query, count in fitting.items() if 0 < count < 24)
    none = next((query for query, score in best.items() if score < cut), None)

    page.open(f"{two}/#q={quote(some)}&k=24")
    page.settled(24)
    assert len(page.all("#results .weak")) == 24 - fitting[some]
    assert len(page.all("#results .divider")) == 1
    assert f"{fitting[some]} that fit" in page.one("#status").text
    assert not page.one("#nothing").is_displayed()
    assert none is not None, (best, cut)
    page.open(f"{two}/#q={quote(none)}&k=24")
    page.settled(24)
    assert f"Nothing fits “{none}”" in page.one("#nothing").text
    assert len(page.all("#results .weak")) == 24
    assert page.all("#results .divider") == []
    page.all("#results .card")[0].click()  # a search by an item knows no cut-off
    page.settled(23)
    assert page.all("#results .weak") == []
    assert not page.one("#nothing").is_displayed()
    assert page.errors() == []


def test_documentation(page: Page, site: str, tiny_gallery: Path) -> None:
    page.open(f"{site}/docs")
    until(lambda: len(page.all(".opblock")) == 19)
    page.one("#operations-search-search_text .opblock-summary-control").click()
    until(lambda: "crying cat" in page.one("#operations-search-search_text").text)
    page.one("#operations-search-search_image .opblock-summary-control").click()
    until(lambda: page.all("#operations-search-search_image .try-out__btn"))[0].click()
    upload = until(lambda: page.all("#operations-search-search_image input[type=file]"))[0]
    upload.send_keys(str(tiny_gallery / "circle/red.png"))
    page.one("#operations-search-search_image .execute").click()
    until(lambda: "index_version" in page.one("#operations-search-search_image .live-responses-table").text)
    hosts = page.driver.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert set(hosts) == {site.removeprefix("http://")}
    assert page.errors() == []
