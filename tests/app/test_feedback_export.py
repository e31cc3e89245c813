"""From a log to training pairs and the insights page: neither position bias, noise nor
hostile clients decide.
"""

import csv
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.feedback.export import (
    IMPRESSION,
    Report,
    Table,
    estimate_propensities,
    export,
    summarize,
    weigh,
)
from app.feedback.log import EventRow, QueryRow
from dcar_core.data import Annotations
from dcar_core.data.judgements import read_judgements
from dcar_core.util.errors import DcarError
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.versions import open_current
from index_jobs.rebuild import rebuild
from tests.support.commands import dcar
from tests.support.feedback_log import write_log
from tests.support.parts import needs
from tests.support.responses import assert_problem
from tests.support.service import ADMIN, ALICE, KEYS, ODD_ID, bearer, opened

TIME = 1_700_000_000_000
HITS = [
    "circle/red.png",
    "circle/blue.png",
    "square/red.png",
    "square/blue.png",
    ODD_ID,
]


def log_of(
    folder: Path,
    searches: dict[str, tuple[str, list[tuple[Any, ...]]]],
    **fields: Any,
) -> Path:
    """Write a log of searches: query id to the text and its events (client, action,
    item, rating).
    """
    queries = list[QueryRow]()
    events = list[EventRow]()
    for query_id, (text, acts) in searches.items():
        row = QueryRow(query_id, TIME, "index", text, HITS, 0, 1)
        queries.append(row._replace(**fields))
        for number, (client, action, item, *rating) in enumerate(acts):
            events.append(
                EventRow(
                    query_id,
                    TIME + number,
                    client,
                    action,
                    item,
                    *(rating or [None]),
                )
            )
    return write_log(folder, queries, events)


def exported(
    folder: Path,
    index_version: IndexVersion,
    out: Path,
    **options: Any,
) -> tuple[list[dict[str, Any]], Report]:
    report = export(folder, index_version, "index", out, **options)
    return [
        json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()
    ], report


def clicks(clients: str, *texts: str, item: str = HITS[0]) -> dict[str, Any]:
    """Searches whose first client clicks the item: each client's for each text."""
    return {
        f"{client}{text[-4:]}": (text, [(client, "click", item)])
        for text in texts
        for client in clients
    }


def test_pairs_need_clients_and_skipped_images_become_negatives(
    index_version: IndexVersion, tmp_path: Path
) -> None:
    # Two clients click the third image, past two others; what is below it says nothing.
    # A third clicks alone.
    searches = clicks("a", "Crimson square", item=HITS[2]) | clicks(
        "b",
        "crimson square",
        item=HITS[2],
    )
    folder = log_of(
        tmp_path / "log",
        searches | {number: ("azure", [("c", "click", HITS[1])]) for number in "123"},
    )
    rows, report = exported(folder, index_version, tmp_path / "out")
    found = {
        (Path(row["image"]).name, row["caption"]): row.get("negatives", [])
        for row in rows
    }
    assert found.pop(("red.png", "crimson square")) == []
    captions = {
        index_version.item(index_version.row_of(each) or 0).caption for each in HITS[:2]
    }
    assert {caption for _, caption in found} == captions, "their own captions"
    assert set(map(tuple, found.values())) == {("crimson square",)}
    assert (
        report.left_out["clicked pairs with fewer than 2 clients"],
        report.negatives,
    ) == (1, 2)
    with (tmp_path / "out" / "judgements.csv").open() as file:
        judged = {
            (row["query"], row["item_id"]): int(row["grade"])
            for row in csv.DictReader(file)
        }
    assert judged == {
        ("crimson square", item): grade
        for item, grade in zip(HITS, (0, 0, 3), strict=False)
    }
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["left_out"]
        == report.left_out
    )
    with pytest.raises(DcarError, match=r"already holds pairs\.jsonl"):
        export(folder, index_version, "index", tmp_path / "out")


