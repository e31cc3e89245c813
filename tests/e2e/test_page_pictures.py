"""Pictures that the page requests with a key, and whose responses come late."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.keys import key_hash
from tests.support.page import Page, served, until
from tests.support.service import ALICE

pytestmark = pytest.mark.browser


@pytest.fixture
def unlocked(page: Page, locked: str) -> Iterator[str]:
    """The address of the service, whose key the page knows until the test ends."""
    page.open(locked)
    until(lambda: page.one("#key-form").is_displayed() or page.all("#results .card"))
    page.driver.execute_script("sessionStorage.setItem('dcar.key', arguments[0])", ALICE)
    yield locked
    page.driver.execute_script("sessionStorage.clear()")


def test_key_that_opens_no_collection_is_asked_for_once(page: Page, indexes: dict[str, Path]) -> None:
    with served(indexes["shapes"], api_keys=f"alice:{key_hash(ALICE)}:read:gone") as address:
        page.open(address)
        until(lambda: page.one("#key").is_displayed())
        page.one("#key").send_keys(ALICE + "\n")
        until(lambda: "opens no gallery" in page.one("#error").text)
        assert page.one("#key-form").is_displayed()
        requests = (
            "return performance.getEntriesByType('resource').filter(({name}) => name.endsWith('/collections')).length"
        )
        assert page.driver.execute_script(requests) == 2
        assert all("401" in message for message in page.errors())


def test_picture_of_an_item_is_not_replaced_by_that_of_the_one_before(page: Page, unlocked: str) -> None:
    """Responses come when the test answers them, and retries when it calls them."""
    by_hand = """
        const whole = window.fetch, later = window.setTimeout;
        [window.asked, window.retries] = [[], []];
        window.setTimeout = (call, wait) => (wait > 500 ? window.retries.push(call) : later(call, wait));
        window.fetch = (path, {signal, ...options} = {}) => {
            if (!path.includes('size=1280')) return whole(path, options);
            return new Promise((done) => window.asked.push(async (isRefused) => {
                done(isRefused ? new Response('', {status: 429}) : await whole(path, options));
                await (await whole(path, options)).blob(); // the page has read its own by then
            }));
        };
    """

    def asked(number: int) -> bool:
        return bool(page.driver.execute_script("return asked.length") == number)

    def picture() -> str:
        """Return the address of the picture, or nothing until it is loaded."""
        image = "const i = document.getElementById('detail-image'); return i.src && i.naturalWidth ? i.src : ''"
        return str(page.driver.execute_script(image))

    with page.script(by_hand):
        page.open(unlocked)
        page.settled(24)
        page.one("#results .open").click()
        until(lambda: asked(1))
        page.one("#next").click()
        until(lambda: asked(2))
        page.driver.execute_script("asked[1]()")
        second = until(picture)
        page.driver.execute_async_script("asked[0]().then(arguments[0])")
        assert until(picture) == second

        page.one("#next").click()
        until(lambda: asked(3))
        page.driver.execute_script("asked[2](true)")
        until(lambda: page.driver.execute_script("return retries.length") == 1)
        page.one("#next").click()
        until(lambda: asked(4))
        page.driver.execute_script("retries[0]()")
        assert asked(4), "the picture of the item before is not requested again"
        page.driver.execute_script("asked[3]()")
        until(picture)


def test_pictures_that_are_no_longer_shown_are_freed(page: Page, unlocked: str) -> None:
    """Some of the gallery's are loaded when the gallery is left, and some come later."""
    held = """
        const whole = window.fetch, {createObjectURL: make, revokeObjectURL: free} = URL;
        [window.held, window.kept] = [[], new Set()];
        window.fetch = async (path, {signal, ...options} = {}) => {
            if (path.includes('size=') && window.held) await new Promise((done) => window.held.push(done));
            return whole(path, options);
        };
        URL.createObjectURL = (blob) => {
            const url = make.call(URL, blob);
            window.kept.add(url);
            return url;
        };
        URL.revokeObjectURL = (url) => {
            window.kept.delete(url);
            free.call(URL, url);
        };
    """

    def shows(address: str) -> bool:
        kept = "return [...document.querySelectorAll('#results img')].filter(({src}) => kept.has(src)).length"
        idle = page.driver.current_url.endswith(address) and not page.all("#results[aria-busy]")
        return idle and page.driver.execute_script(kept) == 24

    with page.script(held):
        page.open(unlocked)
        until(lambda: page.driver.execute_script("return held.length") == 24 + 6)  # and those of the examples
        page.driver.execute_script("[window.early, window.held] = [held, null]")
        page.driver.execute_script("early.slice(0, 9).forEach((done) => done())")
        until(lambda: page.driver.execute_script("return kept.size") == 9)
        page.one("#query").send_keys("red")
        until(lambda: shows("#q=red"))
        page.driver.execute_script("early.slice(9).forEach((done) => done())")
        page.one("#query").send_keys(" square")
        until(lambda: shows("#q=red+square"))
        shown = "return [...kept].every((url) => [...document.images].some(({src}) => src === url))"
        until(lambda: page.driver.execute_script(shown))
