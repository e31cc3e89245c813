"""State of the page: input, links, collections, the keyboard."""

from pathlib import Path

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.page import Page, searched, until

pytestmark = pytest.mark.browser
PICTURE = Path(__file__).parents[2] / "examples/emoji/query.png"


def test_text_typed_while_the_page_loads_is_kept(page: Page, many: str) -> None:
    slow = {"offline": False, "latency": 200, "downloadThroughput": -1, "uploadThroughput": -1}
    page.open(f"{many}/#q=red&in=circles")
    page.settled(6)
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        page.driver.execute_script("history.replaceState(null, '', '#in=circles'); location.reload()")
        until(lambda: page.one("#query").get_attribute("value") == "" and page.all("#collection") != [])
        page.one("#query").send_keys("a blue circle")
        until(lambda: "q=a+blue+circle" in page.driver.current_url)
        page.settled(6)
        assert page.one("#query").get_attribute("value") == "a blue circle"
        assert "in=circles" in page.driver.current_url
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow | {"latency": 0})


def test_link_shows_only_what_it_names(page: Page, many: str) -> None:
    page.open(f"{many}/#q=red&in=gone")
    until(lambda: "no gallery “gone”" in page.one("#error").text)
    page.open(f"{many}/#picture=1&q=red&in=circles")  # as after a reload, which loses the image
    page.settled(6)
    assert not page.one("#error").is_displayed()
    assert "picture" not in page.driver.current_url
    fails_twice = """
        const whole = window.fetch, later = window.setTimeout, shown = new Promise((done) => window.seen = done);
        let asked = 0;
        window.setTimeout = (call, wait) => later(call, wait < 500 ? wait : 0);
        window.fetch = async (url, ...more) => {
            if (url === 'collections' && ++asked < 3) return new Response('{"detail": "Too busy."}', {status: 503});
            if (url === 'collections') await shown;
            return whole(url, ...more);
        };
    """
    with page.script(fails_twice):
        page.open(f"{many}/#q=red&in=circles")
        until(lambda: page.one("#error").text == "Too busy.")
        page.driver.execute_script("window.seen()")
        page.settled(6)
        assert not page.one("#error").is_displayed()


def test_page_waits_for_an_index_that_is_being_loaded(page: Page, site: str) -> None:
    loads_once = """
        const whole = window.fetch; let asked = 0;
        window.fetch = async (url, ...more) => {
            const loading = '{"detail": "It is loaded."}';
            if (url === 'ui/catalogue' && asked === 1) return new Response(loading, {status: 503});
            if (url !== 'collections' || ++asked > 1) return whole(url, ...more);
            const {collections: [one]} = await (await whole(url)).json();
            return Response.json({collections: [{...one, index_version: null}]});
        };
    """
    with page.script(loads_once):
        page.open(f"{site}/#q=red")
        until(lambda: page.one("#error").text == "It is loaded.")
        page.settled(24)
        assert not page.one("#error").is_displayed()
        until(lambda: page.all("#facets button"))


