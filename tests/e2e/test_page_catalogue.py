"""Words beside vectors, one image for each product, filters with counts, and a part of the query image."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.support.page import Page, searched, until
from tests.support.parts import needs

pytestmark = pytest.mark.browser


def shows(page: Page, wanted: list[str]) -> bool:
    return not page.all("#results[aria-busy]") and page.ids() == wanted


def value(page: Page, field: str, name: str) -> Any:
    """Return the button of a facet's value."""
    sections = [each for each in page.all("#facets section") if each.find_element("css selector", "h3").text == field]
    buttons = [button for section in sections for button in section.find_elements("css selector", "button")]
    return next(button for button in buttons if button.text.split("\n")[0] == name)


def facet(page: Page, field: str) -> dict[str, str]:
    script = """
        const section = [...document.querySelectorAll('#facets section')]
            .find((each) => each.querySelector('h3').textContent === arguments[0]);
        return [...section?.querySelectorAll('li button') ?? []]
            .map((each) => [each.querySelector('span').textContent, each.querySelector('small').textContent]);
    """
    return dict(page.driver.execute_script(script, field))


def test_words_are_looked_up_where_the_page_says_so(page: Page, site: str) -> None:
    page.open(f"{site}/#q=red+square")
    until(lambda: shows(page, searched(site, query="red square")))
    assert not page.one("#words").is_selected()
    assert page.one("#scores summary").text.startswith("What does ")
    page.one("#scores summary").click()
    assert "Only the same image reaches 100%" in page.one("#scores").text
    page.one("#words").click()
    until(lambda: shows(page, searched(site, query="red square", hybrid=True)))
    assert "words=1" in page.driver.current_url
    first = page.one("#results .card")
    assert "a red square" in first.text
    assert "all words" in first.text
    assert first.find_element("css selector", ".number").text == "good match", (
        "its percentage may be lower than the next"
    )
    assert page.one("#scores summary").text == "Why this order?"
    page.one("#words").click()
    until(lambda: shows(page, searched(site, query="red square")))
    assert "words=" not in page.driver.current_url


def test_each_product_is_shown_once_and_opens_the_others(page: Page, many: str) -> None:
    url = f"{many}/collections/products"
    page.open(f"{many}/#in=products")
    page.settled(6)
    assert page.one("#status").text == "6 images, one for each color"
    assert {each.text for each in page.all("#results .near")} == {"3 more"}
    page.one("#query").send_keys("circle")
    until(lambda: shows(page, searched(url, query="circle")) and len(page.all("#results .card")) == 6)
    opened = page.ids()[0]
    page.driver.execute_script("document.querySelector('#results .near').click()")
    until(lambda: page.one("#detail").is_displayed() and page.one("#folded").is_displayed())
    assert page.one("#folded h3").text == "Same color"
    color = httpx.get(f"{url}/items/{opened}").json()["metadata"]["color"]
    others = page.all("#folded button")
    assert len(others) == 3
    others[0].click()
    until(lambda: page.one("#detail-title").text.startswith(f"a {color}") and opened not in page.driver.current_url)
    until(lambda: len(page.all("#folded button")) == 3)


def test_facets_count_and_filter(both: Page, site: str) -> None:
    page = both
    chosen = {"filter": json.dumps({"category": "circle", "color": "blue"})}
    blue_circles = [item["id"] for item in httpx.get(f"{site}/items", params=chosen).json()["items"]]
    page.open(site)
    page.settled(24)
    if not page.one("#facets").is_displayed():
        page.one("#filters summary").click()
    until(lambda: facet(page, "Category") == dict.fromkeys(("circle", "cross", "square", "triangle"), "6"))
    assert set(facet(page, "Color").values()) == {"4"}
    value(page, "Color", "red").click()
    page.settled(4)
    assert page.one("#status").text == "4 images"
    until(lambda: set(facet(page, "Category").values()) == {"1"})
    assert set(facet(page, "Color").values()) == {"4"}, "another color can be chosen"
    value(page, "Category", "circle").click()
    page.settled(1)
    until(lambda: set(facet(page, "Color").values()) == {"1"})
    value(page, "Color", "blue").click()
    until(lambda: shows(page, blue_circles))
    value(page, "Color", "blue").click()
    page.settled(6)
    page.driver.execute_script("scrollTo(0, 0)")
    page.one("#query").send_keys("red")
    until(lambda: shows(page, searched(site, query="red", filter={"category": "circle"})))
    page.driver.back()
    page.driver.back()
    until(lambda: shows(page, blue_circles))
    assert value(page, "Color", "blue").get_attribute("aria-pressed") == "true"
    page.open(page.driver.current_url)  # as a shared link
    until(lambda: shows(page, blue_circles))


def crop_of(page: Page) -> list[float]:
    crop = parse_qs(urlsplit(page.driver.current_url).fragment).get("crop", [""])[0]
    return [float(edge) for edge in crop.split(",")] if crop else []


