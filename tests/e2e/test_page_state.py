"""Slow answers, late ones and busy services change nothing of what the user asked for."""

import pytest

from tests.support.page import Page, fetching, until

pytestmark = pytest.mark.browser


def test_text_typed_while_the_page_loads_is_kept(page: Page, many: str) -> None:
    slow = {"offline": False, "latency": 200, "downloadThroughput": -1, "uploadThroughput": -1}
    page.open(f"{many}/#q=red&in=circles", 6)
    page.cdp("Network.enable")
    page.cdp("Network.emulateNetworkConditions", **slow)
    try:
        page.js("history.replaceState(null, '', '#in=circles'); location.reload()")
        until(lambda: page.value("#query") == "" and page.all("#collection") != [])
        page.type("#query", "a blue circle")
        page.arrives("q=a+blue+circle")
        page.settled(6)
        assert page.value("#query") == "a blue circle"
        assert "in=circles" in page.url
    finally:
        page.cdp("Network.emulateNetworkConditions", **slow | {"latency": 0})


def test_page_waits_for_a_service_that_is_busy_or_loads_an_index(page: Page, site: str, many: str) -> None:
    fails_twice = """
        const later = window.setTimeout, shown = new Promise((done) => window.seen = done);
        window.setTimeout = (call, wait) => later(call, wait < 500 ? wait : 0);
    """ + fetching("""
        if (path === 'collections' && ++asked < 3) return new Response('{"detail": "Too busy."}', {status: 503});
        if (path === 'collections') await shown;
    """)  # fmt: skip
    loads_once = fetching("""
        if (path === 'ui/catalogue' && asked === 1) return new Response('{"detail": "It is loaded."}', {status: 503});
        if (path === 'collections' && ++asked === 1) {
            const {collections: [one]} = await (await whole(path)).json();
            return Response.json({collections: [{...one, index_version: null}]});
        }
    """)
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


def test_search_that_is_left_again_changes_nothing(page: Page, site: str) -> None:
    """Its answer comes only after the state of the list was chosen again."""
    page.open(f"{site}/#q=red", 24)
    facts = page.text("#status")
    until(lambda: page.all("#facets button"))
    page.js("window.ended = 0;" + fetching("""
        if (path.includes('search/text')) {
            await new Promise((done) => window.answer = done);
            return whole(path, options).finally(() => window.ended++);
        }
    """))  # fmt: skip
    page.js("document.querySelector('#facets button').click()")
    until(lambda: len(page.all("#facets [aria-pressed=true]")) == 1 and page.text("#status") == "Searching…")
    page.js("document.querySelector('#facets [aria-pressed=true]').click()")
    page.counts(0, "#facets [aria-pressed=true]")
    assert page.url.endswith("#q=red")
    page.js("window.answer()")
    until(lambda: page.js("return window.ended") == 1)
    page.settled(24)
    assert page.text("#status") == facts
