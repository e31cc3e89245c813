"""Explanations drawn on the page, and the line below the cut-off."""

from urllib.parse import quote

import httpx
import pytest

from tests.support.page import Page, until

pytestmark = pytest.mark.browser


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
    assert colors[:2] == [4, 4], "one value per patch"
    assert colors[2] > 3, "values differ"
    picture = page.all("#results .explained img")[0]
    ActionChains(page.driver).move_to_element(picture).click().perform()  # the whole card is a button
    page.settled(23)
    assert "#item=" in page.driver.current_url
    page.driver.back()
    page.settled(24)
    page.one("#explain").click()
    until(lambda: not page.all("#results .explained"))
    assert not page.one("#words").is_displayed()
    assert page.errors() == []


def test_results_below_the_cut_off_are_separated(page: Page, two: str) -> None:
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
    assert f"{fitting[some]} above the cut-off" in page.one("#status").text
    assert not page.one("#nothing").is_displayed()
    assert none is not None, (best, cut)
    page.open(f"{two}/#q={quote(none)}&k=24")
    page.settled(24)
    assert f"No match for “{none}”" in page.one("#nothing").text
    assert len(page.all("#results .weak")) == 24
    assert page.all("#results .divider") == []
    page.all("#results .card")[0].click()  # item searches have no cut-off
    page.settled(23)
    assert page.all("#results .weak") == []
    assert not page.one("#nothing").is_displayed()
    assert page.errors() == []
