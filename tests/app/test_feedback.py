"""Feedback: query ids, the events that are accepted, and the log that holds both."""

import asyncio
import json
import shutil
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pyarrow.parquet as pq
import pytest
from pydantic_core import to_json

from app.core.settings import load_settings
from app.feedback import store
from app.feedback.log import FeedbackLog
from app.feedback.store import EventRow, Journal, QueryRow
from dcar_core.util.errors import DcarError, LockedError
from tests.support.commands import Command
from tests.support.images import png
from tests.support.responses import assert_problem, scrape
from tests.support.service import ALICE, BOB, KEYS, WORDS, ServiceClient, bearer, opened


def event(query_id: str, item: str, action: str = "click", **fields: Any) -> dict[str, Any]:
    return {"query_id": query_id, "client_id": "c1", "action_name": action, "object_id": item, **fields}


async def searched(client: httpx.AsyncClient, **options: Any) -> tuple[str, list[str]]:
    """Search for "red"; return the query id and the ids of the results."""
    body = (await client.post("/search/text", json=WORDS, **options)).json()
    return body["query_id"], [result["id"] for result in body["results"]]


async def send(client: httpx.AsyncClient, *events: dict[str, Any], **options: Any) -> dict[str, Any]:
    response = await client.post("/feedback", json={"events": events}, **options)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def stored(folder: Path) -> list[tuple[str, str, str]]:
    """Client, action and item of the events in the log."""
    rows = store.read_log(folder)[1].to_pylist()
    return [
        (row["client_id"], row["action_name"], row["event_attributes"]["object"]["object_id"])
        for row in rows
    ]  # fmt: skip


async def test_nothing_is_written_while_it_is_off(index: Path) -> None:
    before = sorted(index.rglob("*"))
    async with opened(index) as client:
        assert "query_id" not in (await client.post("/search/text", json=WORDS)).json()
        response = await client.post("/feedback", json={"events": [event("a", "b")]})
        assert_problem(response, 403)
        assert "DCAR_FEEDBACK" in response.json()["detail"]
        assert not [name for name, _ in await scrape(client) if "feedback" in name]
    assert sorted(index.rglob("*")) == before


async def test_searches_are_named_and_events_are_stored_in_the_columns_of_ubi(index: Path, gallery: Path) -> None:
    an_hour_ago = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    async with opened(index, feedback=True, feedback_texts=True) as client:
        query_id, items = await searched(client)
        image = await client.post("/search/image", files={"file": ("a.png", png("red"))}, data={"query": "red"})
        batch = await client.post("/search/batch", json={"queries": [WORDS, {"query": "blue", "k": 2, "offset": 2}]})
        similar = await client.get(f"/items/{'circle%2Fred.png'}/similar")
        answers = [image.json(), *batch.json()["answers"], similar.json()]
        ids = [query_id, *(answer["query_id"] for answer in answers)]
        assert len(set(ids)) == 5
        assert await send(
            client,
            event(query_id, items[0], "shown", timestamp="0001-01-01T00:00:00Z"),
            event(query_id, items[1], position=9000, timestamp=an_hour_ago.isoformat()),
            event(query_id, items[1], "judge", rating=3),
            event(ids[3], answers[2]["results"][0]["id"], "purchase"),
        ) == {"accepted": 4, "ignored": []}
        text = json.dumps({"events": [event(query_id, items[2], "save")]})
        beacon = await client.post("/feedback", content=text, headers={"Content-Type": "text/plain;charset=UTF-8"})
        assert beacon.json() == {"accepted": 1, "ignored": []}
        metrics = await scrape(client)
        assert metrics["dcar_feedback_rows_total", (("kind", "events"),)] == 5
    queries, events = store.read_log(index / "feedback")
    rows = {row["query_id"]: row for row in queries.to_pylist()}
    assert [rows[each]["user_query"] for each in ids] == ["red", "red", "red", "blue", ""]
    assert [rows[each]["query_attributes"]["kind"] for each in ids] == ["text", "other", "text", "text", "other"]
    assert rows[ids[0]]["query_response_hit_ids"] == items
    facts = {"kind": "text", "offset": 2, "index_version": 1, "is_hashed": False}
    assert rows[ids[3]]["query_attributes"].items() >= facts.items()
    assert {row["application"] for row in rows.values()} == {"index"}
    actions = [row["action_name"] for row in events.to_pylist()]
    assert actions == ["impression", "click", "judge", "purchase", "save"]
    positions = [row["event_attributes"]["position"]["ordinal"] for row in events.to_pylist()]
    assert positions == [1, 2, 2, 3, 3], "by rank, whatever the event says"
    first, second = events.to_pylist()[:2]
    assert first["timestamp"] > an_hour_ago, "an absurd time is the present"
    assert second["timestamp"] == an_hour_ago
    assert events.to_pylist()[2]["event_attributes"]["rating"] == 3


