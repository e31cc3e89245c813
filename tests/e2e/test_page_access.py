"""Who may use the page, and how: with a key, without barriers, behind a proxy, while
the service is busy.
"""

from pathlib import Path

import httpx
import pytest

from app.core.callers import key_hash
from tests.support.page import Page, fetching, served, until
from tests.support.paths import ROOT
from tests.support.service import ALICE

pytestmark = pytest.mark.browser


def test_no_barrier_is_found(both: Page, large: str) -> None:
    page = both
    page.open(large)
    page.counts(48)
    assert page.barriers() == []
    sizes = page.js("""
        return ['resource', 'navigation']
            .flatMap((type) => performance.getEntriesByType(type))
            .filter(({name}) => !name.includes('/image?'))
            .map(({transferSize}) => transferSize);
    """)
    assert 20_000 < sum(sizes) < 200_000, "the page is light"
    item = httpx.get(f"{large}/items", params={"k": 1}).json()["items"][0]["id"]
    page.open(f"{large}/#q=red+circle&explain=1&without=blue&item={item}")
    until(lambda: page.all("#results .explained"))
    page.type("#file", str(ROOT / "examples/emoji/query.png"))
    until(lambda: page.has("#box") and not page.all("#results[aria-busy]"))
    page.click("#results .select")
    page.click("#scores summary")
    if page.has("#more-options"):
        page.click("#more-options")
        page.click("#filters summary")
    assert page.barriers() == []
    page.detail()
    assert page.barriers() == []


def test_key_is_asked_for_and_kept_in_the_tab_alone(
    page: Page,
    locked: str,
    indexes: dict[str, Path],
) -> None:
    page.open(locked)
    page.appears("#key-form")
    page.type("#key", "wrong\n")
    page.says("#error", "does not know this key")
    page.type("#key", ALICE)
    page.click("#key-form button")
    page.settled(24)
    assert not page.has("#key-form")
    assert page.js(
        "return [sessionStorage.length, localStorage.length, document.cookie]"
    ) == [1, 0, ""]
    assert page.one("#words").is_selected(), "the operator chose so"
    page.click("#forget-key")
    page.appears("#key-form")
    assert page.js("return sessionStorage.length") == 0
    assert all("401" in message for message in page.errors())

    with served(
        indexes["shapes"], api_keys=f"alice:{key_hash(ALICE)}:read:gone"
    ) as address:
        page.open(address)
        page.appears("#key")
        page.type("#key", ALICE + "\n")
        page.says("#error", "opens no gallery")
        assert page.has("#key-form")
        paths = page.js(
            "return performance.getEntriesByType('resource').map(({name}) => new"
            " URL(name).pathname)"
        )
        assert paths.count("/collections") == 2, "it is asked for once"
        assert all("401" in message for message in page.errors())


def test_documentation_sends_requests(
    page: Page,
    site: str,
    tiny_gallery: Path,
    indexes: dict[str, Path],
) -> None:
    documented = httpx.get(f"{site}/openapi.json").json()["paths"].values()
    page.open(f"{site}/docs")
    page.counts(sum(map(len, documented)), ".opblock")
    image = "#operations-search-search_image"
    page.click(f"{image} .opblock-summary-control")
    page.appears(f"{image} .try-out__btn").click()
    page.appears(f"{image} input[type=file]").send_keys(
        str(tiny_gallery / "circle/red.png")
    )
    page.click(f"{image} .execute")
    page.says(f"{image} .live-responses-table", "index_version")
    hosts = page.js(
        "return performance.getEntriesByType('resource').map(e => new URL(e.name).host)"
    )
    assert set(hosts) == {site.removeprefix("http://")}

    with served(indexes["shapes"], below="/pictures") as address:  # of a proxy
        page.open(f"{address}/", 24)
        page.open(f"{address}/docs#/healthz/healthz")
        for button in (".try-out__btn", ".execute"):
            page.appears(f".opblock {button}").click()
        page.says(".live-responses-table", '"status": "ok"')


def test_page_waits_for_a_service_that_is_busy(page: Page, many: str) -> None:
    fails_twice = """
        const later = window.setTimeout;
        const shown = new Promise((done) => window.seen = done);
        window.setTimeout = (call, wait) => later(call, wait < 500 ? wait : 0);
    """ + fetching(
        """
        if (path === 'collections' && ++asked < 3)
            return new Response('{"detail": "Too busy."}', {status: 503});
        if (path === 'collections') await shown;
    """
    )
    with page.script(fails_twice):
        page.open(f"{many}/#q=red&in=circles")
        until(lambda: page.text("#error") == "Too busy.")
        page.js("window.seen()")
        page.settled(6)
        assert not page.has("#error")
