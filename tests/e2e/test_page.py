"""The search page and the API documentation in a real browser."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.support.page import Page, searched, served, until

pytestmark = pytest.mark.browser


def test_typing_searches_and_a_result_leads_to_similar_ones(both: Page, site: str) -> None:
    both.open(site)
    both.settled(24)  # the gallery
    assert both.one("#status").text == "24 images"
    assert both.one("#start").is_displayed()
    assert both.driver.switch_to.active_element == both.one("#query")
    both.one("#query").send_keys("red circle")
    until(lambda: both.driver.current_url.endswith("#q=red+circle"))
    cards = both.settled(24)
    assert both.one("#status").text.startswith("The best 24 of 24 images")
    assert not both.one("#start").is_displayed()
    caption = cards[0].find_element("css selector", ".caption").text
    assert caption.startswith("a ")

    cards[0].find_element("css selector", ".open").click()
    until(lambda: both.one("#detail").is_displayed())
    both.one("#similar").click()
    both.settled(23)
    assert "#item=" in both.driver.current_url
    assert not both.one("#detail").is_displayed()
    assert caption in both.one("#chips").text
    assert both.one("#query").get_attribute("value") == ""
    item_address = both.driver.current_url

    both.driver.back()
    both.driver.back()
    both.settled(24)
    assert both.one("#query").get_attribute("value") == "red circle"
    assert both.all(".chip") == []

    both.open(item_address)  # as a shared link
    both.settled(23)
    until(lambda: caption in both.one("#chips").text)
    both.one("#query").send_keys("blue")  # words combine with the item
    until(lambda: "q=blue" in both.driver.current_url and "item=" in both.driver.current_url)
    both.settled(23)
    (item,) = parse_qs(urlsplit(item_address).fragment)["item"]
    assert both.ids() == searched(site, query="blue", more_like=[item])
    both.one("#chips button").click()
    both.settled(24)
    assert both.driver.current_url.endswith("#q=blue")


def test_examples_come_from_the_gallery(page: Page, site: str) -> None:
    page.open(site)
    examples = until(lambda: page.all("#examples button"))
    words = [each.text for each in examples]
    assert len(set(words)) == 6
    known = {item["caption"] for item in httpx.get(f"{site}/items", params={"k": 100}).json()["items"]}
    assert set(words) <= known
    examples[1].click()
    until(lambda: "#q=" in page.driver.current_url)
    page.settled(24)
    assert page.one("#query").get_attribute("value") == words[1]


def test_names_that_a_camera_gives_are_no_examples(page: Page, site: str) -> None:
    page.open(site)
    names = ("IMG 0001", "04991", "PXL 20230101 123456", "IMG-20230101-WA0001", "banded 0125", "barn owl-3", "DSCN0001")
    items = [{"id": name, "caption": "", "category": "", "metadata": {"title": name}} for name in names]
    items[0]["category"] = "2019 Italy"
    script = "import('/ui/start.js').then((module) => arguments[1](module.examplesAmong(arguments[0])))"
    found = page.driver.execute_async_script(script, items)
    assert found == [["2019 Italy", "IMG 0001"], ["banded", "banded 0125"], ["barn owl-3", "barn owl-3"]]


def test_image_and_words_are_searched_together(page: Page, site: str, tiny_gallery: Path) -> None:
    page.open(site)
    page.one("#file").send_keys(str(tiny_gallery / "circle/blue.png"))
    until(lambda: "picture=" in page.driver.current_url)
    cards = page.settled(24)
    assert "blue.png" in page.one("#chips").text
    assert cards[0].find_element("css selector", ".number").text == "100%"
    assert page.driver.execute_script("return document.querySelector('.chip img').naturalWidth") > 0

    page.one("#query").send_keys("green")
    until(lambda: "#q=green&picture=" in page.driver.current_url)
    page.settled(24)
    file = {"file": (tiny_gallery / "circle/blue.png").read_bytes()}
    found = httpx.post(f"{site}/search/image", files=file, data={"query": "green", "k": "24"}).json()["results"]
    assert page.ids() == [each["id"] for each in found]
    page.one("#chips button").click()
    until(lambda: page.driver.current_url.endswith("#q=green"))
    page.settled(24)


def test_dropped_and_pasted_images_are_searched(page: Page, site: str) -> None:
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
        until(lambda way=way: f"{way}.png" in page.one("#chips").text)
        page.settled(24)


def test_errors_are_shown_in_words(page: Page, site: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.open(site)
    page.one("#file").send_keys(str(broken))
    until(lambda: page.one("#error").is_displayed())
    assert "not an image" in page.one("#error").text
    assert page.all("#results .card") == []
    page.one("#chips button").click()
    page.settled(24)
    assert not page.one("#error").is_displayed()
    refused = page.errors()  # Chromium logs every 4xx itself
    assert len(refused) == 1
    assert "422" in refused[0]


def test_category_of_an_image_filters(page: Page, site: str) -> None:
    page.open(f"{site}/#q=red")
    cards = page.settled(24)
    category = cards[0].find_element("css selector", ".category")
    name = category.text
    category.click()
    cards = page.settled(6)
    assert {card.find_element("css selector", ".category").text for card in cards} == {name}
    assert page.one("#facets [aria-pressed=true]").get_attribute("textContent") == f"{name}6"
    query = page.one("#query")
    query.clear()
    query.send_keys("green")  # the filter stays
    until(lambda: "q=green" in page.driver.current_url)
    page.settled(6)
    page.open(f"{site}/#q=red&category=nothing")
    until(lambda: page.one("#nothing").is_displayed())
    assert "No images have all of these filters" in page.one("#nothing").text
    page.one("#clear-filters").click()
    page.settled(24)
    assert page.driver.current_url.endswith("#q=red")


def test_documentation_sends_requests(page: Page, site: str, tiny_gallery: Path) -> None:
    documented = httpx.get(f"{site}/openapi.json").json()["paths"].values()
    page.open(f"{site}/docs")
    until(lambda: len(page.all(".opblock")) == sum(map(len, documented)))
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


def test_pages_work_below_a_path_of_a_proxy(page: Page, indexes: dict[str, Path]) -> None:
    with served(indexes["shapes"], below="/pictures") as address:
        page.open(f"{address}/")
        until(lambda: page.all("#results .card"))
        page.open(f"{address}/docs#/service/healthz")
        until(lambda: page.all(".opblock .try-out__btn"))[0].click()
        until(lambda: page.all(".opblock .execute"))[0].click()
        until(lambda: '"status": "ok"' in page.one(".live-responses-table").text)
