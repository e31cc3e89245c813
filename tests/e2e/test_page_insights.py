"""The insights page: figures of the log, and the way from queries to their searches."""

import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.feedback.store import EventRow, QueryRow
from tests.support.feedback_log import write_log
from tests.support.page import Page, ready, served, until
from tests.support.service import ADMIN, ADMIN_ONLY, ALICE, KEYS

pytestmark = pytest.mark.browser


def write_days(folder: Path, name: str, ids: list[str], days: int = 12) -> None:
    """Write a log of some days, in which the first results are clicked most, and one query never."""
    rng, queries, events = np.random.default_rng(0), list[QueryRow](), list[EventRow]()
    for back in range(days):
        seconds = int(time.time()) - back * 86_400
        for number in range(int(rng.integers(20, 60))):
            text = ["a red circle", 'a "blue", round square', "green", "a zebra"][number % 4]
            hits, query_id, moment = rng.permutation(ids)[:10].tolist(), f"{seconds:08x}{number:08x}", seconds * 1000
            queries.append(QueryRow(query_id, moment, None, name, text, hits, "text", 0, 1, False, text == "a zebra"))
            places = np.flatnonzero(rng.random(10) < 0.4 / np.arange(1, 11)).tolist() if number % 2 == 0 else []
            events += [EventRow(query_id, moment, "c", "click", hits[place], None) for place in places]
    write_log(folder, queries, events)


def test_the_figures_of_the_log_are_shown(both: Page, indexes: dict[str, Path], tmp_path: Path) -> None:
    page = both
    with served(indexes["shapes"], feedback=tmp_path / "log", **ADMIN_ONLY) as address:
        ids = [each["id"] for each in httpx.get(f"{ready(address)}/items", params={"k": 24}).json()["items"]]
        write_days(tmp_path / "log", "shapes", ids)
        page.open(f"{address}/ui/insights")
        until(lambda: page.one("#key").is_displayed())
        page.one("#key").send_keys("wrong key" + "\n")
        until(lambda: "does not know" in page.one("#error").text)
        page.one("#key").send_keys(ADMIN + "\n")
        until(lambda: page.all("#worst strong"))
        assert len(page.all("#days .column")) == 12
        assert len(page.all("#positions .column")) == 10
        pictures = "return [...document.querySelectorAll('.pictures img')].every(i => i.complete && i.naturalWidth > 0)"
        page.driver.execute_script("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
        until(lambda: page.driver.execute_script(pictures))
        queries = [each.text for each in page.all("#worst strong")]
        assert queries == ['a "blue", round square', "a zebra"]
        links = [each.get_attribute("href") for each in page.all("#worst a")]
        assert links[1] == f"{address}/#q=a+zebra"
        wide = "return document.documentElement.scrollWidth <= (screen.width === 390 ? 390 : innerWidth)"
        assert page.driver.execute_script(wide)
        for theme in ("light", "dark"):
            page.emulate(prefers_color_scheme=theme)
            assert page.barriers() == []
        page.emulate()
        page.one("#forget-key").click()
        until(lambda: page.one("#key").is_displayed())
    page.errors()  # the browser logs refused keys


def test_it_says_how_to_turn_feedback_on(page: Page, indexes: dict[str, Path]) -> None:
    with served(indexes["shapes"], **KEYS) as address:
        page.open(f"{ready(address)}/ui/insights")
        until(lambda: page.one("#key").is_displayed())
        page.one("#api-key").send_keys(ALICE)
        page.one("#key").send_keys(ADMIN + "\n")
        until(lambda: "DCAR_FEEDBACK" in page.one("#error").text)
        page.one("#forget-key").click()
        until(lambda: page.one("#key").is_displayed())
    page.errors()  # the browser logs refused keys, and 404