def test_collection_can_be_chosen(page: Page, site: str, many: str) -> None:
    page.open(site)
    assert not page.one("#where").is_displayed(), "there is only one collection"
    page.open(many)
    until(lambda: page.one("#where").is_displayed())
    names = [option.text for option in page.all("#collection option")]
    assert names == ["shapes", "circles", "another", "untouched", "products"]
    page.one("#query").send_keys("red")
    page.settled(24)
    page.all("#collection option")[1].click()
    cards = page.settled(6)
    assert "in=circles" in page.driver.current_url
    until(lambda: "square" not in page.one("#examples").get_attribute("textContent"))
    assert page.one("#query").get_attribute("value") == "red"
    cards[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail").is_displayed())
    page.one("#similar").click()
    page.settled(5)
    assert "/collections/circles/" in page.one(".chip img").get_attribute("src")
    address = page.driver.current_url
    page.driver.back()
    page.driver.back()
    page.settled(6)
    page.driver.back()
    page.settled(24)
    assert page.one("#collection").get_attribute("value") == "shapes"
    until(lambda: "square" in page.one("#examples").get_attribute("textContent"))
    page.open(address)  # as a shared link
    page.settled(5)
    assert page.one("#collection").get_attribute("value") == "circles"


def test_without_removes_results_and_is_in_the_address(page: Page, site: str) -> None:
    plain, reduced = searched(site, query="a circle"), searched(site, query="a circle", without="red")
    page.open(f"{site}/#q=a+circle")
    until(lambda: page.ids() == plain)
    page.one("#without").send_keys("red ")
    until(lambda: "without=red" in page.driver.current_url)
    until(lambda: page.ids() == reduced)
    assert page.one("#without").get_attribute("value") == "red ", "typing keeps the trailing space"
    page.one("#without").send_keys(Keys.BACKSPACE * 4)
    until(lambda: "without=" not in page.driver.current_url)
    until(lambda: page.ids() == plain)
    page.open(f"{site}/#q=a+circle&without=red")
    until(lambda: page.ids() == reduced)
    assert page.one("#without").get_attribute("value") == "red"
    page.open(site)
    page.settled(24)
    page.one("#without").send_keys("red")
    until(lambda: "Type what to search for, too" in page.one("#status").text)


def test_without_applies_to_image_searches(page: Page, site: str) -> None:
    page.open(site)
    page.one("#without").send_keys("7")  # a number, which a form would parse as JSON
    page.one("#file").send_keys(str(PICTURE))
    page.settled(24)
    assert "without=7" in page.driver.current_url
    with PICTURE.open("rb") as file:
        asked = httpx.post(f"{site}/search/image", files={"file": file}, data={"without": "7", "k": "24"})
    ids = [result["id"] for result in asked.json()["results"]]
    until(lambda: page.ids() == ids)


def test_search_that_is_left_again_changes_nothing(page: Page, site: str) -> None:
    """Its answer comes only after the state of the list was chosen again."""
    page.open(f"{site}/#q=red")
    page.settled(24)
    facts = page.one("#status").text
    until(lambda: page.all("#facets button"))
    page.driver.execute_script("""
        const whole = window.fetch;
        window.ended = 0;
        window.fetch = async (path, options) => {
            if (!path.includes('search/text')) return whole(path, options);
            await new Promise((done) => window.answer = done);
            return whole(path, options).finally(() => window.ended++);
        };
    """)
    filters = "return document.querySelectorAll('#facets [aria-pressed=true]').length"
    page.driver.execute_script("document.querySelector('#facets button').click()")
    until(lambda: page.driver.execute_script(filters) == 1)
    until(lambda: page.one("#status").text == "Searching…")
    page.driver.execute_script("document.querySelector('#facets [aria-pressed=true]').click()")
    until(lambda: page.driver.execute_script(filters) == 0)
    assert page.driver.current_url.endswith("#q=red")
    page.driver.execute_script("window.answer()")
    until(lambda: page.driver.execute_script("return window.ended") == 1)
    until(lambda: not page.all("#results[aria-busy]"))
    page.settled(24)
    assert page.one("#status").text == facts

    page.driver.execute_script("scrollTo({top: 200, behavior: 'instant'})")
    until(lambda: page.driver.execute_script("return scrollY") == 200)
    page.driver.execute_script("document.querySelectorAll('#results .select')[9].click()")
    page.one("#selected-more").click()
    until(lambda: page.driver.execute_script("return scrollY") == 0)
    page.driver.back()
    until(lambda: page.driver.execute_script("return scrollY") == 200)
    page.settled(24)


def test_words_typed_while_a_search_fails_are_searched(page: Page, site: str) -> None:
    page.open(site)
    page.settled(24)
    page.driver.execute_script("""
        const whole = window.fetch, answered = new Promise((done) => window.answer = done); let asked = 0;
        window.fetch = async (path, options) => {
            if (!path.includes('search/text') || asked++) return whole(path, options);
            await answered;
            return new Response('{"detail": "Too busy."}', {status: 503});
        };
    """)
    page.one("#query").send_keys("red")
    until(lambda: page.driver.current_url.endswith("#q=red"))
    page.driver.execute_script("window.answer()")
    until(lambda: page.one("#status").text.startswith("The best 24"))
    page.settled(24)
    assert not page.one("#error").is_displayed()
