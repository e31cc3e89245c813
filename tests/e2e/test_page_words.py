"""A search by words: examples, typing, words to leave out, the order of the results and
what explains it.
"""

from urllib.parse import quote

import httpx
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.page import Page, fetching, searched, until

pytestmark = pytest.mark.browser


def test_typing_searches_and_a_result_leads_to_similar_ones(
    both: Page, site: str
) -> None:
    page = both
    page.open(site, 24)  # the gallery
    assert page.text("#status") == "24 images"
    assert page.has("#start")
    assert page.driver.switch_to.active_element == page.one("#query")
    page.type("#query", "red circle")
    page.arrives("#q=red+circle")
    page.settled(24)
    assert page.text("#status").startswith("The best 24 of 24 images")
    assert not page.has("#start")
    caption = page.text("#results .caption")
    page.detail()
    page.similar(23)
    assert not page.has("#detail")
    assert page.value("#query") == ""
    link = page.url
    item = page.parameter("item")
    page.back(2)
    page.settled(24)
    assert page.value("#query") == "red circle"
    assert page.all(".chip") == []

    page.open(link, 23)
    page.says("#chips", caption)
    page.type("#query", "blue")
    page.arrives("q=blue", "item=")
    page.shows(searched(site, query="blue", more_like=item))
    page.click("#chips button")
    page.settled(24)
    assert page.url.endswith("#q=blue")


def test_examples_come_from_the_gallery(page: Page, site: str) -> None:
    page.open(site)
    until(lambda: page.all("#examples button"))
    words = page.texts("#examples button")
    assert len(set(words)) == 6
    assert set(words) <= {
        item["caption"]
        for item in httpx.get(f"{site}/items", params={"k": 100}).json()["items"]
    }
    page.click("#examples button", 1)
    page.arrives("#q=")
    page.settled(24)
    assert page.value("#query") == words[1]


def test_late_answers_do_not_replace_the_last_words(page: Page, site: str) -> None:
    page.open(site, 24)
    late = (
        "if (path.includes('search/text')) await new Promise((done) => setTimeout(done,"
        " 300 / ++asked));"
    )
    page.js(fetching(late))
    page.type("#query", "a blue square")
    page.shows(searched(site, query="a blue square"))
    assert page.url.endswith("#q=a+blue+square")
    page.back()  # the typed letters are one entry
    until(lambda: page.text("#status") == "24 images")


def test_without_removes_results_and_is_offered_for_words(
    both: Page, site: str
) -> None:
    page = both
    plain = searched(site, query="a circle")
    reduced = searched(site, query="a circle", without="red")
    page.open(f"{site}/#q=a+circle")
    page.shows(plain)
    assert not page.has("#offer")
    if not page.has("#without"):
        page.click("#more-options")
    page.type("#without", "red ")
    page.arrives("without=red")
    page.shows(reduced)
    page.type("#without", Keys.BACKSPACE * 4)
    until(lambda: "without=" not in page.url)
    page.shows(plain)
    for typed in ("a+circle+without+a+red", "a+circle+no+red"):
        page.open(f"{site}/#q={typed}")
        page.says("#offer", "take “red” away")
    page.click("#offer button")
    page.shows(reduced)
    assert page.url.endswith("#q=a+circle&without=red")
    assert page.appears("#without").get_attribute("value") == "red"
    assert not page.has("#offer")


def test_words_are_looked_up_where_the_page_says_so(page: Page, site: str) -> None:
    plain, hybrid = (
        searched(site, query="red square", hybrid=each) for each in (False, True)
    )
    page.open(f"{site}/#q=red+square")
    page.shows(plain)
    assert not page.one("#words").is_selected()
    assert page.text("#scores summary").startswith("What does ")
    page.click("#scores summary")
    assert "Only the same image reaches 100%" in page.text("#scores")
    page.click("#words")
    page.shows(hybrid)
    assert "words=1" in page.url
    first = page.text("#results .card")
    assert "a red square" in first
    assert "all words" in first
    assert page.text("#results .number") == "good match", (
        "its percentage may be lower than the next"
    )
    assert page.text("#scores summary") == "Why this order?"
    page.click("#words")
    page.shows(plain)
    assert "words=" not in page.url


def test_explanations_are_drawn(page: Page, site: str) -> None:
    page.open(f"{site}/#q=a+red+square", 24)
    assert not page.has("#legend")
    page.click("#explain")
    page.appears("#legend")
    page.settled(24)
    assert "explain=1" in page.url
    page.counts(8, ".explained")
    answer = httpx.post(
        f"{site}/search/text", json={"query": "a red square", "explain": True, "k": 1}
    ).json()
    explanation = answer["results"][0]["explanation"]
    effects = np.array([each["effect"] for each in explanation["words"]])
    shares = effects / abs(effects).max()
    drawn = page.one("#results .explained").find_elements(
        "css selector", ".words .word"
    )
    assert [word.find_element("css selector", "b").text for word in drawn] == [
        "a",
        "red",
        "square",
    ]
    bars = [
        float(page.js("return arguments[0].style.getPropertyValue('--share')", word))
        for word in drawn
    ]
    assert bars == pytest.approx(abs(shares), abs=0.01)
    titles = [str(word.get_attribute("title")).split("” ")[1] for word in drawn]
    assert titles[shares.argmax()] == "matters most"
    assert [title == "speaks against" for title in titles] == list(shares < -0.08)
    veil = np.array(
        page.js("""
        const map = document.querySelector('#results .map'), side = map.width / 4;
        const {data} = map.getContext('2d').getImageData(0, 0, map.width, map.height);
        const centre = (place) => Math.floor((place + 0.5) * side);
        const middle = (i) =>
            4 * (centre(Math.floor(i / 4)) * map.width + centre(i % 4));
        return [...Array(16).keys()].map((i) => data[middle(i) + 3]);
    """)
    )
    assert veil[np.argmax(explanation["relevance"])] <= veil.min() + 5, (
        "light falls on the part that matters most"
    )
    page.says(
        "#legend", "this part of the image matters most", "how much a word matters"
    )
    page.detail()
    page.appears("#detail-map")
    page.says("#detail-words", "matters most")
    page.click("#why")
    page.vanishes("#detail-map")
    page.vanishes("#detail-words")


def test_less_likely_results_are_below_a_line(page: Page, many: str) -> None:
    def likely(query: str) -> int:
        answer = httpx.post(
            f"{many}/search/text", json={"query": query, "k": 24}
        ).json()
        return sum(result["level"] == "likely" for result in answer["results"])

    queries = (
        "a red circle",
        "blue",
        "xkqz",
        "a",
        "wiring plan",
        "tax report",
        "square",
        "cathedral",
        "!",
    )
    fitting = {query: likely(query) for query in queries}
    some = next(query for query, count in fitting.items() if 0 < count < 24)
    none = next(query for query, count in fitting.items() if count == 0)
    page.open(f"{many}/#q={quote(some)}", 24)
    assert [len(page.all(f"#results .{name}")) for name in ("weak", "divider")] == [
        24 - fitting[some],
        1,
    ]
    assert f"{fitting[some]} of them likely" in page.text("#status")
    assert not page.has("#nothing")
    page.open(f"{many}/#q={quote(none)}", 24)
    assert f"Nothing fits “{none}” well" in page.text("#nothing")
    assert [len(page.all(f"#results .{name}")) for name in ("weak", "divider")] == [
        24,
        0,
    ]
    page.open(f"{many}/#item={page.ids()[0]}", 23)  # item searches have no cut-off
    assert page.all("#results .weak") == []
    assert not page.has("#nothing")
