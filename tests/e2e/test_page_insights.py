"""What the page reports of its use, and the insights page that shows the figures of
it.
"""

import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.feedback.log import EventRow, QueryRow, read_log
from tests.support.feedback_log import write_log
from tests.support.page import Page, served, until
from tests.support.service import ADMIN, ADMIN_ONLY

pytestmark = pytest.mark.browser


def events(log: Path) -> list[EventRow]:
    return [event for _, each in read_log(log) for event in each]


def write_days(folder: Path, name: str, ids: list[str], days: int = 12) -> None:
    """Write a log of some days, in which the first results are clicked most, and one
    query never.
    """
    rng = np.random.default_rng(0)
    queries = list[QueryRow]()
    clicks = list[EventRow]()
    for back in range(days):
        seconds = int(time.time()) - back * 86_400
        for number in range(int(rng.integers(20, 60))):
            text = ["a red circle", 'a "blue", round square', "green", "a zebra"][
                number % 4
            ]
            hits = rng.permutation(ids)[:10].tolist()
            query_id = f"{seconds:08x}{number:08x}"
            moment = seconds * 1000
            queries.append(
                QueryRow(query_id, moment, name, text, hits, 0, 1, text == "a zebra")
            )
            if number % 2 == 0:
                places = np.flatnonzero(
                    rng.random(10) < 0.4 / np.arange(1, 11)
                ).tolist()
            else:
                places = []
            clicks += [
                EventRow(query_id, moment, "c", "click", hits[place], None)
                for place in places
            ]
    write_log(folder, queries, clicks)


def test_page_reports_seen_opened_and_judged(
    page: Page,
    indexes: dict[str, Path],
    site: str,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    with served(indexes["shapes"], feedback=log) as address:
        page.open(f"{address}/#q=a+red+circle", 24)
        shown = page.ids()
        until(lambda: len(events(log)) >= 4)  # after a second in view, and five more
        page.click("#explain")
        page.settled(24)
        page.counts(8, ".explained")
        page.detail(1)
        page.appears("#judge")
        page.click("#misfits")
        page.click("#fits")
        assert [
            page.one(name).get_attribute("aria-pressed")
            for name in ("#fits", "#misfits")
        ] == ["true", "false"]
        assert page.barriers() == []
        page.driver.get("about:blank")  # which sends the rest
        acts = {("click", None), ("judge", 3)}
        until(
            lambda: (
                acts
                == {
                    (row.action, row.rating)
                    for row in events(log)
                    if row.action != "impression"
                }
            )
        )
        assert page.errors() == []
    [(query, found)] = read_log(log)  # explanations and counts are no searches
    assert query is not None
    assert query.hits == shown
    assert {each.item for each in found if each.action == "impression"} <= {*shown}
    assert {row.item for row in found if row.action != "impression"} == {shown[1]}
    assert len({each.client for each in found}) == 1

    page.open(f"{site}/#q=a+red+circle", 24)  # where feedback is off
    page.detail()
    assert not page.has("#judge")
    assert page.js("return localStorage.length") == 0


def test_the_figures_of_the_log_are_shown(
    both: Page,
    indexes: dict[str, Path],
    tmp_path: Path,
) -> None:
    page = both
    with served(indexes["shapes"], feedback=tmp_path / "log", **ADMIN_ONLY) as address:
        ids = [
            item["id"]
            for item in httpx.get(f"{address}/items", params={"k": 24}).json()["items"]
        ]
        write_days(tmp_path / "log", "shapes", ids)
        page.open(f"{address}/ui/insights")
        page.appears("#key").send_keys("wrong key\n")
        page.says("#error", "does not know")
        page.type("#key", ADMIN + "\n")
        until(lambda: page.all("#worst strong"))
        assert [
            len(page.all(f"#{name} .column")) for name in ("days", "positions")
        ] == [12, 10]
        page.loads(".pictures img")
        assert page.texts("#worst strong") == ['a "blue", round square', "a zebra"]
        assert page.all("#worst a")[1].get_attribute("href") == f"{address}/#q=a+zebra"
        width = (
            "return document.documentElement.scrollWidth <= (screen.width === 390 ? 390"
            " : innerWidth)"
        )
        assert page.js(width)
        for theme in ("light", "dark"):
            page.emulate(prefers_color_scheme=theme)
            assert page.barriers() == []
        page.emulate()
        page.click("#forget-key")
        page.appears("#key")
    page.errors()  # the browser logs refused keys
