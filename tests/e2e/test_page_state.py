"""State in the address, collections, late loads, and the page on a phone."""

import pytest

from tests.support.page import Page, until

pytestmark = pytest.mark.browser


def test_text_typed_while_the_page_loads_is_kept(page: Page, many: str) -> None:
    slow = {"offline": False, "latency": 200, "downloadThroughput": -1, "uploadThroughput": -1}
    page.open(f"{many}/#q=red&in=circles")
    page.settled(6)
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        page.js("history.replaceState(null, '', '#in=circles'); location.reload()")
        until(lambda: page.value("#query") == "" and page.all("#collection") != [])
        page.type("#query", "a blue circle")
        page.arrives("q=a+blue+circle")
        page.settled(6)
        assert page.value("#query") == "a blue circle"
        assert "in=circles" in page.url
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow | {"latency": 0})


def test_link_shows_only_what_it_names(page: Page, many: str) -> None:
    page.open(f"{many}/#q=red&in=gone")
    page.says("#error", "no gallery “gone”")
    page.open(f"{many}/#picture=1&q=red&in=circles")  # as after a reload, which loses the image
    page.settled(6)
    assert not page.has("#error")
    assert "picture" not in page.url


def test_page_waits_for_a_service_that_is_busy_or_loads_an_index(page: Page, site: str, many: str) -> None:
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
    with page.script(fails_twice):
        page.open(f"{many}/#q=red&in=circles")
        until(lambda: page.text("#error") == "Too busy.")
        page.js("window.seen()")
        page.settled(6)
        assert not page.has("#error")
    with page.script(loads_once):
        page.open(f"{site}/#q=red")
        until(lambda: page.text("#error") == "It is loaded.")
        page.settled(24)
        assert not page.has("#error")
        until(lambda: page.all("#facets button"))


def test_collection_can_be_chosen(page: Page, site: str, many: str) -> None:
    def examples() -> str:
        return str(page.one("#examples").get_attribute("textContent"))

    page.open(site)
    assert not page.has("#where"), "there is only one collection"
    page.open(many)
    page.appears("#where")
    names = [option.text for option in page.all("#collection option")]
    assert names == ["shapes", "circles", "another", "untouched", "products"]
    page.type("#query", "red")
    page.settled(24)
    page.click("#collection option", 1)
    page.settled(6)
    assert "in=circles" in page.url
    until(lambda: "square" not in examples())
    assert page.value("#query") == "red"
    page.detail()
    page.similar(5)
    assert "/collections/circles/" in page.one(".chip img").get_attribute("src")
    link = page.url
    page.driver.back()
    page.driver.back()
    page.settled(6)
    page.driver.back()
    page.settled(24)
    assert page.value("#collection") == "shapes"
    until(lambda: "square" in examples())
    page.open(link)
    page.settled(5)
    assert page.value("#collection") == "circles"


def test_search_that_is_left_again_changes_nothing(page: Page, site: str) -> None:
    """Its answer comes only after the state of the list was chosen again."""
    page.open(f"{site}/#q=red")
    page.settled(24)
    facts = page.text("#status")
    until(lambda: page.all("#facets button"))
    page.js("""
        const whole = window.fetch;
        window.ended = 0;
        window.fetch = async (path, options) => {
            if (!path.includes('search/text')) return whole(path, options);
            await new Promise((done) => window.answer = done);
            return whole(path, options).finally(() => window.ended++);
        };
    """)
    page.js("document.querySelector('#facets button').click()")
    until(lambda: len(page.all("#facets [aria-pressed=true]")) == 1 and page.text("#status") == "Searching…")
    page.js("document.querySelector('#facets [aria-pressed=true]').click()")
    until(lambda: page.all("#facets [aria-pressed=true]") == [])
    assert page.url.endswith("#q=red")
    page.js("window.answer()")
    until(lambda: page.js("return window.ended") == 1)
    page.settled(24)
    assert page.text("#status") == facts


def test_phone_has_room_for_images_and_words_for_fingers(phone: Page, large: str) -> None:
    page = phone
    page.open(large)
    until(lambda: len(page.all("#results .card")) == 48)
    assert "tap the camera" in page.text("#start")
    assert "drop" not in page.text("#start")
    assert "/" not in page.text("#start")
    assert not page.has("#without")
    page.click("#more-options")
    assert page.has("#without")
    page.click("#more-options")
    page.js("document.activeElement.blur()")
    assert page.js("return document.documentElement.scrollWidth") <= 390
    bottom = "return document.getElementById('form').getBoundingClientRect().bottom"
    for place in (300, 600, 900):
        page.scroll(place)
        until(lambda place=place: page.js("return scrollY") == place)
    until(lambda: page.js(bottom) <= 0)
    page.scroll(700)
    until(lambda: page.js(bottom) > 0)
    page.js("document.querySelectorAll('#results .open')[12].click()")
    assert page.appears("#detail").size["width"] == 390
    page.close()
