"""A search by a picture: chosen, dropped or pasted; with words; a part of it; pictures
that the browser cannot show.
"""

import json
from pathlib import Path

import httpx
import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.support.images import draw, encoded
from tests.support.page import Page, until

pytestmark = pytest.mark.browser


def crop_of(page: Page) -> list[float]:
    return [float(edge) for crop in page.parameter("crop") for edge in crop.split(",")]


def results(
    site: str,
    picture: Path,
    crop: list[float] | None = None,
    **form: str,
) -> list[dict[str, object]]:
    if crop:
        form["crop"] = json.dumps(
            dict(zip(("x", "y", "width", "height"), crop, strict=True))
        )
    answer = httpx.post(
        f"{site}/search/image",
        files={"file": picture.read_bytes()},
        data={"k": "24", **form},
    )
    assert answer.status_code == 200, answer.text
    return list(answer.json()["results"])


def test_picture_and_words_are_searched_together(
    page: Page,
    site: str,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    picture = tiny_gallery / "circle/blue.png"
    page.open(site)
    page.type("#file", str(picture))
    page.arrives("picture=")
    page.settled(24)
    assert "blue.png" in page.text("#chips")
    assert page.text("#results .number") == "100%"
    page.loads(".chip img")
    page.type("#query", "green")
    page.arrives("#q=green&picture=")
    page.shows([str(each["id"]) for each in results(site, picture, query="green")])
    page.click("#chips button")
    until(lambda: page.url.endswith("#q=green"))
    page.settled(24)

    (tmp_path / "broken.png").write_bytes(b"not an image")
    page.open(site)
    page.type("#file", str(tmp_path / "broken.png"))
    page.says("#error", "not an image")
    assert page.all("#results .card") == []
    page.click("#chips button")
    page.settled(24)
    assert not page.has("#error")
    assert ["422" in message for message in page.errors()] == [True], (
        "Chromium logs every 4xx itself"
    )


def test_dropped_and_pasted_pictures_are_searched(page: Page, site: str) -> None:
    make = """
        const done = arguments[1], canvas = document.createElement('canvas');
        canvas.width = canvas.height = 20;
        canvas.toBlob((blob) => {
            const carried = new DataTransfer();
            carried.items.add(new File(['words'], 'notes.txt', {type: 'text/plain'}));
            const file = new File([blob], `${arguments[0]}.png`, {type: 'image/png'});
            carried.items.add(file);
            const event = arguments[0] === 'paste'
                ? new ClipboardEvent('paste', {clipboardData: carried, bubbles: true})
                : new DragEvent('drop', {
                    dataTransfer: carried, bubbles: true, cancelable: true});
            document.body.dispatchEvent(event);
            done();
        });
    """
    page.open(site)
    for way in ("drop", "paste"):
        page.later(make, way)
        page.says("#chips", f"{way}.png")
        page.settled(24)


def test_part_of_the_picture_is_searched(both: Page, site: str, tmp_path: Path) -> None:
    page = both
    picture = tmp_path / "halves.png"
    image = Image.new("RGB", (400, 200), "blue")
    image.paste("red", (0, 0, 200, 200))
    image.save(picture)

    def searches(crop: list[float]) -> None:
        until(lambda: crop_of(page) == pytest.approx(crop, abs=1e-3))
        page.shows([str(each["id"]) for each in results(site, picture, crop_of(page))])

    page.open(site)
    page.type("#file", str(picture))
    frame = until(
        lambda: (
            page.one("#picture-frame").size["width"] > 100
            and page.one("#picture-frame")
        )
    )
    searches([])
    assert not page.has("#whole")
    width = frame.size["width"]
    height = frame.size["height"]
    if page.js("return matchMedia('(pointer: coarse)').matches"):
        place = frame.rect
        corners = [
            (place["x"] + 4, place["y"] + 4),
            (place["x"] + width / 2, place["y"] + height - 4),
        ]
        for kind, points in (
            ("touchStart", corners[:1]),
            ("touchMove", corners[1:]),
            ("touchEnd", []),
        ):
            page.cdp(
                "Input.dispatchTouchEvent",
                type=kind,
                touchPoints=[{"x": x, "y": y} for x, y in points],
            )
    else:
        drag = ActionChains(page.driver, duration=20)
        drag.move_to_element_with_offset(
            frame,
            4 - width // 2,
            4 - height // 2,
        ).click_and_hold()
        drag.move_to_element_with_offset(frame, 0, height // 2 - 4).release().perform()
    x, y, w, h = until(lambda: crop_of(page))
    assert [x, y, w, h] == pytest.approx([0, 0, 0.5, 1], abs=0.1)
    searches([x, y, w, h])
    page.type("#box", Keys.ARROW_RIGHT)
    searches([x + 0.02, y, w, h])
    page.type("#box", Keys.SHIFT, Keys.ARROW_LEFT, Keys.NULL)
    searches([x + 0.02, y, w - 0.02, h])


def test_heic_picture_is_searched_though_the_browser_cannot_show_it(
    page: Page,
    site: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "phone.heic").write_bytes(
        encoded(Image.new("RGB", (64, 64), "red"), "HEIF")
    )
    page.open(site)
    page.type("#file", str(tmp_path / "phone.heic"))
    page.says("#picture-hint", "cannot show this kind of image")
    page.settled(24)
    assert page.text("#status").startswith("The best 24 of 24 images")
    assert "phone.heic" in page.text("#chips")


def test_the_page_says_if_nothing_fits_a_picture(
    page: Page,
    large: str,
    tmp_path: Path,
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "night.png")
    draw("red", "square").save(tmp_path / "red.png")  # one of the gallery
    page.open(large)
    page.type("#file", str(tmp_path / "night.png"))
    page.says("#nothing", "Nothing fits this image well", "images that come nearest.")
    page.type("#file", str(tmp_path / "red.png"))
    page.says("#chips", "red.png")
    page.vanishes("#nothing")
