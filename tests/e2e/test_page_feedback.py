"""What the page reports of its use."""

from pathlib import Path

import pytest

from app.feedback.store import EventRow, read_log
from tests.support.page import Page, ready, served, until

pytestmark = pytest.mark.browser


def events(log: Path) -> list[EventRow]:
    return [event for _, each in read_log(log) for event in each]


def test_the_page_reports_what_is_seen_opened_and_judged(page: Page, indexes: dict[str, Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(indexes["shapes"], feedback=log) as address:
        page.open(f"{ready(address)}/#q=a+red+circle")
        cards = page.settled(24)
        shown = [card.get_attribute("data-id") for card in cards]
        until(lambda: len(events(log)) >= 4)  # after a second in view, and five more
        page.one("#explain").click()
        page.settled(24)
        until(lambda: len(page.all(".explained")) == 8)
        page.all("#results .open")[1].click()
        until(lambda: page.one("#judge").is_displayed())
        page.one("#misfits").click()
        page.one("#fits").click()
        assert [page.one(name).get_attribute("aria-pressed") for name in ("#fits", "#misfits")] == ["true", "false"]
        assert page.barriers() == []
        page.driver.get("about:blank")  # which sends the rest
        until(lambda: [(each.action, each.rating) for each in events(log)][-2:] == [("click", None), ("judge", 3)])
        assert page.errors() == []
    [(query, found)] = read_log(log)  # explanations and counts are no searches
    assert query is not None
    assert query.hits == shown
    assert {each.item for each in found if each.action == "impression"} <= {*shown}
    assert {each.item for each in found[-2:]} == {shown[1]}
    assert len({each.client for each in found}) == 1


def test_the_page_reports_nothing_while_it_is_off(page: Page, site: str) -> None:
    page.open(f"{site}/#q=a+red+circle")
    page.settled(24)[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail").is_displayed())
    assert not page.one("#judge").is_displayed()
    assert page.driver.execute_script("return localStorage.length") == 0
