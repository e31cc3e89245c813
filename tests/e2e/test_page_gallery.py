"""The gallery without words, on a phone, with a key; weight and accessibility of the page."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from index_jobs.rebuild import rebuild
from tests.support.files import write_jsonl
from tests.support.images import draw
from tests.support.page import Page, served, until
from tests.support.service import ALICE

pytestmark = pytest.mark.browser

COUNT = 130
PICTURE = Path(__file__).parents[2] / "examples/emoji/query.png"


@pytest.fixture(scope="session")
def large_index(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of more images than one page of the gallery shows, each with a price."""
    gallery = tmp_path_factory.mktemp("large") / "gallery"
    gallery.mkdir()
    rows = []
    for number in range(COUNT):
        shape = ("square", "circle", "triangle", "cross")[number % 4]
        draw(("red", "green", "blue", "orange", "purple")[number % 5], shape).save(gallery / f"{number:03}.png")
        price = (number * 37) % COUNT
        rows.append({"file_name": f"{number:03}.png", "caption": f"image {number}", "category": shape, "price": price})
    write_jsonl(gallery / "metadata.jsonl", *rows)
    rebuild(gallery, tiny_checkpoint, gallery.parent / "index", workers=0, progress=False)
    return gallery.parent / "index"


@pytest.fixture(scope="session")
def large(large_index: Path) -> Iterator[str]:
    with served(large_index) as address:
        yield address


def count(page: Page) -> int:
    return len(page.all("#results .card"))


def captions(page: Page) -> list[str]:
    script = "return [...document.querySelectorAll('#results .caption')].map((node) => node.textContent)"
    return list(page.driver.execute_script(script))


def scroll(page: Page, top: int) -> None:
    page.driver.execute_script("scrollTo({top: arguments[0], behavior: 'instant'})", top)


def top(page: Page) -> float:
    return float(page.driver.execute_script("return scrollY"))


def test_gallery_grows_while_it_is_scrolled_and_back_returns_to_the_place(both: Page, large: str) -> None:
    both.open(large)
    until(lambda: count(both) == 48)
    assert both.one("#status").text == f"{COUNT} images"
    while count(both) < COUNT:
        before = count(both)
        scroll(both, 10**6)
        until(lambda before=before: count(both) > before)
    assert captions(both) == [f"image {number}" for number in range(COUNT)]
    scroll(both, 900)
    until(lambda: both.driver.execute_script("return history.state?.top") == 900)
    both.one("#query").send_keys("red")
    until(lambda: both.driver.current_url.endswith("#q=red"))
    until(lambda: both.one("#status").text.startswith("The best"))
    both.driver.back()
    until(lambda: count(both) == COUNT)
    until(lambda: abs(top(both) - 900) < 2)
    both.driver.refresh()
    until(lambda: count(both) == COUNT)
    until(lambda: abs(top(both) - 900) < 2)
    both.driver.execute_script("document.querySelectorAll('#results .select')[12].click()")
    both.one("#selected-more").click()
    until(lambda: top(both) == 0 and both.one("#status").text.startswith("The best"))
    both.driver.back()
    until(lambda: count(both) == COUNT)
    until(lambda: abs(top(both) - 900) < 2)


def test_images_are_sorted_by_a_field(page: Page, large: str) -> None:
    def choose(value: str) -> None:
        page.driver.execute_script(
            "const sort = document.getElementById('sort'); sort.value = arguments[0];"
            "sort.dispatchEvent(new Event('change'))",
            value,
        )

    prices = {f"image {number}": (number * 37) % COUNT for number in range(COUNT)}
    page.open(f"{large}/#words=1")
    until(lambda: page.all("#sort option[value='-price']"))
    choose("-price")
    until(lambda: [prices[each] for each in captions(page)[:3]] == [COUNT - 1, COUNT - 2, COUNT - 3])
    page.one("#query").send_keys("circle")
    until(lambda: page.one("#status").text.startswith("33 images that fit, sorted"))
    while count(page) < 33:
        scroll(page, 10**6)
    circles = [number for number in range(COUNT) if number % 4 == 1]
    expected = sorted((f"image {number}" for number in circles), key=lambda caption: -prices[caption])
    assert captions(page) == expected, "all circles, and nothing else"
    page.open(f"{large}/#q=zebra&words=1&sort=-price")
    until(lambda: page.one("#nothing").text.startswith("Nothing fits “zebra” well"))
    until(lambda: page.all("#sort option[value='-price']"))
    choose("")
    until(lambda: page.one("#status").text.startswith("The best"))


