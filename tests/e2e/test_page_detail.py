"""The detail view, selected images and the keyboard."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.page import Page, searched, until

pytestmark = pytest.mark.browser

SWIPE = """
    const touch = (x) => new Touch({identifier: 1, target: arguments[0], clientX: x, clientY: 100});
    arguments[0].dispatchEvent(new TouchEvent('touchstart', {bubbles: true, touches: [touch(300)]}));
    arguments[0].dispatchEvent(new TouchEvent('touchend', {bubbles: true, changedTouches: [touch(100)]}));
"""


def opened(page: Page) -> Any:
    return until(lambda: page.one("#detail").is_displayed() and page.one("#detail"))


def closed(page: Page) -> bool:
    return bool(until(lambda: not page.one("#detail").is_displayed()))


def test_detail_view_shows_one_image_and_everything_known_about_it(both: Page, site: str) -> None:
    page = both
    page.open(f"{site}/#q=a+red+circle")
    page.settled(24)
    shown = page.ids()
    for jargon in ("index", "cached", "cosine", "score"):
        assert jargon not in page.one("body").text.lower()
    sources = str(page.one("#results img").get_attribute("srcset"))
    sides = [(int(side), screen) for side, screen in re.findall(r"size=(\d+) (\dx)", sources)]
    assert sides == [(sides[0][0], "1x"), (2 * sides[0][0], "2x")]
    page.one("#results .open").click()
    detail = opened(page)
    item = httpx.get(f"{site}/items/{shown[0]}").json()
    assert page.one("#detail-title").text == item["caption"]
    assert item["metadata"]["color"] in page.one("#metadata").text
    image = page.one("#detail-image")
    until(lambda: page.driver.execute_script("return arguments[0].naturalWidth", image) > 0)
    assert f"items/{shown[0]}/image?size=1280" in image.get_attribute("src")
    element = "const box = arguments[0].getBoundingClientRect();"
    at_centre = (
        f"{element} return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === arguments[0]"
    )
    assert page.driver.execute_script(at_centre, image), "a right click reaches the image"
    both_boxes = """
        const box = (image) => (({width, height}) => [width, height])(image.getBoundingClientRect());
        const empty = arguments[0].cloneNode(), loaded = box(arguments[0]);
        for (const name of ["src", "srcset"]) empty.removeAttribute(name);
        arguments[0].replaceWith(empty);
        const place = box(empty);
        empty.replaceWith(arguments[0]);
        return [loaded, place];
    """
    loaded, place = page.driver.execute_script(both_boxes, image)
    assert loaded == place, "its place is kept while it is loaded"
    assert loaded[0] == loaded[1] >= 288
    assert page.one("#download").get_attribute("href") == f"{site}/items/{shown[0]}/image"
    assert page.one("#download").get_attribute("download") == Path(item["metadata"]["file_name"]).name

    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"], "origin": site})
    page.one("#copy").click()
    until(lambda: "Link copied" in page.one("#detail-message").text)
    link = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    detail.send_keys(Keys.ARROW_RIGHT)
    until(lambda: f"show={shown[1]}" in page.driver.current_url)
    page.one("#next").click()
    until(lambda: f"show={shown[2]}" in page.driver.current_url)
    detail.send_keys(Keys.ARROW_LEFT)
    until(lambda: f"show={shown[1]}" in page.driver.current_url)
    page.driver.execute_script(SWIPE, image)
    until(lambda: f"show={shown[2]}" in page.driver.current_url)
    page.one("#close").click()
    closed(page)
    until(lambda: "show=" not in page.driver.current_url)
    assert page.ids() == shown

    page.open(link)
    opened(page)
    until(lambda: page.one("#detail-title").text == item["caption"])
    page.one("#detail").send_keys(Keys.ESCAPE)
    closed(page)
    page.settled(24)  # the gallery


def test_image_can_be_subtracted_from_a_search(page: Page, site: str) -> None:
    page.open(f"{site}/#show={searched(site, query='red')[0]}")
    opened(page)
    assert not page.one("#less").is_displayed(), "there is no search to subtract it from"
    page.open(f"{site}/#q=red")
    page.settled(24)
    unwanted = page.ids()[0]
    page.one("#results .open").click()
    opened(page)
    page.one("#less").click()
    page.settled(23)
    assert f"less={unwanted}" in page.driver.current_url
    assert page.ids() == searched(site, query="red", less_like=[unwanted])
    assert page.one("#chips").text.startswith("not like")


def test_selected_images_are_searched_together(page: Page, site: str) -> None:
    page.open(site)
    page.settled(24)
    chosen = [page.ids()[place] for place in (0, 3)]
    for place in (0, 3):
        page.all("#results .select")[place].click()
    assert page.one("#selected-count").text == "2 selected"
    assert not page.one("#selected-less").is_enabled(), "there is no search yet"
    page.one("#selected-more").click()
    page.settled(22)
    assert parse_qs(urlsplit(page.driver.current_url).fragment)["item"] == chosen
    assert page.ids() == searched(site, more_like=chosen)
    assert "like 2 images" in page.one("#chips").text
    assert not page.one("#selection").is_displayed()
    unwanted = [page.ids()[0]]
    page.all("#results .select")[0].click()
    page.one("#selected-less").click()
    page.settled(21)
    assert page.ids() == searched(site, more_like=chosen, less_like=unwanted)


def test_card_is_one_tab_stop_and_keys_move_between_cards(page: Page, site: str) -> None:

    def focused() -> str | None:
        script = "return document.activeElement.closest('.card')?.dataset.id ?? document.activeElement.id"
        return page.driver.execute_script(script)

    def press(*keys: str) -> str | None:
        page.driver.switch_to.active_element.send_keys(*keys)
        return focused()

    page.open(site)
    page.settled(24)
    shown = page.ids()
    columns = page.driver.execute_script("""
        const tops = [...document.querySelectorAll('#results .card')].map((card) => card.getBoundingClientRect().top);
        return tops.filter((top) => top === tops[0]).length;
    """)
    page.driver.execute_script("document.querySelector('#results .open').focus()")
    assert press(Keys.TAB) == shown[1]
    assert press(Keys.SHIFT, Keys.TAB) == shown[0]
    assert press(Keys.ARROW_RIGHT) == shown[1]
    assert press(Keys.ARROW_DOWN) == shown[1 + columns]
    assert press(Keys.ARROW_UP) == shown[1]
    assert press(Keys.END) == shown[-1]
    assert press(Keys.HOME) == shown[0]
    press("x")
    assert page.one("#selected-count").text == "1 selected"
    press("x")
    assert not page.one("#selection").is_displayed()
    press(Keys.ENTER)
    opened(page)
    page.one("#detail").send_keys(Keys.ESCAPE)
    closed(page)
    until(lambda: focused() == shown[0])
    assert press("/") == "query"
    press("/")
    assert page.one("#query").get_attribute("value") == "", "the page begins in the box, where the key has no other use"


def test_near_duplicates_are_one_result(page: Page, site: str) -> None:
    found = httpx.post(f"{site}/search/text", json={"query": "red", "k": 24, "fold": 0.95}).json()["results"]
    folded = {result["id"]: result["folded"] for result in found if "folded" in result}
    page.open(f"{site}/#q=red&fold=1")
    cards = page.settled(len(found))
    assert len(found) < 24
    marks = {card.get_attribute("data-id"): card.find_element("css selector", ".near").text for card in cards}
    assert {key: value for key, value in marks.items() if value} == {
        key: f"{len(near)} more" for key, near in folded.items()
    }
    first = next(iter(folded))
    page.driver.execute_script(f"document.querySelector('[data-id={json.dumps(first)}] .open').click()")
    opened(page)
    near = page.all("#folded button")
    assert len(near) == len(folded[first])
    near[0].click()
    until(lambda: f"show={folded[first][0]}" in page.driver.current_url.replace("%2F", "/"))


def test_browser_keeps_its_keys_and_the_moves_of_an_enlarged_page(phone: Page, site: str) -> None:
    page = phone

    def is_prevented(**keys: object) -> bool:
        press = "return !arguments[0].dispatchEvent(new KeyboardEvent('keydown', arguments[1]))"
        pressed = {"bubbles": True, "cancelable": True, "key": "ArrowRight", **keys}
        return bool(page.driver.execute_script(press, page.one("#detail-title"), pressed))

    page.open(f"{site}/#q=red")
    page.settled(24)
    shown = page.ids()
    page.one("#results .open").click()
    opened(page)
    for modifier in ("altKey", "ctrlKey", "metaKey"):
        assert not is_prevented(**{modifier: True})
    page.driver.execute_cdp_cmd("Emulation.setPageScaleFactor", {"pageScaleFactor": 2})
    try:
        until(lambda: page.driver.execute_script("return visualViewport.scale") == 2)
        page.driver.execute_script(SWIPE, page.one("#detail-image"))
        assert f"show={shown[0]}" in page.driver.current_url
    finally:
        page.driver.execute_cdp_cmd("Emulation.setPageScaleFactor", {"pageScaleFactor": 1})
    until(lambda: page.driver.execute_script("return visualViewport.scale") == 1)
    page.driver.execute_script(SWIPE, page.one("#detail-image"))
    until(lambda: f"show={shown[1]}" in page.driver.current_url)
    assert is_prevented()
    until(lambda: f"show={shown[2]}" in page.driver.current_url)
