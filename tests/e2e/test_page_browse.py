"""The gallery without words: scrolling, sorting, filters with their counts, one image
for each product.
"""

import json

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.page import COUNT, Page, searched, until

pytestmark = pytest.mark.browser

SEARCHES = """
    return performance.getEntriesByType('resource')
        .map(({name}) => new URL(name).pathname)
        .filter((path) => path.startsWith('/search/'));
"""


def count(page: Page) -> int:
    return len(page.all("#results .card"))


def facet(page: Page, field: str) -> dict[str, str]:
    script = """
        const section = [...document.querySelectorAll('#facets section')]
            .find((each) => each.querySelector('h3').textContent === arguments[0]);
        return [...section?.querySelectorAll('li button') ?? []]
            .map((each) => [
                each.querySelector('span').textContent,
                each.querySelector('small').textContent]);
    """
    return dict(page.js(script, field))


def counted(page: Page, field: str, **values: str) -> None:
    """Wait until a facet has these values and counts."""
    until(lambda: facet(page, field) == values)


def choose(page: Page, name: str) -> None:
    next(
        each
        for each in page.all("#facets li button")
        if each.text.split("\n")[0] == name
    ).click()


def test_gallery_grows_while_it_is_scrolled_and_back_returns_to_the_place(
    both: Page, large: str
) -> None:
    page = both

    def is_at_its_place() -> bool:
        return count(page) == COUNT and abs(page.js("return scrollY") - 900) < 2

    page.open(large)
    page.counts(48)
    assert page.text("#status") == f"{COUNT} images"
    while (before := count(page)) < COUNT:
        page.scroll(10**6)
        until(lambda before=before: count(page) > before)
    assert page.texts("#results .caption") == [
        f"image {number}" for number in range(COUNT)
    ]
    page.scroll(900)
    until(lambda: page.js("return history.state?.top") == 900)
    page.type("#query", "red")
    page.arrives("#q=red")
    page.says("#status", "The best")
    page.back()
    until(is_at_its_place)
    page.driver.refresh()
    until(is_at_its_place)


def test_images_are_sorted_by_a_field(page: Page, large: str) -> None:
    def sort(value: str) -> None:
        until(lambda: page.all("#sort option[value='-price']"))
        page.click(f"#sort option[value='{value}']")

    prices = {f"image {number}": (number * 37) % COUNT for number in range(COUNT)}
    page.open(f"{large}/#words=1")
    sort("-price")
    first = [COUNT - 1, COUNT - 2, COUNT - 3]
    until(
        lambda: [prices[each] for each in page.texts("#results .caption")[:3]] == first
    )
    page.type("#query", "circle")
    page.says("#status", "33 images that fit, sorted")
    while count(page) < 33:
        page.scroll(10**6)
    circles = [f"image {number}" for number in range(1, COUNT, 4)]
    shown = page.texts("#results .caption")
    assert shown == sorted(circles, key=lambda caption: -prices[caption]), (
        "all circles, and nothing else"
    )
    page.open(f"{large}/#q=zebra&words=1&sort=-price")
    page.says("#nothing", "Nothing fits “zebra” well")
    sort("")
    page.says("#status", "The best")


def test_numbers_are_filtered_from_a_least_to_a_greatest_one(
    page: Page, large: str
) -> None:
    def enter(place: int, number: str) -> None:
        page.all(".between input")[place].send_keys(
            Keys.CONTROL + "a" + Keys.NULL + Keys.DELETE,
            number,
            Keys.TAB,
        )

    def bounds(name: str = "value") -> list[str | None]:
        return [each.get_attribute(name) for each in page.all(".between input")]

    def images(number: int) -> None:
        until(lambda: page.text("#status") == f"{number} images")

    page.open(large)
    until(lambda: bounds("placeholder") == ["0", str(COUNT - 1)])
    enter(0, "100")  # and goes on to the next field
    page.press("9")
    images(COUNT - 100)
    assert bounds()[1] == "9", "typing goes on"
    enter(1, "109.5")
    images(10)
    for place in (0, 1):
        enter(place, "")
    images(COUNT)


def test_facets_count_and_filter(both: Page, site: str, large: str) -> None:
    page = both
    shapes = ("circle", "cross", "square", "triangle")
    query = {"filter": json.dumps({"category": "circle", "color": "blue"})}
    blue_circles = [
        item["id"] for item in httpx.get(f"{site}/items", params=query).json()["items"]
    ]
    page.open(site, 24)
    if is_phone := not page.has("#facets"):
        page.click("#filters summary")
    counted(page, "Category", **dict.fromkeys(shapes, "6"))
    assert set(facet(page, "Color").values()) == {"4"}
    choose(page, "red")
    page.settled(4)
    assert page.text("#status") == "4 images"
    counted(page, "Category", **dict.fromkeys(shapes, "1"))
    assert set(facet(page, "Color").values()) == {"4"}, "another color can be chosen"
    choose(page, "circle")
    page.settled(1)
    until(lambda: set(facet(page, "Color").values()) == {"1"})
    choose(page, "blue")
    page.shows(blue_circles)
    choose(page, "blue")
    page.settled(6)
    page.scroll(0)
    page.type("#query", "red")
    page.shows(searched(site, query="red", filter={"category": "circle"}))
    page.back(2)
    page.shows(blue_circles)
    assert page.texts("#facets [aria-pressed=true] span") == ["circle", "blue"]

    # one request counts, once the filters are open
    page.open(f"{large}/#q=circle&words=1&category=square")
    page.says("#status", "The best")
    if is_phone:
        page.later("setTimeout(arguments[0], 400)")
        assert page.js(SEARCHES) == ["/search/text"]
        page.click("#filters summary")
    counted(page, "Category", square="0", circle="33")
    assert page.js(SEARCHES) == ["/search/text", "/search/batch"]
    choose(page, "square")
    counted(page, "Category", circle="33")
    page.open(f"{site}/#q=red&category=nothing")
    page.says("#nothing", "No images have all of these filters")
    page.click("#clear-filters")
    page.settled(24)
    page.click("#results .category")
    page.settled(6)


def test_products_and_near_duplicates_are_shown_once_and_open_the_others(
    page: Page, many: str
) -> None:
    url = f"{many}/collections/products"
    page.open(f"{many}/#in=products", 6)
    assert page.text("#status") == "6 images, one for each color"
    assert {*page.texts("#results .near")} == {"3 more"}
    page.type("#query", "circle")
    page.shows(searched(url, query="circle"))
    assert count(page) == 6
    page.js("document.querySelector('#results .near').click()")
    page.appears("#folded")
    assert page.text("#folded h3") == "Same color"
    page.counts(3, "#folded button")

    results = httpx.post(
        f"{many}/search/text", json={"query": "red", "k": 24, "fold": 0.95}
    ).json()["results"]
    folded = {
        place: result["folded"]
        for place, result in enumerate(results)
        if "folded" in result
    }
    page.open(f"{many}/#q=red&fold=1", len(results))
    assert len(results) < 24
    marks = [
        f"{len(folded[place])} more" if place in folded else ""
        for place in range(len(results))
    ]
    assert page.texts("#results .near") == marks
    place, near = next(iter(folded.items()))
    page.detail(place)
    assert len(page.all("#folded button")) == len(near)
    page.click("#folded button")
    until(lambda: f"show={near[0]}" in page.url.replace("%2F", "/"))