def test_cards_have_the_chosen_size_and_the_whole_window(page: Page, large: str) -> None:
    columns = """
        const tops = [...document.querySelectorAll('#results .card')].map((card) => card.getBoundingClientRect().top);
        return tops.filter((top) => top === tops[0]).length;
    """
    right = "return document.getElementById('results').getBoundingClientRect().right / document.body.clientWidth"
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1920, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.open(large)
        until(lambda: count(page) == 48)
        assert page.driver.execute_script(right) > 0.98
        assert page.driver.execute_script(columns) >= 7
        change = "const size = document.getElementById('size'); size.value = 400;"
        for event in ("input", "change"):
            change += f"size.dispatchEvent(new Event('{event}'));"
        page.driver.execute_script(change)
        until(lambda: page.driver.execute_script(columns) == 3)
        assert "size=384 1x" in page.one("#results img").get_attribute("srcset"), "and sharp"
        page.driver.refresh()
        until(lambda: count(page) == 48)
        assert page.driver.execute_script(columns) == 3
    finally:
        page.driver.execute_script("localStorage.clear()")
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_numbers_are_filtered_from_a_least_to_a_greatest_one(page: Page, large: str) -> None:
    def enter(place: int, number: str) -> None:
        page.all(".between input")[place].send_keys(Keys.CONTROL + "a" + Keys.NULL + Keys.DELETE, number, Keys.TAB)

    page.open(large)
    until(lambda: len(page.all(".between input")) == 2)
    assert [each.get_attribute("placeholder") for each in page.all(".between input")] == ["0", str(COUNT - 1)]
    enter(0, "100")  # and goes on to the next field
    page.driver.switch_to.active_element.send_keys("9")
    until(lambda: page.one("#status").text == f"{COUNT - 100} images")
    assert page.all(".between input")[1].get_attribute("value") == "9", "typing goes on"
    enter(1, "109.5")
    until(lambda: page.one("#status").text == "10 images")
    page.open(page.driver.current_url)  # as a shared link
    until(lambda: page.one("#status").text == "10 images" and len(page.all(".between input")) == 2)
    assert [each.get_attribute("value") for each in page.all(".between input")] == ["100", "109.5"]
    for place in (0, 1):
        enter(place, "")
    until(lambda: page.one("#status").text == f"{COUNT} images")


def test_filters_count_what_fits_the_search(page: Page, large: str) -> None:
    counts = "return [...document.querySelectorAll('#facets button')].map((each) => each.textContent)"
    page.open(f"{large}/#q=circle&words=1")
    until(lambda: page.driver.execute_script(counts) == ["circle33"])
    page.open(f"{large}/#q=circle&words=1&category=square")
    until(lambda: page.driver.execute_script(counts) == ["square0", "circle33"])
    page.one("#facets button").click()
    until(lambda: page.driver.execute_script(counts) == ["circle33"])
    page.open(f"{large}/#q=zebra&words=1")
    until(lambda: len(page.driver.execute_script(counts)) == 4)


def test_a_search_is_counted_by_one_request_while_the_filters_are_open(phone: Page, large: str) -> None:
    page, rested = phone, "setTimeout(arguments[0], 400)"
    paths = "return performance.getEntriesByType('resource').map(({name}) => new URL(name).pathname)"

    def searches() -> list[str]:
        return [path for path in page.driver.execute_script(paths) if path.startswith("/search/")]

    page.open(f"{large}/#q=circle&words=1&category=square")
    until(lambda: page.one("#status").text.startswith("The best"))
    page.driver.execute_async_script(rested)
    assert searches() == ["/search/text"]
    page.one("#filters summary").click()
    until(lambda: [each.text.split("\n") for each in page.all("#facets li")] == [["square", "0"], ["circle", "33"]])
    assert searches() == ["/search/text", "/search/batch"]


def test_without_in_words_is_offered_as_a_box(both: Page, large: str) -> None:
    both.open(f"{large}/#q=red+square")
    until(lambda: both.one("#status").text.startswith("The best"))
    assert not both.one("#offer").is_displayed()
    for typed, offered in (("red square without a cross", "cross"), ("red square no cross", "cross")):
        both.open(f"{large}/#q={typed.replace(' ', '+')}")
        until(lambda offered=offered: f"take “{offered}” away" in both.one("#offer").text)
    both.one("#offer button").click()
    until(lambda: both.driver.current_url.endswith("#q=red+square&without=cross"))
    until(lambda: both.one("#without").is_displayed() and both.one("#without").get_attribute("value") == "cross")
    assert not both.one("#offer").is_displayed()


def test_page_asks_for_no_more_than_the_service_allows(page: Page, large_index: Path) -> None:
    with served(large_index, max_k=10) as address:
        page.open(address)
        until(lambda: count(page) >= 10)
        for subject in ("q=red", "q=circle&words=1&sort=price"):
            page.open(f"{address}/#{subject}")
            until(lambda: count(page) >= 10 and page.one("#status").text)


