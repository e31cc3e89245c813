"""Explanations drawn on the page, and the line below the cut-off."""

from urllib.parse import quote

import httpx
import pytest

from tests.support.page import Page, until

pytestmark = pytest.mark.browser


def test_explanations_are_drawn(page: Page, site: str) -> None:
    page.open(f"{site}/#q=a+red+square")
    page.settled(24)
    assert not page.one("#legend").is_displayed()
    page.one("#explain").click()
    until(lambda: page.one("#legend").is_displayed())
    page.settled(24)
    assert "explain=1" in page.driver.current_url
    explained = page.all("#results .card.explained")
    assert len(explained) == 8
    drawn = [word.text.split() for word in explained[0].find_elements("css selector", ".words .word")]
    found = httpx.post(f"{site}/search/text", json={"query": "a red square", "explain": True, "k": 1}).json()
    effects = found["results"][0]["explanation"]["words"]
    assert [word for word, _ in drawn] == ["a", "red", "square"]
    for (_, number), effect in zip(drawn, effects, strict=True):
        assert int(number.replace("\N{MINUS SIGN}", "-")) == pytest.approx(100 * effect["effect"], abs=0.51)
    rows, columns, opacities = page.driver.execute_script("""
        const map = document.querySelector('#results .map');
        const data = map.getContext('2d').getImageData(0, 0, map.width, map.height).data;
        return [map.height, map.width, [...data].filter((_, i) => i % 4 === 3)];
    """)
    assert (rows, columns) == (4, 4), "one value per patch"
    assert len(set(opacities)) > 3, "values differ"
    assert max(opacities) < 0.6 * 255, "the image stays recognisable"
    assert explained[0].find_element("css selector", "img").value_of_css_property("filter") == "none"
    legend = page.one("#legend").text
    assert "this part of the image raises the percentage" in legend
    assert "what it adds to the percentage" in legend
    explained[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail-words").is_displayed())
    page.driver.back()
    until(lambda: not page.one("#detail").is_displayed())
    page.one("#explain").click()
    until(lambda: not page.all("#results .explained"))
    assert not page.one("#legend").is_displayed()


def test_an_untouched_model_explains_words_too(page: Page, many: str) -> None:
    page.open(f"{many}/#q=a+red+square&explain=1&in=untouched")
    until(lambda: len(page.all("#results .explained .word")) == 8 * 3)


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
