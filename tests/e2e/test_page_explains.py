"""Explanations drawn on the page, and the line below the cut-off."""

from urllib.parse import quote

import httpx
import numpy as np
import pytest

from tests.support.page import Page, until

pytestmark = pytest.mark.browser


def test_explanations_are_drawn(page: Page, site: str) -> None:
    page.open(f"{site}/#q=a+red+square")
    page.settled(24)
    assert not page.one("#legend").is_displayed()
    page.driver.execute_script("""
        const whole = window.fetch;
        window.held = [];
        window.fetch = async (path, options) => {
            const isHeld = window.held && options?.body?.includes?.('explain');
            if (isHeld) await new Promise((done) => window.held.push(done));
            return whole(path, options);
        };
    """)
    page.one("#explain").click()
    until(lambda: page.one("#legend").is_displayed())
    page.settled(24)
    assert "explain=1" in page.driver.current_url
    until(lambda: len(page.all("#results .explaining")) == 8)
    page.driver.execute_script("held[0]()")
    until(lambda: len(page.all("#results .explained")) == 1 and len(page.all("#results .explaining")) == 7)
    page.driver.execute_script("const waiting = held; held = null; waiting.forEach((done) => done())")
    until(lambda: len(page.all("#results .explained")) == 8 and not page.all("#results .explaining"))
    explained = page.all("#results .card.explained")
    drawn = explained[0].find_elements("css selector", ".words .word")
    found = httpx.post(f"{site}/search/text", json={"query": "a red square", "explain": True, "k": 1}).json()
    effects = [each["effect"] for each in found["results"][0]["explanation"]["words"]]
    assert [word.find_element("css selector", "b").text for word in drawn] == ["a", "red", "square"]
    bars = [
        float(page.driver.execute_script("return arguments[0].style.getPropertyValue('--share')", w)) for w in drawn
    ]
    assert bars == pytest.approx([abs(effect) / max(map(abs, effects)) for effect in effects], abs=0.01)
    says = [str(word.get_attribute("title")).split("” ")[1] for word in drawn]
    assert says[effects.index(max(effects))] == "matters most"
    assert [each == "speaks against" for each in says] == [e < -0.08 * max(map(abs, effects)) for e in effects]
    relevance = np.array(found["results"][0]["explanation"]["relevance"])
    opacities = page.driver.execute_script("""
        const map = document.querySelector('#results .map'), side = map.width / 4;
        const {data} = map.getContext('2d').getImageData(0, 0, map.width, map.height);
        const centre = (place) => Math.floor((place + 0.5) * side);
        const middle = (i) => 4 * (centre(Math.floor(i / 4)) * map.width + centre(i % 4));
        return [...Array(16).keys()].map((i) => data[middle(i) + 3]);
    """)
    veil = np.array(opacities)
    assert veil[relevance.argmax()] <= veil.min() + 5, "light falls on the part that matters most"
    assert veil.max() < 0.7 * 255, "the image stays recognisable"
    legend = page.one("#legend").text
    assert "this part of the image matters most" in legend
    assert "how much a word matters" in legend
    explained[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail-words").is_displayed() and page.one("#detail-map").is_displayed())
    assert "matters most" in page.one("#detail-words").text
    box = "return Object.values(arguments[0].getBoundingClientRect().toJSON())"
    boxes = [page.driver.execute_script(box, page.one(name)) for name in ("#detail-map", "#detail-image")]
    assert boxes[0] == pytest.approx(boxes[1], abs=0.5)
    page.one("#why").click()
    until(lambda: not page.one("#detail-map").is_displayed() and not page.one("#detail-words").is_displayed())
    page.driver.back()
    until(lambda: not page.one("#detail").is_displayed())
    page.one("#explain").click()
    until(lambda: not page.all("#results .explained"))
    assert not page.one("#legend").is_displayed()


def test_an_image_is_explained_in_the_large_view(phone: Page, many: str) -> None:
    page = phone
    page.open(f"{many}/#q=a+red+square")
    page.settled(24)[20].find_element("css selector", ".open").click()
    until(lambda: page.one("#why").is_displayed())
    assert not page.one("#detail-map").is_displayed()
    page.driver.execute_script("document.getElementById('why').click()")
    until(lambda: page.one("#detail-map").is_displayed() and page.one("#detail-words .word"))
    page.one("#next").click()  # and the next one, too
    until(lambda: not page.one("#detail-map").is_displayed())
    until(lambda: page.one("#detail-map").is_displayed())
    page.one("#close").click()
    until(lambda: not page.one("#detail").is_displayed())
    assert page.all(".explained") == []


def test_an_untouched_model_explains_words_too(page: Page, many: str) -> None:
    page.open(f"{many}/#q=a+red+square&explain=1&in=untouched")
    until(lambda: len(page.all("#results .explained .word")) == 8 * 3)


def test_results_that_the_words_find_are_above_the_less_likely_ones(page: Page, many: str) -> None:
    colors, shapes = ("red", "green", "blue", "black"), ("circle", "square", "cross", "triangle")

    def levels(query: str) -> list[str]:
        found = httpx.post(f"{many}/search/text", json={"query": query, "k": 24, "hybrid": True}).json()["results"]
        return [result["level"] for result in found]

    queries = [f"{one} {other}" for one in (*colors, *shapes) for other in (*shapes, *colors) if one != other]
    found = {query: each for query in queries if "likely" in (each := levels(query))}
    ends = {query: each[::-1].index("likely") for query, each in found.items()}
    mixed = next(query for query, end in ends.items() if 0 < end < 24 - found[query].count("likely"))
    page.open(f"{many}/#q={quote(mixed)}&words=1")
    page.settled(24)
    below = "return [...document.querySelectorAll('.divider ~ .card .number')].map((each) => each.textContent)"
    says = page.driver.execute_script(below)
    assert len(says) == ends[mixed]
    assert "good match" not in says
    assert len(page.all("#results .weak")) == 24 - found[mixed].count("likely")


def test_results_below_the_cut_off_are_separated(page: Page, many: str) -> None:
    cut = httpx.get(f"{many}/collections").json()["collections"][0]["min_score"]
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
        found = httpx.post(f"{many}/search/text", json={"query": query, "k": 24}).json()["results"]
        best[query] = found[0]["score"]
        fitting[query] = sum(result["score"] >= cut for result in found)
    some = next(query for query, count in fitting.items() if 0 < count < 24)
    none = next((query for query, score in best.items() if score < cut), None)

    page.open(f"{many}/#q={quote(some)}")
    page.settled(24)
    assert len(page.all("#results .weak")) == 24 - fitting[some]
    assert len(page.all("#results .divider")) == 1
    assert f"{fitting[some]} of them likely" in page.one("#status").text
    assert not page.one("#nothing").is_displayed()
    assert none is not None, (best, cut)
    page.open(f"{many}/#q={quote(none)}")
    page.settled(24)
    assert f"Nothing fits “{none}” well" in page.one("#nothing").text
    assert len(page.all("#results .weak")) == 24
    assert page.all("#results .divider") == []
    (item,) = {page.all("#results .card")[0].get_attribute("data-id")}
    page.open(f"{many}/#item={item}")  # item searches have no cut-off
    page.settled(23)
    assert page.all("#results .weak") == []
    assert not page.one("#nothing").is_displayed()
