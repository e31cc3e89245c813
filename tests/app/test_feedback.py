"""Feedback: query ids, the events that are accepted, and the log that holds both."""

import json
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.settings import load_settings
from app.feedback.log import EventRow, QueryRow, Store, forget, prune, read_log
from dcar_core.util.errors import DcarError
from tests.support.commands import Command
from tests.support.feedback_log import write_log
from tests.support.images import png
from tests.support.responses import assert_problem, scrape
from tests.support.service import (
    ADMIN,
    ADMIN_ONLY,
    ALICE,
    BOB,
    KEYS,
    WORDS,
    bearer,
    opened,
)


def event(
    query_id: str,
    item: str,
    action: str = "click",
    **fields: Any,
) -> dict[str, Any]:
    return {
        "query_id": query_id,
        "client_id": "c1",
        "action_name": action,
        "object_id": item,
        **fields,
    }


async def searched(client: httpx.AsyncClient, **options: Any) -> tuple[str, list[str]]:
    """Search for "red"; return the query id and the ids of the results."""
    body = (await client.post("/search/text", json=WORDS, **options)).json()
    return body["query_id"], [result["id"] for result in body["results"]]


async def send(
    client: httpx.AsyncClient,
    *events: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    response = await client.post("/feedback", json={"events": events}, **options)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def stored(folder: Path) -> tuple[dict[str, QueryRow], list[EventRow]]:
    """The searches of a log by their ids, and the events."""
    rows = [*read_log(folder)]
    return {query.query_id: query for query, _ in rows if query}, [
        event for _, events in rows for event in events
    ]


def database(folder: Path) -> sqlite3.Connection:
    (file,) = folder.glob("*.sqlite")
    return sqlite3.connect(file, isolation_level=None)


async def test_nothing_is_written_while_it_is_off(index: Path) -> None:
    before = sorted(index.rglob("*"))
    async with opened(index, **ADMIN_ONLY) as client:
        assert "query_id" not in (await client.post("/search/text", json=WORDS)).json()
        refused = await client.post("/feedback", json={"events": [event("a", "b")]})
        without_figures = await client.get("/ui/insights/data", headers=bearer(ADMIN))
        for response, status in ((refused, 403), (without_figures, 404)):
            assert_problem(response, status)
            assert "DCAR_FEEDBACK" in response.json()["detail"]
        client.headers.update(bearer(ADMIN))
        assert not [name for name, _ in await scrape(client) if "feedback" in name]
    assert sorted(index.rglob("*")) == before


async def test_searches_are_named_and_stored_with_their_events(index: Path) -> None:
    async with opened(index, feedback=True, feedback_texts=True) as client:
        query_id, items = await searched(client)
        image = await client.post(
            "/search/image",
            files={"file": ("a.png", png("red"))},
            data={"query": "red"},
        )
        batch = await client.post(
            "/search/batch",
            json={"queries": [WORDS, {"query": "blue", "k": 2, "offset": 2}]},
        )
        similar = await client.get("/items/circle%2Fred.png/similar")
        ids = [
            query_id,
            *(
                body["query_id"]
                for body in (image.json(), *batch.json()["answers"], similar.json())
            ),
        ]
        assert len(set(ids)) == 5
        assert await send(
            client,
            event(query_id, items[0], "impression"),
            event(query_id, items[1], position=9000, timestamp="2026-01-01T00:00:00Z"),
            event(query_id, items[1], "judge", rating=3),
            event(ids[3], batch.json()["answers"][1]["results"][0]["id"], "purchase"),
        ) == {"accepted": 4, "ignored": []}
        text = json.dumps({"events": [event(query_id, items[2], "save")]})
        beacon = await client.post(
            "/feedback",
            content=text,
            headers={"Content-Type": "text/plain;charset=UTF-8"},
        )
        assert beacon.json() == {"accepted": 1, "ignored": []}
    queries, events = stored(index / "feedback")
    rows = [queries[query_id] for query_id in ids]
    assert [row.text for row in rows] == ["red", "", "red", "blue", ""]
    assert (rows[0].hits, rows[3].offset, rows[0].version) == (items, 2, 1)
    assert {row.collection for row in rows} == {"index"}
    ratings = {row.action: row.rating for row in events}
    assert ratings == {
        "impression": None,
        "click": None,
        "judge": 3,
        "purchase": None,
        "save": None,
    }


GOOD = event("a" * 32, "b")
JUDGED = GOOD | {"action_name": "judge"}
BAD: list[tuple[Any, int, str]] = [
    ([], 422, "body"),
    ({}, 422, "events"),
    ({"events": []}, 422, "events"),
    ({"events": [GOOD, 1]}, 422, "events.1"),
    ({"events": [GOOD] * 501}, 422, "events"),
    ({"events": [GOOD], "more": 1}, 422, "more"),
    (" " * 2**18, 413, "body"),
    *(
        ({"events": [JUDGED | rating]}, 422, "events.0.rating")
        for rating in ({}, {"rating": 4}, {"rating": 2.5})
    ),
    *(
        ({"events": [GOOD, GOOD | {field: value}]}, 422, f"events.1.{field}")
        for field, values in {
            "query_id": ("", "x" * 101, 1),
            "client_id": ("x" * 101, "a b", "é", "a\n", None),
            "rating": (0,),
            "action_name": ("delete", ["click"]),
            "object_id": ("", "x" * 1025),
        }.items()
        for value in values
    ),
]


async def test_bad_events_name_the_field_and_are_not_stored(
    index: Path, tmp_path: Path
) -> None:
    async with opened(index, feedback=tmp_path) as client:
        for body, status, field in BAD:
            assert_problem(await client.post("/feedback", json=body), status, field)
        for content, kind, status, field in (
            ("{}", "html", 415, "Content-Type"),
            ("{", "plain", 400, "body"),
        ):
            wrong = await client.post(
                "/feedback",
                content=content,
                headers={"Content-Type": f"text/{kind}"},
            )
            assert_problem(wrong, status, field)
    assert stored(tmp_path) == ({}, [])


async def test_only_events_for_shown_items_of_own_searches_change_something(
    index: Path, tmp_path: Path
) -> None:
    alice, bob = ({"headers": bearer(key)} for key in (ALICE, BOB))
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        query_id, items = await searched(client, **alice)
        click = event(query_id, items[0])
        judged = event(query_id, items[0], "judge", rating=3)
        assert_problem(await client.post("/feedback", json={"events": [click]}), 401)
        forged = [
            f"{query_id[:at]}{'1' if query_id[at] != '1' else '2'}{query_id[at + 1 :]}"
            for at in (0, 12, 39)
        ]
        wrong = [
            event(each, items[0]) for each in (*forged, "x", "é" * 40, query_id[:16])
        ]
        answer = await send(client, click, *wrong, event(query_id, "nothing"), **alice)
        assert answer["accepted"] == 1
        fields = [f"events.{number}.query_id" for number in range(1, 7)]
        assert [each["field"] for each in answer["ignored"]] == [
            *fields,
            "events.7.object_id",
        ]
        assert (await send(client, click, **bob))["accepted"] == 0
        assert (await send(client, click, judged, judged, **alice))["accepted"] == 1, (
            "the others are known"
        )
        assert (await send(client, judged | {"rating": 0}, **alice))["accepted"] == 1, (
            "another opinion"
        )
    assert [row.rating for row in stored(tmp_path)[1] if row.action == "judge"] == [0]
    next(tmp_path.glob("*.sqlite")).rename(tmp_path / "elsewhere.sqlite")
    # on another host, for a day
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        late = event(query_id, items[1], client_id="late")
        assert (await send(client, late, **bob))["accepted"] == 0
        assert (await send(client, late, **alice))["accepted"] == 1
        later = time.time() + 24 * 3600 + 5
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.feedback.log.time.time", lambda: later)
            assert (await send(client, late | {"object_id": items[2]}, **alice))[
                "accepted"
            ] == 0
    queries, events = stored(tmp_path)
    assert [
        (queries[row.query_id].hits, row.item) for row in events if row.client == "late"
    ] == [(items, items[1])]
    assert [query.text for query in queries.values()] == [""], (
        "texts are not stored by default"
    )
    assert not (index / "feedback").exists()


async def test_flood_takes_bounded_memory_and_failing_disk_costs_events_alone(
    index: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.feedback.log.MAX_QUERIES", 3)
    monkeypatch.setattr("app.feedback.log.FLUSH_S", 60.0)
    async with opened(index, feedback=tmp_path) as client:

        async def lost() -> list[float]:
            metrics = await scrape(client)
            return [
                metrics.get(("dcar_feedback_lost_total", (("kind", kind),)), 0)
                for kind in ("queries", "events")
            ]

        searches = [await searched(client) for _ in range(4)]
        assert await lost() == [1, 0]
        clicks = [event(query_id, items[0]) for query_id, items in searches]
        with closing(database(tmp_path)) as other:
            other.execute("ALTER TABLE events RENAME TO away")
            refused = await client.post("/feedback", json={"events": clicks})
            other.execute("ALTER TABLE away RENAME TO events")
        assert_problem(refused, 503)
        assert refused.headers["retry-after"]
        assert await lost() == [4, 4]
        assert (
            sum("feedback is lost" in record.message for record in caplog.records) == 1
        )
        await searched(client)
        assert (await send(client, *clicks))["accepted"] == 4, (
            "also for searches that were lost"
        )
    assert [len(rows) for rows in stored(tmp_path)] == [1, 4]


def test_setting_is_a_switch_or_a_writable_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, folder in {
        "true": Path("index/feedback"),
        "0": None,
        "log/x": Path("log/x"),
    }.items():
        monkeypatch.setenv("DCAR_FEEDBACK", value)
        assert load_settings(index=Path("index")).feedback_folder == folder
    (tmp_path / "file").write_text("")
    with pytest.raises(DcarError, match="DCAR_FEEDBACK"):
        Store(tmp_path / "file").close()
    first, second = (Store(tmp_path / "log").secret for _ in range(2))
    assert first == second


WRITER = """
import sqlite3, sys
from pathlib import Path
from app.feedback.log import EventRow, Store
store = Store(Path(sys.argv[1]))
for number in range(100_000):
    name = f"{sys.argv[2]}-{number}"
    rows = [EventRow(name, 0, f"c{client}", "click", "a", None) for client in range(3)]
    try:
        store.add([], rows)
    except sqlite3.Error:
        print("full", flush=True)
        break
    print(name, flush=True)
"""


@pytest.mark.parametrize("file_size", [None, 200_000])
def test_killed_processes_and_a_full_disk_lose_no_acknowledged_event(
    tmp_path: Path, file_size: int | None
) -> None:
    Store(tmp_path).close()
    processes = [
        Command("-c", WRITER, tmp_path, name, file_size=file_size) for name in "ab"
    ]
    acknowledged = list[str]()
    for process in processes:
        acknowledged += [process.stdout.readline() for _ in range(20)]
    for process in processes:
        if file_size is None:
            process.send_signal(signal.SIGKILL)
        acknowledged += process.communicate(timeout=30)[0].splitlines()
    names = {line.strip() for line in acknowledged} - {"full", ""}
    assert len(names) >= 20
    rows = [events for _, events in read_log(tmp_path)]
    assert names <= {events[0].query_id for events in rows}
    assert {len(events) for events in rows} == {3}, (
        "rows of a request are stored together"
    )


NOW = int(time.time())


def query(number: int, days: int = 0, hits: tuple[str, ...] = ("a", "b")) -> QueryRow:
    query_id = f"{NOW + 3600 - days * 86_400:08x}{number:08x}"
    return QueryRow(query_id, NOW * 1000, "index", "red", hits, 0, 1)


def click(search: QueryRow, client: str = "c1") -> EventRow:
    return EventRow(search.query_id, NOW * 1000, client, "click", "a", None)


def test_old_rows_and_those_beyond_the_size_are_removed(tmp_path: Path) -> None:
    searches = [
        query(number, days=40 - number, hits=tuple("ab" * 300)) for number in range(40)
    ]
    write_log(tmp_path, searches, map(click, searches))
    assert prune(tmp_path, 30, 2**20) == 20
    assert [len(rows) for rows in stored(tmp_path)] == [30, 30]
    file = next(tmp_path.glob("*.sqlite"))
    removed = 0
    while file.stat().st_size > 40_000:
        gone = prune(tmp_path, 90, 40_000)
        assert gone > 0
        removed += gone
    assert [*stored(tmp_path)[0]] == [
        row.query_id for row in searches[10 + removed // 2 :]
    ], "the newest are kept"
    file = file.rename(tmp_path / "elsewhere.sqlite")
    Store(tmp_path).close()
    assert prune(tmp_path, 1, 2**20) == 0, "another host may be writing it"
    os.utime(file, (NOW - 2 * 86_400,) * 2)
    assert prune(tmp_path, 1, 2**20) > 0


def test_a_client_is_forgotten_with_its_searches_in_all_files(tmp_path: Path) -> None:
    one, two, three = searches = [query(number) for number in range(3)]
    write_log(
        tmp_path,
        searches,
        [click(one, "gone"), click(two, "gone"), click(three)],
    )
    next(tmp_path.glob("*.sqlite")).rename(tmp_path / "elsewhere.sqlite")
    write_log(tmp_path, [], [click(two)])
    running = Store(tmp_path)
    assert forget(tmp_path, "gone") == (2, 1)
    queries, events = stored(tmp_path)
    assert [*queries] == [each.query_id for each in (two, three)]
    assert {each.client for each in events} == {"c1"}
    running.add([], [click(three, "later")])
    running.close()
    assert {each.client for each in stored(tmp_path)[1]} == {"c1", "later"}
    files = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    assert b"gone" not in files