MANY = clicks("ab", *(f"text {number}" for number in range(8)))
ODD = clicks("a", "red") | {
    "2": (
        "red",
        [(client, "click", HITS[3]) for client in "bxy"] + [("b", "click", "unseen")],
    )
}
# searches, fields; pairs, and what is left out
CASES: list[tuple[dict[str, Any], dict[str, Any], int, str, int]] = [
    (clicks("abc", "red"), {"text": ""}, 0, "searches whose text is not stored", 3),
    (
        clicks("abc", "red", item="sold"),
        {"hits": ["sold"]},
        0,
        "pairs of items that are no longer in the index",
        1,
    ),
    (ODD, {}, 0, "events of other searches or clients, or for items not shown", 4),
    (MANY, {}, 3, "clicks of a client on an item beyond its first 3 texts", 10),
]


def test_what_cannot_become_a_pair_is_counted(
    index_version: IndexVersion, tmp_path: Path
) -> None:
    for number, (searches, fields, pairs, reason, count) in enumerate(CASES):
        folder = write_log(
            tmp_path / f"log{number}",
            [],
            [EventRow("unknown", TIME, "a", "click", HITS[4], None)],
        )
        rows, report = exported(
            log_of(folder, searches, **fields),
            index_version,
            tmp_path / f"{number}",
        )
        counts = [
            left for name, left in report.left_out.items() if name.startswith(reason)
        ]
        assert (len(rows), counts) == (pairs, [count]), reason


