"""The search page and the API documentation in a real browser."""

from pathlib import Path

import httpx
import pytest

from tests.support.page import Page, until

pytestmark = pytest.mark.browser


def test_search_by_text_and_by_clicking_a_result(page: Page, site: str) -> None:
    page.open(site)
    assert page.one("#empty").is_displayed()
    assert page.driver.switch_to.active_element == page.one("#query")
    page.one("#query").send_keys("red circle")  # typing starts the search
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

    page.open(item_address)  # as a shared link
    page.settled(23)
    until(lambda: caption in page.one("#chip").text)
    page.one("#chip-clear").click()
    until(lambda: page.one("#empty").is_displayed())
    assert page.errors() == []


def test_examples_and_number_of_results(page: Page, site: str) -> None:
    page.open(site)
    examples = until(lambda: page.all("#examples button"))
    words = [each.text for each in examples]
    assert len(set(words)) == 6
    known = {item["caption"] for item in httpx.get(f"{site}/items", params={"k": 100}).json()["items"]}
    assert set(words) <= known, "examples come from the gallery"
    examples[1].click()
    page.settled(24)
    assert page.one("#query").get_attribute("value") == words[1]
    assert examples[1].get_attribute("aria-pressed") == "true"
    page.one("#k option").click()
    page.settled(12)
    assert "k=12" in page.driver.current_url
    assert page.errors() == []


def test_search_by_image(page: Page, site: str, tiny_gallery: Path) -> None:
    page.open(site)
    page.one("#file").send_keys(str(tiny_gallery / "circle/blue.png"))
    cards = page.settled(24)
    assert page.one("#chip").is_displayed()
    assert "blue.png" in page.one("#chip").text
    assert float(cards[0].find_element("css selector", ".number").text) > 0.999
    assert page.driver.execute_script("return document.getElementById('chip-image').naturalWidth") > 0

    page.one("#query").send_keys("green")  # text replaces the image
    until(lambda: "#q=green" in page.driver.current_url)
    page.settled(24)
    assert not page.one("#chip").is_displayed()
    assert page.errors() == []


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
        until(lambda way=way: f"{way}.png" in page.one("#chip").text)
        page.settled(24)
    assert page.errors() == []


def test_errors_are_shown_in_words(page: Page, site: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.open(site)
    page.one("#file").send_keys(str(broken))
    until(lambda: page.one("#error").is_displayed())
    assert "not an image" in page.one("#error").text
    assert page.all("#results .card") == []
    page.one("#query").send_keys("red")
    page.settled(24)
    assert not page.one("#error").is_displayed()
    refused = page.errors()  # Chromium logs every 4xx itself
    assert len(refused) == 1
    assert "422" in refused[0]


def test_clicking_a_category_filters(page: Page, site: str) -> None:
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


def test_documentation_sends_requests(page: Page, site: str, tiny_gallery: Path) -> None:
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