async def test_each_search_is_stored_once_when_a_batch_of_ids_is_full_or_has_lasted(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.feedback.log._PLACES", "abc")
    monkeypatch.setattr("app.feedback.log._BATCH_S", 0.02)
    monkeypatch.setattr("app.feedback.log._FLUSH_S", 0.01)
    began, named = datetime.now(UTC), list[str]()
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        for number in range(24):
            query_id, items = await searched(client, headers=bearer(BOB if number % 5 else ALICE))
            named.append(query_id)
            if number % 8 == 0:
                await asyncio.sleep(0.05)
        assert (await send(client, event(query_id, items[0]), headers=bearer(BOB)))["accepted"] == 1
    rows = store.read_log(tmp_path)[0].to_pylist()
    assert sorted(row["query_id"] for row in rows) == sorted(named)
    moments = {row["query_id"]: row["timestamp"] for row in rows}
    assert began - timedelta(milliseconds=1) < moments[named[0]] < moments[named[-1]]


async def test_a_search_has_the_client_that_its_request_names(index: Path) -> None:
    async with opened(index, feedback=True) as client:
        for headers in ({}, {"X-Client-ID": 'a"b'}, {"X-Client-ID": "c" * 200}, {"X-Client-ID": "Zoë".encode()}):
            query_id, items = await searched(client, headers=headers)
            assert (await send(client, event(query_id, items[0])))["accepted"] == 1
    queries, _ = store.read_log(index / "feedback")
    assert queries["client_id"].to_pylist() == [None, 'a"b', None, None], "names that events could not have are none"
    (path,) = (index / "feedback" / "journal").iterdir()
    store.roll(path.parent.parent, everything=True)
    (path,) = (index / "feedback" / store.QUERIES).iterdir()
    store.write_table(path, queries.drop_columns(["client_id"]))  # as earlier versions wrote it
    assert store.read_log(index / "feedback")[0]["client_id"].null_count == 4
    assert store.forget(index / "feedback", "nobody") == (0, 0)


async def test_actions_may_have_their_usual_names(index: Path) -> None:
    names = {"shown": "impression", "clicked": "click", "bought": "purchase", "saved": "save", "judged": "judge"}
    async with opened(index, feedback=True) as client:
        query_id, items = await searched(client)
        ratings = [{"rating": 2} if name == "judged" else {} for name in names]
        events = [event(query_id, items[0], name, **rating) for name, rating in zip(names, ratings, strict=True)]
        assert await send(client, *events) == {"accepted": 5, "ignored": []}
    assert [action for _, action, _ in stored(index / "feedback")] == [*names.values()]


async def test_texts_are_hashed_unless_the_operator_stores_them(index: Path, tmp_path: Path) -> None:
    async with opened(index, feedback=tmp_path / "log") as client:
        await searched(client)
        await searched(client)
        await client.post("/search/text", json={"query": "blue"})
    rows = store.read_log(tmp_path / "log")[0].to_pylist()
    texts = [row["user_query"] for row in rows]
    assert texts[0] == texts[1] != texts[2]
    assert "red" not in texts
    assert all(row["query_attributes"]["is_hashed"] for row in rows)
    assert not (index / "feedback").exists()


GOOD = event("a" * 32, "b")
BAD: list[tuple[bytes, int, str]] = [
    (b"{", 400, "body"),
    (b"[]", 422, "body"),
    (b"{}", 422, "events"),
    (b'{"events": []}', 422, "events"),
    (json.dumps({"events": [GOOD], "more": 1}).encode(), 422, "more"),
    (json.dumps({"events": [GOOD] * 501}).encode(), 422, "events"),
    (json.dumps({"events": [GOOD, 1]}).encode(), 422, "events.1"),
    (b" " * (256 * 2**10 + 1), 413, "body"),
    *(
        (json.dumps({"events": [GOOD, GOOD | {field: value}]}).encode(), 422, f"events.1.{field}")
        for field, values in {
            "query_id": ("", "x" * 101, None, 1),
            "client_id": ("", "x" * 101, "a b", "é", "a\n", None, []),
            "action_name": ("", "delete", None, 3, ["click"]),
            "object_id": ("", "x" * 1025, None, 7),
            "position": (0, -1, 10_001, "1", 1.5, True),
            "timestamp": ("yesterday", [], "9999999999999999999"),
            "rating": (0, 3),
            "user": ("x",),
        }.items()
        for value in values
    ),
    *(
        (json.dumps({"events": [GOOD | {"action_name": "judge"} | fields]}).encode(), 422, "events.0.rating")
        for fields in ({}, {"rating": -1}, {"rating": 4}, {"rating": "3"}, {"rating": 2.5}, {"rating": None})
    ),
]


async def test_bad_events_name_the_field_and_are_not_stored(index: Path, tmp_path: Path) -> None:
    async with opened(index, feedback=tmp_path) as client:
        for body, status, field in BAD:
            response = await client.post("/feedback", content=body, headers={"Content-Type": "application/json"})
            assert_problem(response, status, field)
        unknown = await client.post("/feedback", json={"events": [GOOD | {"action_name": "delete"}]})
        assert [error["field"] for error in unknown.json()["errors"]] == ["events.0.action_name"]
        wrong = await client.post("/feedback", content=b"{}", headers={"Content-Type": "text/html"})
        assert_problem(wrong, 415, "Content-Type")
    assert stored(tmp_path) == []


async def test_only_events_for_shown_items_of_own_searches_change_something(index: Path, tmp_path: Path) -> None:
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        query_id, items = await searched(client, headers=bearer(ALICE))
        assert_problem(await client.post("/feedback", json={"events": [event(query_id, items[0])]}), 401)
        for place in (0, 12, -1):
            forged = query_id.replace(query_id[place], "A" if query_id[place] != "A" else "B")
            assert (await send(client, event(forged, items[0]), headers=bearer(ALICE)))["accepted"] == 0
        for given, field in (
            (event("x", items[0]), "query_id"),
            (event(query_id[:16], items[0]), "query_id"),
            (event(query_id, "nothing"), "object_id"),
        ):
            answer = await send(client, given, headers=bearer(ALICE))
            assert answer["accepted"] == 0, given
            assert answer["ignored"][0]["field"] == f"events.0.{field}"
        assert (await send(client, event(query_id, items[0]), headers=bearer(BOB)))["accepted"] == 0
        assert stored(tmp_path) == []
        again = [event(query_id, items[0])] * 3 + [event(query_id, items[0], "judge", rating=3)] * 2
        assert (await send(client, *again, headers=bearer(ALICE)))["accepted"] == 2
        assert (await send(client, *again, headers=bearer(ALICE)))["accepted"] == 0
        other_opinion = event(query_id, items[0], "judge", rating=0)
        assert (await send(client, other_opinion, headers=bearer(ALICE)))["accepted"] == 1
        opinions = [event(query_id, items[0], "judge", rating=number % 2) for number in range(500)]
        for _ in range(2):
            await send(client, *opinions, headers=bearer(ALICE))
        flood = [event(query_id, items[0], client_id=f"c{number}") for number in range(1500)]
        for start in range(0, 1500, 500):
            await send(client, *flood[start : start + 500], headers=bearer(ALICE))
        metrics = await scrape(_with_key(client))
        assert metrics["dcar_feedback_ignored_total", (("reason", "query_id"),)] > 500
    assert len(stored(tmp_path)) == 1000, "the bound of one search"


def _with_key(client: ServiceClient) -> ServiceClient:
    client.headers.update(bearer(ALICE))
    return client


async def test_a_sample_of_the_log_has_its_share_of_searches(index: Path, tmp_path: Path) -> None:
    async with opened(index, feedback=tmp_path) as client:
        ids = {(await searched(client))[0] for _ in range(80)}
    assert len(ids) == 80
    assert 15 < store.read_log(tmp_path, every=2)[0].num_rows < 65


async def test_searches_of_another_process_are_recognized(index: Path, tmp_path: Path) -> None:
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        query_id, items = await searched(client, headers=bearer(ALICE))
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        assert (await send(client, event(query_id, items[0]), headers=bearer(BOB)))["accepted"] == 0
        assert (await send(client, event(query_id, items[0]), headers=bearer(ALICE)))["accepted"] == 1
        later = time.time() + 24 * 3600 + 5
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.feedback.log.time.time", lambda: later)
            assert (await send(client, event(query_id, items[1]), headers=bearer(ALICE)))["accepted"] == 0
    assert stored(tmp_path) == [("c1", "click", items[0])]


async def test_a_failing_disk_costs_events_and_no_search(
    index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "log"
    async with opened(index, feedback=folder) as client:
        query_id, items = await searched(client)
        shutil.rmtree(folder / "journal")
        refused = await client.post("/feedback", json={"events": [event(query_id, items[0])]})
        assert_problem(refused, 503)
        assert refused.headers["retry-after"]
        query_id, items = await searched(client)
        metrics = await scrape(client)
        assert metrics["dcar_feedback_lost_total", (("kind", "events"),)] == 1
        assert metrics["dcar_feedback_lost_total", (("kind", "queries"),)] == 1
        assert sum("feedback is lost" in record.message for record in caplog.records) == 1
        (folder / "journal").mkdir()
        assert (await send(client, event(query_id, items[0])))["accepted"] == 1
    assert stored(folder) == [("c1", "click", items[0])]


def test_a_log_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DcarError, match="DCAR_FEEDBACK"):
        store.prepare(tmp_path / "file")
    secrets = {store.prepare(tmp_path / "log") for _ in range(2)}
    assert len(secrets) == 1


@pytest.mark.parametrize(
    ("given", "folder"), [("1", "index/feedback"), ("true", "index/feedback"), ("0", None), ("log/x", "log/x")]
)
def test_the_setting_is_a_switch_or_a_directory(
    monkeypatch: pytest.MonkeyPatch, given: str, folder: str | None
) -> None:
    monkeypatch.setenv("DCAR_FEEDBACK", given)
    assert load_settings(index=Path("index")).feedback_folder == (Path(folder) if folder else None)


def query_row(query_id: str, **fields: Any) -> bytes:
    row = QueryRow(query_id, 1_700_000_000_000, "index", "red", ["a", "b"], "text", 0, 1, False)
    return to_json(row._replace(**fields))


def event_row(query_id: str, client: str = "c1") -> EventRow:
    return EventRow(query_id, 1_700_000_000_000, "index", client, "click", "a", 1, None)


WRITER = """
import sys
from pathlib import Path
from app.feedback.store import EventRow, Journal
journal = Journal(Path(sys.argv[1]))
for number in range(100_000):
    try:
        journal.write([], [EventRow(str(number), 0, "i", "c" * 50, "click", "a", 1, None)] * 3)
    except OSError:
        print("full", flush=True)
        break
    print(number, flush=True)
"""


@pytest.mark.parametrize("file_size", [None, 5000])
def test_a_killed_process_and_a_full_disk_lose_no_acknowledged_row(tmp_path: Path, file_size: int | None) -> None:
    store.prepare(tmp_path)
    process = Command("-c", WRITER, tmp_path, file_size=file_size)
    if file_size is None:
        end = time.monotonic() + 30
        while len(stored(tmp_path)) < 20:  # the last batch is not acknowledged yet
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    acknowledged = [line for line in process.communicate(timeout=30)[0].split() if line != "full"]
    (path,) = (tmp_path / "journal").iterdir()
    events = store.read_log(tmp_path)[1]["query_id"].to_pylist()
    assert len(acknowledged) > 1
    assert set(acknowledged) <= set(events)
    assert len(events) % 3 == 0
    whole = path.read_bytes().rpartition(b"\n")[0] + b"\n"  # the kill itself may have torn the last batch
    path.write_bytes(whole[:-5])
    assert len(store.read_log(tmp_path)[1]) == len(events) - 3, "the torn batch is left out"
    store.roll(tmp_path, everything=True)
    assert len(store.read_log(tmp_path)[1]) == len(events) - 3


def test_journals_become_parquet_while_they_are_written(tmp_path: Path) -> None:
    store.prepare(tmp_path)
    wanted = [f"{writer}-{number}" for writer in range(2) for number in range(150)]

    def write(writer: int) -> None:
        journal = Journal(tmp_path)
        for number in range(150):
            journal.write([query_row(f"{writer}-{number}")], [event_row(f"{writer}-{number}")])
        journal.close()

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        store.roll(tmp_path, everything=True)
    store.roll(tmp_path, everything=True)
    queries, events = store.read_log(tmp_path)
    assert set(queries["query_id"].to_pylist()) == set(events["query_id"].to_pylist()) == set(wanted)
    assert not [*(tmp_path / "journal").iterdir()]
    (path, *_) = (tmp_path / "ubi_events").iterdir()
    assert pq.read_schema(path).equals(store.EVENT_SCHEMA)


def test_old_files_and_those_beyond_the_size_are_removed(tmp_path: Path) -> None:
    store.prepare(tmp_path)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    for day in ("2020-01-01", "2020-01-02", today):
        table = store.in_ubi([event_row(day)], store.EVENT_SCHEMA)
        store.write_table(tmp_path / "ubi_events" / f"{day}.0.parquet", table)
    assert store.prune(tmp_path, 30, 2**20) == 2
    assert len(stored(tmp_path)) == 1
    assert store.prune(tmp_path, 1, 10) == 1
    (tmp_path / "journal" / "2020-01-01.0.jsonl").write_text("")
    assert store.is_due(tmp_path)
    store.roll(tmp_path)
    assert not store.is_due(tmp_path)


def test_a_client_is_forgotten_with_its_searches(tmp_path: Path) -> None:
    store.prepare(tmp_path)
    journal = Journal(tmp_path)
    with store._alone(tmp_path), patch.object(store, "_WAIT_S", 0), pytest.raises(LockedError, match="another process"):
        store.roll(tmp_path)
    journal.write(
        [*(query_row(each) for each in "123"), query_row("4", client="gone"), query_row("5", client="c1")],
        [event_row("1", "gone"), event_row("2", "gone"), event_row("2", "c1"), event_row("3", "c1")],
    )
    assert store.forget(tmp_path, "gone") == (2, 2)
    queries, events = store.read_log(tmp_path)
    assert sorted(queries["query_id"].to_pylist()) == ["2", "3", "5"]
    assert events["client_id"].to_pylist() == ["c1", "c1"]
    journal.write([], [event_row("3", "later")])
    assert {client for client, _, _ in stored(tmp_path)} == {"c1", "later"}
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"gone" not in files


async def test_a_flood_of_searches_takes_bounded_memory(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.feedback.log._RECENT_BYTES", 500)
    monkeypatch.setattr("app.feedback.log._MAX_SEEN", 2)
    monkeypatch.setattr("app.feedback.log._MAX_QUERIES", 3)
    monkeypatch.setattr("app.feedback.log._PLACES", "a")  # a search in a batch
    monkeypatch.setattr("app.feedback.log._FLUSH_S", 60.0)  # a disk that does not answer
    async with opened(index, feedback=tmp_path) as client:
        searches = [await searched(client) for _ in range(4)]
        log: FeedbackLog = client.app.state.feedback
        assert 1 <= len(log._recent) + len(log._earlier) < 4
        assert (await scrape(client))["dcar_feedback_lost_total", (("kind", "queries"),)] == 1
        for query_id, items in searches:
            assert (await send(client, event(query_id, items[0])))["accepted"] == 1
        assert sum(map(len, log._seen.values())) <= 3
    assert len(stored(tmp_path)) == 4