def test_typing_ahead_shows_the_last_words(page: Page, large: str) -> None:
    """Responses that come late, and in another order, are dropped."""
    page.open(large)
    until(lambda: count(page) == 48)
    page.driver.execute_script("""
        const whole = window.fetch; let asked = 0;
        window.fetch = async (url, options) => {
            if (String(url).includes('search/text')) await new Promise((done) => setTimeout(done, 300 / ++asked));
            return whole(url, options);
        };
    """)
    page.one("#query").send_keys("a blue square")
    found = httpx.post(f"{large}/search/text", json={"query": "a blue square", "hybrid": True}).json()["results"]
    until(lambda: captions(page)[: len(found)] == [result["caption"] for result in found])
    assert page.driver.current_url.endswith("#q=a+blue+square")
    page.driver.back()  # the typed letters are one entry
    until(lambda: page.one("#status").text == f"{COUNT} images")


def test_phone_has_room_for_images_and_words_for_fingers(phone: Page, large: str) -> None:
    page = phone
    page.open(large)
    until(lambda: count(page) == 48)
    assert "tap the camera" in page.one("#start").text
    assert "drop" not in page.one("#start").text
    assert "/" not in page.one("#start").text
    assert not page.one("#without").is_displayed()
    page.one("#more-options").click()
    assert page.one("#without").is_displayed()
    page.one("#more-options").click()
    page.driver.execute_script("document.activeElement.blur()")
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    bottom = "return document.getElementById('form').getBoundingClientRect().bottom"
    for place in (300, 600, 900):
        scroll(page, place)
        until(lambda place=place: top(page) == place)
    until(lambda: page.driver.execute_script(bottom) <= 0)
    scroll(page, 700)
    until(lambda: page.driver.execute_script(bottom) > 0)
    page.driver.execute_script("document.querySelectorAll('#results .open')[12].click()")
    until(lambda: page.one("#detail").is_displayed())
    assert page.one("#detail").size["width"] == 390
    page.one("#close").click()
    until(lambda: not page.one("#detail").is_displayed())


def test_key_is_asked_for_and_kept_in_the_tab_alone(page: Page, locked: str) -> None:
    page.open(locked)
    until(lambda: page.one("#key-form").is_displayed())
    page.one("#key").send_keys("wrong")
    page.one("#key-form button").click()
    until(lambda: "does not know this key" in page.one("#error").text)
    page.one("#key").send_keys(ALICE)
    page.one("#key-form button").click()
    until(lambda: count(page) == 24)
    assert not page.one("#key-form").is_displayed()
    images = "return [...document.querySelectorAll('#results img')].slice(0, 6).every((i) => i.naturalWidth > 0)"
    until(lambda: page.driver.execute_script(images))
    stores = page.driver.execute_script("return [sessionStorage.length, localStorage.length, document.cookie]")
    assert stores == [1, 0, ""]
    page.one("#results .open").click()
    until(lambda: page.driver.execute_script("return document.getElementById('detail-image').naturalWidth") > 0)
    page.one("#close").click()
    until(lambda: not page.one("#detail").is_displayed())
    page.one("#query").send_keys("red")
    until(lambda: page.one("#status").text.startswith("The best"))
    assert page.one("#words").is_selected(), "the operator chose so"
    page.one("#forget-key").click()
    until(lambda: page.one("#key-form").is_displayed())
    assert page.driver.execute_script("return sessionStorage.length") == 0
    assert all("401" in message for message in page.errors())


def test_page_is_light(page: Page, large: str) -> None:
    page.open(large)
    until(lambda: count(page) == 48)
    sizes = page.driver.execute_script("""
        return [...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]
            .filter(({name}) => !name.includes('/image?')).map(({transferSize}) => transferSize);
    """)
    assert 20_000 < sum(sizes) < 200_000


def test_no_barrier_is_found(both: Page, large: str) -> None:
    page = both
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")

    def barriers() -> list[Any]:
        page.driver.execute_script(axe)
        run = "axe.run({resultTypes: ['violations']}).then((result) => arguments[0](result.violations))"
        found = page.driver.execute_async_script(run)
        return [(each["id"], [node["html"][:120] for node in each["nodes"][:3]]) for each in found]

    page.open(large)
    until(lambda: count(page) == 48)
    assert barriers() == []
    item = httpx.get(f"{large}/items", params={"k": 1}).json()["items"][0]["id"]
    page.open(f"{large}/#q=red+circle&explain=1&without=blue&item={item}")
    until(lambda: page.all("#results .explained"))
    page.one("#file").send_keys(str(PICTURE))
    until(lambda: page.one("#box").is_displayed() and not page.all("#results[aria-busy]"))
    page.all("#results .select")[0].click()
    page.one("#scores summary").click()
    if page.one("#more-options").is_displayed():
        page.one("#more-options").click()
        page.one("#filters summary").click()
    assert barriers() == []
    page.driver.execute_script("document.querySelector('#results .open').click()")
    until(lambda: page.one("#detail").is_displayed())
    assert barriers() == []