def test_searches_of_a_client_and_pairs_of_an_item_are_capped(
    index_version: IndexVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = log_of(tmp_path / "log", MANY)
    for cap, reason, count in (
        ("ITEM_CAP", "pairs of an item beyond its best 2", 1),
        ("CLIENT_CAP", "searches of a client beyond its first 2", 12),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"app.feedback.export.{cap}", 2)
            rows, report = exported(folder, index_version, tmp_path / cap)
        assert (len(rows), report.left_out[reason]) == (2, count)


def test_items_of_an_object_store_become_pairs_with_their_ids(
    index_version: IndexVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        IndexVersion, "image_location", lambda *_: ("s3://bucket/red.png", -1)
    )
    rows, _ = exported(
        log_of(tmp_path / "log", clicks("ab", "red")),
        index_version,
        tmp_path / "out",
    )
    assert [(row["id"], row["caption"], "image" in row) for row in rows] == [
        (HITS[0], "red", False)
    ]


def test_judgements_by_hand_come_first(
    index_version: IndexVersion, tmp_path: Path
) -> None:
    searches = {
        "1": (
            "red",
            [
                ("a", "click", HITS[0]),
                ("a", "judge", HITS[0], 3),
                ("a", "judge", HITS[0], 0),
            ],
        ),
        "2": (
            "red",
            [
                ("b", "click", HITS[0]),
                ("b", "judge", HITS[0], 1),
                ("b", "judge", HITS[4], 2),
            ],
        ),
    }
    folder = log_of(tmp_path / "log", searches)
    _, report = exported(folder, index_version, tmp_path / "out")
    rows = (tmp_path / "out" / "judgements.csv").read_text().splitlines()
    assert rows[1:] == ["q1,red,circle/red.png,0,judge,2"]
    assert report.left_out["pairs judged by fewer than 2 clients"] == 1
    exported(folder, index_version, tmp_path / "trusted", judges=["b"])
    judged = read_judgements([tmp_path / "trusted" / "judgements.csv"])
    assert judged.grades == {"q1": {"circle/red.png": 1, ODD_ID: 2}}


def simulate(
    folder: Path,
    items: list[str],
    *,
    sessions: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Write a log of position-biased clicks, with 10 % noise and 1 % hostile sessions.

    Return the truth: what is examined, (K,), and attractive, (texts, items). Four
    versions of a ranker answer. Each text has three right items; a client who looks at
    a wrong one clicks it with a chance of 0.1. Five hostile clients click the last item
    wherever it is.
    """
    rng = np.random.default_rng(seed)
    texts = 30
    depth = 10
    versions = 4
    attractive = np.full((texts, len(items)), 0.1)
    for row in attractive:
        row[rng.choice(len(items) - 1, 3, replace=False)] = rng.uniform(0.4, 0.9, 3)
    examined = 1 / np.arange(1, depth + 1)
    noisy = attractive + rng.normal(0, 0.3, (versions, texts, len(items)))
    rankings = np.argsort(-noisy, axis=2)[:, :, :depth]
    text = rng.integers(texts, size=sessions)
    version = rng.integers(versions, size=sessions)
    shown = rankings[version, text]
    clicked = rng.random(shown.shape) < examined * attractive[text[:, None], shown]
    is_hostile = rng.random(sessions) < 0.01
    clicked = np.where(is_hostile[:, None], shown == len(items) - 1, clicked)
    client = np.where(
        is_hostile,
        rng.integers(5, size=sessions),
        5 + rng.integers(sessions // 3, size=sessions),
    )
    hits = np.array(items)[shown].tolist()
    queries = (
        QueryRow(
            f"s{number}",
            TIME,
            "index",
            f"text {text[number]}",
            hits[number],
            0,
            1,
        )
        for number in range(sessions)
    )
    events = (
        EventRow(
            f"s{number}",
            TIME,
            f"c{client[number]}",
            "click",
            hits[number][place],
            None,
        )
        for number, place in np.argwhere(clicked).tolist()
    )
    write_log(folder, queries, events)
    return examined, attractive


@needs("time")
def test_propensities_of_simulated_clicks_are_within_a_tenth(
    index_version: IndexVersion, tmp_path: Path
) -> None:
    items = index_version.column("id").to_pylist()
    examined, attractive = simulate(tmp_path / "log", items, sessions=60_000)
    rows, report = exported(
        tmp_path / "log",
        index_version,
        tmp_path / "out",
        min_clients=3,
    )
    assert np.abs(np.array(report.propensities) / examined - 1).max() < 0.1, (
        report.propensities
    )
    names = {
        index_version.image_location(index_version.row_of(item) or 0)[0]: number
        for number, item in enumerate(items)
    }
    right = set(zip(*map(np.ndarray.tolist, np.nonzero(attractive > 0.1)), strict=True))
    pairs = set[tuple[int, int]]()
    negatives = set[tuple[int, int]]()
    for row in rows:
        image = names[row["image"]]
        if row["caption"].startswith("text "):
            pairs.add((int(row["caption"].split()[1]), image))
        negatives |= {
            (int(text.split()[1]), image) for text in row.get("negatives", ())
        }
    assert len(pairs) > 30
    assert pairs <= right, "neither noise nor the hostile clients made a pair"
    assert not negatives & right
    assert not [image for _, image in pairs if image == len(items) - 1]


def test_impressions_say_what_was_seen(
    index_version: IndexVersion, tmp_path: Path
) -> None:
    """An item above a click that no impression names was not skipped."""
    seen = [("impression", HITS[1]), ("impression", HITS[2]), ("click", HITS[2])]
    searches = {
        client: ("crimson", [(client, *each) for each in seen]) for client in "ab"
    }
    rows, report = exported(
        log_of(tmp_path / "log", searches),
        index_version,
        tmp_path / "out",
    )
    assert {Path(row["image"]).name: row.get("negatives") for row in rows} == {
        "red.png": None,
        "blue.png": ["crimson"],
    }
    assert len(rows) == 2
    assert set(report.propensities) == {1.0}
    assert "no position bias was corrected" in str(report)


def test_the_commands_make_what_training_reads(
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    root = tmp_path / "shards"
    index = tmp_path / "index"
    root.mkdir()
    with tarfile.open(root / "gallery.tar", "w") as tar:
        for path in sorted(gallery.glob("*/*.png")):
            tar.add(path, f"{path.parent.name}-{path.name}")
    rebuild(root / "gallery.tar", tiny_checkpoint, index, workers=0, progress=False)
    index_version = open_current(index)
    items = index_version.column("id").to_pylist()
    searches = dict[str, Any]()
    for number, item in enumerate(items):
        searches |= clicks("ab", f"text {number}", item=item)
    folder = log_of(index / "feedback", searches, hits=items)
    done = dcar("feedback", "export", "--index", index, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    splits, _ = Annotations(tmp_path / "out", root).load_all()
    captions = {sample.caption for data in splits.values() for sample in data.samples}
    assert {f"text {number}" for number in range(len(items))} <= captions
    assert all(
        data.read(sample.image) for data in splits.values() for sample in data.samples
    )
    assert f"--data {tmp_path / 'out'} --images {root}" in done.stdout
    forgotten = dcar("feedback", "forget", "a", "--log", folder)
    assert (
        forgotten.stdout
        == f"{folder}: {len(items)} events and {len(items)} searches removed\n"
    )
    few = dcar("feedback", "export", "--index", index, "--out", tmp_path / "few")
    assert ("pairs: 0," in few.stdout, "dcar train" in few.stdout) == (
        True,
        False,
    ), "nothing to train on"
    wrong = dcar("feedback", "forget", "a", "--log", tmp_path)
    assert "holds no feedback log" in wrong.stderr


def seen(*columns: Any) -> Table:
    rows = np.broadcast_arrays(*columns, 1)
    made: Table = np.rec.fromarrays(rows, dtype=IMPRESSION)
    return made


def test_propensities_hold_for_few_impressions_and_after_a_version_with_clicks() -> (
    None
):
    rng = np.random.default_rng(0)
    pairs = 20_000
    depth = 4
    attractive = rng.choice([0.1, 0.8], pairs)
    examined = 1 / np.arange(1, depth + 1)
    parts = list[Table]()
    position = rng.integers(depth, size=pairs)
    for version in (1, 2):
        for _ in range(6):
            # as filters move them
            place = np.clip(position + rng.integers(-1, 2, pairs), 0, depth - 1)
            clicked = rng.random(pairs) < examined[place] * attractive
            number = np.arange(pairs)
            parts.append(seen(number, number, 0, number, place + 1, clicked, version))
        clicks = np.sum([part.clicked for part in parts], 0)
        position = np.clip(position - clicks, 0, depth - 1)
    found, _ = estimate_propensities(np.concatenate(parts).view(np.recarray))
    assert np.abs(found / examined - 1).max() < 0.1, found


@pytest.mark.parametrize("clients", [5, 80])
def test_two_clicks_far_down_do_not_outweigh_many_at_the_top(clients: int) -> None:
    """Of item 0, clients click it at the top, and one in five does not; of item 1, two
    click it at the tenth place.
    """
    total = clients + 2
    number = np.arange(total)
    item = np.repeat([0, 1], [clients, 2])
    found = seen(
        number,
        0,
        item,
        number,
        np.where(item, 10, 1),
        (number % 5 > 0) | (item > 0),
        1,
    )
    evidence = weigh(found, 1 / np.arange(1, 11), min_clients=2)
    assert evidence.clicks.tolist() == [0.8 * clients, 2]
    assert evidence.estimate.tolist() == pytest.approx(
        [0.8 * clients / (5 + clients), 2 / (5 + 0.2)]
    )
    relevance = evidence.relevance
    estimate = evidence.estimate
    assert relevance[0] > 2 * relevance[1]
    assert relevance[0] > (0.3 if clients == 5 else 0.8) * estimate[0], (
        "more clients make it certain"
    )


NOW = int(time.time())
DAYS = [time.strftime("%Y-%m-%d", time.gmtime(NOW - back * 86_400)) for back in (2, 1)]


def search(number: int, text: str, back: int = 2, **fields: Any) -> QueryRow:
    """A search of some days ago, whose id has a random part."""
    seconds = NOW - back * 86_400
    part = np.random.default_rng(number).integers(2**32)
    row = QueryRow(
        f"{seconds:08x}{part:08x}",
        seconds * 1000 + number,
        "index",
        text,
        list("abc"),
        0,
        1,
    )
    return row._replace(**fields)


def click(query: QueryRow, item: str) -> EventRow:
    return EventRow(query.query_id, query.time, "c", "click", item, None)


def test_searches_are_counted_by_day_position_version_and_text(tmp_path: Path) -> None:
    first = [
        search(1, "red"),
        search(2, "Red", version=2),
        search(3, "blue", nothing_fits=True),
        search(4, "none", hits=[]),
        search(5, "red", offset=3),
        search(6, "x", collection="other"),
        search(9, "", hits=[]),
    ]
    last = search(7, "blue", back=1, hits=["c", "a"])
    events = [
        click(first[0], "b"),
        click(first[1], "z"),
        click(first[4], "a"),
        click(first[2], "a"),
    ]
    write_log(tmp_path, first, events)
    next(tmp_path.glob("*.sqlite")).rename(tmp_path / "elsewhere.sqlite")
    write_log(tmp_path, [last, search(8, "old", back=31)])
    found = summarize(tmp_path, "index")
    assert found["days"] == [
        {"day": DAYS[0], "searches": 5, "clicked": 2, "nothing": 3},
        {"day": DAYS[1], "searches": 1, "clicked": 0, "nothing": 0},
    ], "one click is of an item that was not shown"
    shown = {
        position["position"]: (position["shown"], position["clicked"])
        for position in found["positions"]
    }
    assert shown == {1: (4, 1), 2: (4, 1), 3: (3, 0), 4: (1, 1), 5: (1, 0), 6: (1, 0)}
    assert found["versions"][2] == {"searches": 1, "clicked": 0, "nothing": 0}
    assert found["worst"] == [
        {"query": "none", "searches": 1, "clicked": 0, "nothing": 1, "items": []}
    ], "red and blue are clicked more often than the average"
    unmet = {each["query"]: each for each in found["unmet"]}
    assert {*unmet} == {"blue", "none"}
    assert unmet["blue"] == {
        "query": "blue",
        "searches": 2,
        "clicked": 1,
        "nothing": 1,
        "items": ["c", "a"],
    }


async def test_the_admin_key_opens_the_figures_and_no_other(
    index: Path, tmp_path: Path
) -> None:
    url = "/ui/insights/data"
    async with opened(
        index,
        feedback=tmp_path,
        feedback_texts=True,
        collections={"other": index},
        **KEYS,
    ) as client:
        assert (await client.get("/ui/insights")).headers[
            "content-type"
        ] == "text/html; charset=utf-8"
        for headers in ({}, bearer(ALICE)):
            assert_problem(await client.get(url, headers=headers), 401, "Authorization")
        for query in ("red", "red", "blue"):
            await client.post(
                "/search/text",
                json={"query": query},
                headers=bearer(ALICE),
            )
        await client.app.state.feedback.flush()
        found = (await client.get(url, headers=bearer(ADMIN))).json()
        assert [(each["query"], each["searches"]) for each in found["worst"]] == [
            ("red", 2),
            ("blue", 1),
        ]
        assert found["days"][0]["searches"] == 3
        assert found["collections"] == [index.name, "other"]
        (version,) = found["versions"]
        assert (version["version"], version["searches"], version["count"]) == (1, 3, 24)
        other = await client.get(f"/collections/other{url}", headers=bearer(ADMIN))
        assert (other.json()["days"], other.json()["worst"]) == ([], [])
        assert_problem(
            await client.get(f"/collections/no{url}", headers=bearer(ADMIN)), 404
        )
    (tmp_path / "torn.sqlite").write_bytes(b"torn" * 100)
    async with opened(index, feedback=tmp_path, **KEYS) as client:
        damaged = await client.get(url, headers=bearer(ADMIN))
        assert_problem(damaged, 503)
        assert "torn.sqlite cannot be used; remove it" in damaged.json()["detail"]
