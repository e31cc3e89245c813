"""The figures of the insights page: what the log says."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from app.feedback.export import summarize
from app.feedback.log import EventRow, QueryRow
from tests.support.feedback_log import write_log
from tests.support.responses import assert_problem
from tests.support.service import ADMIN, ALICE, KEYS, bearer, opened

NOW = int(time.time())
DAYS = [time.strftime("%Y-%m-%d", time.gmtime(NOW - back * 86_400)) for back in (2, 1)]


def search(number: int, text: str, back: int = 2, **fields: Any) -> QueryRow:
    """A search of some days ago, whose id has a random part."""
    seconds, part = NOW - back * 86_400, np.random.default_rng(number).integers(2**32)
    row = QueryRow(f"{seconds:08x}{part:08x}", seconds * 1000 + number, "index", text, list("abc"), 0, 1)
    return row._replace(**fields)


def click(query: QueryRow, item: str) -> EventRow:
    return EventRow(query.query_id, query.time, "c", "click", item, None)


def test_searches_are_counted_by_day_position_version_and_text(tmp_path: Path) -> None:
    first = [
        search(1, "red"), search(2, "Red", version=2), search(3, "blue", nothing_fits=True), search(4, "none", hits=[]),
        search(5, "red", offset=3), search(6, "x", collection="other"), search(9, "", hits=[]),
    ]  # fmt: skip
    last = search(7, "blue", back=1, hits=["c", "a"])
    events = [click(first[0], "b"), click(first[1], "z"), click(first[4], "a"), click(first[2], "a")]
    write_log(tmp_path, first, events)
    next(tmp_path.glob("*.sqlite")).rename(tmp_path / "elsewhere.sqlite")
    write_log(tmp_path, [last, search(8, "old", back=31)])
    found = summarize(tmp_path, "index")
    assert found["days"] == [
        {"day": DAYS[0], "searches": 5, "clicked": 2, "nothing": 3},
        {"day": DAYS[1], "searches": 1, "clicked": 0, "nothing": 0},
    ], "one click is of an item that was not shown"
    shown = {each["position"]: (each["shown"], each["clicked"]) for each in found["positions"]}
    assert shown == {1: (4, 1), 2: (4, 1), 3: (3, 0), 4: (1, 1), 5: (1, 0), 6: (1, 0)}
    assert found["versions"][2] == {"searches": 1, "clicked": 0, "nothing": 0}
    assert found["worst"] == [{"query": "none", "searches": 1, "clicked": 0, "nothing": 1, "items": []}], (
        "red and blue are clicked more often than the average"
    )
    unmet = {each["query"]: each for each in found["unmet"]}
    assert {*unmet} == {"blue", "none"}
    assert unmet["blue"] == {"query": "blue", "searches": 2, "clicked": 1, "nothing": 1, "items": ["c", "a"]}


async def test_the_admin_key_opens_the_figures_and_no_other(index: Path, tmp_path: Path) -> None:
    url = "/ui/insights/data"
    async with opened(index, feedback=tmp_path, feedback_texts=True, collections={"other": index}, **KEYS) as client:
        assert (await client.get("/ui/insights")).headers["content-type"] == "text/html; charset=utf-8"
        for headers in ({}, bearer(ALICE)):
            assert_problem(await client.get(url, headers=headers), 401, "Authorization")
        for query in ("red", "red", "blue"):
            await client.post("/search/text", json={"query": query}, headers=bearer(ALICE))
        await client.app.state.feedback.flush()
        found = (await client.get(url, headers=bearer(ADMIN))).json()
        assert [(each["query"], each["searches"]) for each in found["worst"]] == [("red", 2), ("blue", 1)]
        assert found["days"][0]["searches"] == 3
        assert found["collections"] == [index.name, "other"]
        (version,) = found["versions"]
        assert (version["version"], version["searches"], version["count"]) == (1, 3, 24)
        other = await client.get(f"/collections/other{url}", headers=bearer(ADMIN))
        assert (other.json()["days"], other.json()["worst"]) == ([], [])
        assert_problem(await client.get(f"/collections/no{url}", headers=bearer(ADMIN)), 404)
    (tmp_path / "torn.sqlite").write_bytes(b"torn" * 100)
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        damaged = await client.get(url, headers=bearer(ADMIN))
        assert_problem(damaged, 503)
        assert "torn.sqlite cannot be used; remove it" in damaged.json()["detail"]
