"""The figures of the insights page: what the log says, day by day."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic_core import to_json

from app.feedback import insights, store
from app.feedback.insights import summarize
from app.feedback.store import EventRow, QueryRow
from tests.support.responses import assert_problem
from tests.support.service import ADMIN, ALICE, KEYS, WORDS, bearer, opened

HITS = ["a", "b", "c"]


def write(
    folder: Path, day: str, searches: list[tuple[str, str, dict[str, Any]]], clicks: list[tuple[str, str]]
) -> None:
    """Write a day of the log. searches: id, text, other fields. clicks: id, item."""
    store.prepare(folder)
    moment = int(time.mktime(time.strptime(day, "%Y-%m-%d")) * 1000)
    queries = [
        QueryRow(query_id, moment, "index", text, HITS, "text", 0, 1, False)._replace(**fields)
        for query_id, text, fields in searches
    ]
    events = [EventRow(each, moment, "", "c", "click", item, None, None) for each, item in clicks]
    for name, rows, schema in (
        (store.QUERIES, queries, store.QUERY_SCHEMA),
        (store.EVENTS, events, store.EVENT_SCHEMA),
    ):
        store.write_table(folder / name / f"{day}.0.parquet", store.in_ubi(rows, schema))


def test_searches_are_counted_by_day_position_version_and_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        "2026-01-01",
        [
            ("1", "red", {}),
            ("2", "Red", {"version": 2}),
            ("3", "blue", {"nothing_fits": True}),
            ("4", "none", {"hits": []}),
            ("5", "red", {"offset": 3}),
            ("6", "x", {"collection": "other"}),
        ],
        [("1", "b"), ("2", "z")],
    )
    write(tmp_path, "2026-01-02", [("7", "blue", {"hits": ["c", "a"]}), ("7", "blue", {})], [("5", "a"), ("3", "a")])
    found = summarize(tmp_path, "index")
    assert found["days"] == [
        {"day": "2026-01-01", "searches": 4, "clicked": 2, "nothing": 2},
        {"day": "2026-01-02", "searches": 1, "clicked": 0, "nothing": 0},
    ], "a click after midnight counts for its search, one of an item that was not shown for none"
    shown = {each["position"]: (each["shown"], each["clicked"]) for each in found["positions"]}
    assert shown == {1: (4, 1), 2: (4, 1), 3: (3, 0), 4: (1, 1), 5: (1, 0), 6: (1, 0)}
    assert found["versions"][2] == {"searches": 1, "clicked": 0, "nothing": 0}
    assert found["worst"] == [{"query": "none", "searches": 1, "clicked": 0, "nothing": 1, "items": []}], (
        "red and blue are clicked more often than the average"
    )
    assert [each["query"] for each in found["unmet"]] == ["blue", "none"]
    assert found["unmet"][0] == {"query": "blue", "searches": 2, "clicked": 1, "nothing": 1, "items": ["c", "a"]}
    assert (found["every"], found["is_partial"], found["has_hashes"]) == (1, False, False)


def test_busy_days_are_sampled_and_many_days_take_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    letters = np.array([*store._STARTS])
    ids = [f"{letters[rng.integers(len(letters))]}{number}" for number in range(4000)]
    write(tmp_path, "2026-01-01", [(each, "red", {}) for each in ids], [(each, "a") for each in ids[::4]])
    write(tmp_path, "2026-01-02", [("AA1", "red", {})], [])
    monkeypatch.setattr(insights, "_MAX_SEARCHES", 500)
    found = summarize(tmp_path, "index")
    assert found["every"] == 9
    searches, clicked = found["days"][0]["searches"], found["days"][0]["clicked"]
    assert searches == pytest.approx(4000, rel=0.15)
    assert clicked / searches == pytest.approx(0.25, abs=0.06)
    monkeypatch.setattr(insights, "_SECONDS", 0.0)
    assert summarize(tmp_path, "index")["is_partial"]
    monkeypatch.setattr(insights, "_SECONDS", 20.0)
    monkeypatch.setattr(insights, "_DAYS", 1)
    assert [day["day"] for day in summarize(tmp_path, "index")["days"]] == ["2026-01-02"]


def test_the_latest_search_is_last_wherever_it_is_stored(tmp_path: Path) -> None:
    write(tmp_path, time.strftime("%Y-%m-%d", time.gmtime()), [("1", "red", {})], [])
    journal = store.Journal(tmp_path)
    row = QueryRow("2", int(time.time() * 1000) + 86_400_000, "index", "red", ["b"], "text", 0, 1, False)
    journal.write([to_json(row)], [])
    journal.close()
    assert summarize(tmp_path, "index")["worst"][0]["items"] == ["b"]


def test_a_log_of_hashes_names_no_query(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01", [("1", "9f86d0", {"is_hashed": True})], [])
    found = summarize(tmp_path, "index")
    assert (found["worst"], found["has_hashes"], found["days"][0]["searches"]) == ([], True, 1)


async def test_the_admin_key_opens_the_figures_and_no_other(index: Path, tmp_path: Path) -> None:
    url = "/ui/insights/data"
    async with opened(index, feedback=tmp_path, feedback_texts=True, collections={"other": index}, **KEYS) as client:
        assert (await client.get("/ui/insights")).headers["content-type"] == "text/html; charset=utf-8"
        for headers in ({}, bearer(ALICE)):
            assert_problem(await client.get(url, headers=headers), 401, "Authorization")
        for query in ("red", "red", "blue"):
            await client.post("/search/text", json={"query": query}, headers=bearer(ALICE))
        await client.app.state.feedback._flush()
        found = (await client.get(url, headers=bearer(ADMIN))).json()
        assert [(each["query"], each["searches"]) for each in found["worst"]] == [("red", 2), ("blue", 1)]
        assert found["days"][0]["searches"] == 3
        assert found["collections"] == [index.name, "other"]
        (version,) = found["versions"]
        assert (version["version"], version["searches"], version["count"]) == (1, 3, 24)
        await client.post("/search/text", json=WORDS, headers=bearer(ALICE))
        await client.app.state.feedback._flush()
        assert (await client.get(url, headers=bearer(ADMIN))).json() == found, "a minute old at most"
        other = await client.get(f"/collections/other{url}", headers=bearer(ADMIN))
        assert (other.json()["days"][0]["searches"], other.json()["worst"]) == (0, [])
        assert_problem(await client.get(f"/collections/no{url}", headers=bearer(ADMIN)), 404)
        (tmp_path / "ubi_queries" / "2026-01-01.0.parquet").write_bytes(b"torn")
        client.app.state.feedback._summaries.clear()
        damaged = await client.get(url, headers=bearer(ADMIN))
        assert_problem(damaged, 503)
        assert "2026-01-01.0.parquet is damaged" in damaged.json()["detail"]


async def test_the_figures_say_how_to_turn_feedback_on(index: Path) -> None:
    async with opened(index, **KEYS) as client:
        response = await client.get("/ui/insights/data", headers=bearer(ADMIN))
        assert_problem(response, 404)
        assert "DCAR_FEEDBACK" in response.json()["detail"]