def test_part_of_the_query_image_is_searched(both: Page, site: str, tmp_path: Path) -> None:
    page = both
    image = Image.new("RGB", (400, 200), "blue")
    image.paste("red", (0, 0, 200, 200))
    image.save(tmp_path / "halves.png")

    def is_searched(crop: list[float] | None) -> bool:
        form = {"k": "24"}
        if crop is not None:
            form["crop"] = json.dumps(dict(zip(("x", "y", "width", "height"), crop, strict=True)))
        file = {"file": (tmp_path / "halves.png").read_bytes()}
        results = httpx.post(f"{site}/search/image", files=file, data=form).json()["results"]
        return shows(page, [result["id"] for result in results])

    page.open(site)
    page.one("#file").send_keys(str(tmp_path / "halves.png"))
    frame = until(lambda: page.one("#picture-frame").size["width"] > 100 and page.one("#picture-frame"))
    until(lambda: is_searched(None))
    assert not page.one("#whole").is_displayed()
    width, height = frame.size["width"], frame.size["height"]
    if page.driver.execute_script("return matchMedia('(pointer: coarse)').matches"):
        place = frame.rect
        corners = [(place["x"] + 4, place["y"] + 4), (place["x"] + width / 2, place["y"] + height - 4)]
        for kind, points in (("touchStart", corners[:1]), ("touchMove", corners[1:]), ("touchEnd", [])):
            touches = [{"x": x, "y": y} for x, y in points]
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    else:
        drag = ActionChains(page.driver, duration=20)
        drag.move_to_element_with_offset(frame, 4 - width // 2, 4 - height // 2).click_and_hold()
        drag.move_to_element_with_offset(frame, 0, height // 2 - 4).release().perform()
    until(lambda: crop_of(page))
    assert crop_of(page) == pytest.approx([0, 0, 0.5, 1], abs=0.1)
    until(lambda: is_searched(crop_of(page)))
    drawn = crop_of(page)
    box = page.one("#box")
    box.send_keys(Keys.ARROW_RIGHT)
    until(lambda: crop_of(page) == pytest.approx([drawn[0] + 0.02, *drawn[1:]], abs=1e-3))
    box.send_keys(Keys.SHIFT, Keys.ARROW_LEFT, Keys.NULL)
    until(lambda: crop_of(page) == pytest.approx([drawn[0] + 0.02, drawn[1], drawn[2] - 0.02, drawn[3]], abs=1e-3))
    until(lambda: is_searched(crop_of(page)))
    page.one("#whole").click()
    until(lambda: not crop_of(page) and is_searched(None))
    page.one("#chips button").click()
    page.settled(24)
    assert not page.one("#picture").is_displayed()


def percentages(page: Page) -> list[float]:
    return [float(each.text.rstrip("%")) for each in page.all("#results .number")]


def test_large_photo_is_sent_small_and_found_as_if_it_were_whole(page: Page, site: str, tmp_path: Path) -> None:
    """It lies on its side in its file, and the browser turns it before it drops the note that says so."""
    spots = np.random.default_rng(1).integers(0, 256, (8, 12), np.uint8)
    photo = Image.fromarray(spots).resize((1500, 1000)).convert("RGB")
    photo.paste("blue", (0, 0, 750, 1000))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=turned, quality=90)
    data = (tmp_path / "photo.jpg").read_bytes()
    watch = """
        const whole = window.fetch;
        window.fetch = (path, options) => {
            if (path === 'search/image') window.sent = options.body.get('file').size;
            return whole(path, options);
        };
    """
    with page.script(watch):
        for crop in ("", "0.25,0,0.75,0.75"):
            box = dict(zip(("x", "y", "width", "height"), map(float, crop.split(",")), strict=True)) if crop else None
            form = {"k": "24", **({"crop": json.dumps(box)} if box else {})}
            page.open(site)
            page.settled(24)
            answer = httpx.post(f"{site}/search/image", files={"file": data}, data=form)
            assert answer.status_code == 200, answer.text
            results = answer.json()["results"]
            page.one("#file").send_keys(str(tmp_path / "photo.jpg"))
            until(lambda: "picture=" in page.driver.current_url)
            if crop:
                page.driver.execute_script("location.hash += `&crop=${arguments[0]}`", crop)
            page.settled(24)
            until(lambda crop=crop: bool(crop_of(page)) == bool(crop))
            expected = pytest.approx([100 * max(0, each["score"]) for each in results], abs=2)
            until(
                lambda expected=expected: percentages(page) == expected
            )  # at first, those of the whole photo are shown
            assert 1000 < page.driver.execute_script("return window.sent") < len(data) / (1 if crop else 1.5)


@needs("heic")
def test_heic_image_is_searched_though_the_browser_cannot_show_it(page: Page, site: str, tmp_path: Path) -> None:
    import pillow_heif

    pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(tmp_path / "phone.heic")
    page.open(site)
    page.one("#file").send_keys(str(tmp_path / "phone.heic"))
    until(lambda: "cannot show this kind of image" in page.one("#picture-hint").text)
    page.settled(24)
    assert page.one("#status").text.startswith("The best 24 of 24 images")
    assert "phone.heic" in page.one("#chips").text
