"""Random requests over Qdrant have the responses of FAISS: filters, pages, groups,
facets, sorting and words.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qdrant_server import QdrantServer

from app.search import Index
from app.search.errors import SearchError
from dcar_qdrant import index as qdrant_index
from dcar_qdrant.conditions import to_conditions
from index_jobs.index.changes import change_metadata
from index_jobs.index.versions import open_current
from index_jobs.jobs.update import add, remove
from index_jobs.rebuild import rebuild
from index_jobs.row_filter import RowFilter
from tests.support.versions import Build

COUNT = 70
ADDED = 15
REQUESTS = 200
BRANDS = ["Löwe", "lynx", "Ibis & Co", "12", ""]
TAGS = ["red", "soft", "new", "XL"]


def write_gallery(folder: Path, numbers: range) -> Path:
    """Draw images of noise, with fields of each type, some of them missing, and one
    with an awkward name.
    """
    rng = random.Random(numbers.start)
    noise = np.random.default_rng(numbers.start)
    lines = []
    folder.mkdir()
    for number in numbers:
        Image.fromarray(noise.integers(0, 255, (24, 24, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
        record = {
            "id": f"n{number}",
            "caption": rng.choice(["a lynx", "soft red lion", "the ibis", ""]),
            "category": rng.choice(["cat", "bird", ""]),
            "price": rng.choice([None, 5, 7.5, 10.25, 0.0, 99]),
            "stock": rng.choice([None, 0, 1, 2, 2**60, -(2**63)]),
            "sale": rng.choice([None, True, False]),
            "brand": rng.choice([None, *BRANDS]),
            "tags": rng.sample(TAGS, rng.randint(0, 3)),
            'a.b["c"]': rng.choice([None, "x", "y"]),
            "gift": True if number == 4 else None,
        }
        if rng.random() < 0.2:
            del record["tags"]
        lines.append(
            {"file_name": f"{number}.png"}
            | {name: value for name, value in record.items() if value is not None}
        )
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return folder


@pytest.fixture(scope="module", params=["memory", "server"])
def opened(
    tiny_checkpoint: Path,
    url: str,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> tuple[Index, Index]:
    """The same index with FAISS and with Qdrant: built, with items added, changed and
    removed.

    The only `gift` is true, then removed, and then texts.
    """
    root = tmp_path_factory.mktemp("both")
    gallery = write_gallery(root / "gallery", range(COUNT))
    more = write_gallery(root / "more", range(COUNT, COUNT + ADDED))
    changes: list[tuple[str, dict[str, Any]]] = [
        ("n3", {"price": 7.5, "brand": "lynx"}),
        ("n4", {"stock": None, "tags": ["new"], "gift": None}),
        ("n71", {"sale": True}),
        ("n9", {"caption": "", "category": "bird", "gift": "true"}),
        ("n10", {"fresh": "yes"}),
        ("n6", {"brand": "Ibis & Co"}),
    ]
    found = []
    for name, engine in (
        ("faiss", "faiss"),
        ("qdrant", f"qdrant={url if request.param == 'server' else ':memory:'}"),
    ):
        out = root / name
        rebuild(gallery, tiny_checkpoint, out, engine=engine, workers=0, progress=False)
        change_metadata(out, changes[:2], "a test")
        add(out, more, progress=False, workers=0)
        change_metadata(out, changes[2:], "a test")
        remove(out, ["n5", "n6", "n72"])
        found.append(Index.open(out, device="cpu"))
    shutil.rmtree(gallery)
    return found[0], found[1]


def draw_condition(rng: random.Random, field: str) -> Any:
    values: dict[str, list[Any]] = {
        "price": [5, 7.5, 10.25, -0.0, 99, 3],
        "stock": [0, 1, 2.0, 2.5, 2**60, 2**60 + 1, -(2**63)],
        "sale": [True, False],
        "brand": BRANDS,
        "tags": TAGS,
        'a.b["c"]': ["x", "y"],
        "category": ["cat", "bird", ""],
        "caption": ["a lynx", ""],
        "id": [f"n{number}" for number in range(0, COUNT, 5)],
        "fresh": ["yes"],
        "gift": ["true", "wrapped"],
    }
    some = [*values[field], None]
    is_number = field in ("price", "stock")
    if is_number:
        kinds = ["range"] * 3
    else:
        kinds = ["contains", "range"] if field in TEXTS else []
    match rng.choice(["value", "list", "in", "not", *kinds]):
        case "value":
            return rng.choice(some)
        case "list":
            return rng.sample(some, 2)
        case "in":
            return {"in": rng.sample(some, rng.randint(0, 2))}
        case "not":
            return {"not": draw_condition(rng, field)}
        case "contains":
            return {"contains": rng.choice(["I", "lö", "x", "", "n1", "zz"])}
    bounds = rng.sample(["gt", "gte", "lt", "lte"], rng.randint(1, 2))
    return {name: rng.choice(values[field]) for name in bounds}


TEXTS = ["brand", "tags", 'a.b["c"]', "category", "caption", "id", "gift"]
FIELDS = [
    "price",
    "stock",
    "sale",
    "brand",
    "tags",
    'a.b["c"]',
    "category",
    "caption",
    "id",
    "fresh",
    "gift",
]


def draw_filter(rng: random.Random) -> dict[str, Any]:
    filter = {
        field: draw_condition(rng, field)
        for field in rng.sample(FIELDS, rng.randint(1, 2))
    }
    return filter | (
        {"$or": [draw_filter(rng), draw_filter(rng)]} if rng.random() < 0.2 else {}
    )


def draw_request(rng: random.Random) -> dict[str, Any]:
    request: dict[str, Any] = {
        "query": rng.choice(["a lynx", "soft red", "ibis", "lön", "unknown"]),
        "k": rng.randint(1, 12),
    }
    options: list[tuple[float, dict[str, Any]]] = [
        (0.7, {"filter": draw_filter(rng)}),
        (0.3, {"offset": rng.randint(0, 20)}),
        (
            0.3,
            {
                "group_by": rng.choice(
                    ["brand", "category", "price", "stock", "sale", "gift", 'a.b["c"]']
                )
            },
        ),
        (0.2, {"facets": rng.sample(["brand", "tags", "price", "sale", "gift"], 2)}),
        (0.3, {"hybrid": True}),
        (0.2, {"without": "red"}),
        (0.2, {"more_like": ["n8", "n73"]}),
        (0.2, {"min_score": rng.choice([-0.2, 0.0, 0.1])}),
    ]
    for share, option in options:
        request |= option if rng.random() < share else {}
    if "group_by" not in request and rng.random() < 0.1:
        request["fold"] = 0.9
    if "min_score" in request and rng.random() < 0.4:
        request["sort"] = rng.choice(["price", "-brand", "stock"])
    return request


def response(index: Index, request: dict[str, Any]) -> Any:
    try:
        found = index.search(**request)
    except SearchError as error:
        return str(error)
    matches = [
        (item["id"], item.get("group"), item.get("folded"), item["level"])
        for item in found["results"]
    ]
    scores = [
        (result["score"], result.get("text_score", 0)) for result in found["results"]
    ]
    rest = {
        name: value
        for name, value in found.items()
        if name not in ("results", "took_ms")
    }
    return matches, rest, np.array(scores)


@pytest.mark.slow
def test_random_requests_have_equal_responses(opened: tuple[Index, Index]) -> None:
    rng = random.Random(7)
    filled = 0
    for _ in range(REQUESTS):
        drawn = draw_request(rng)
        here, there = (response(index, drawn) for index in opened)
        if isinstance(here, str) or isinstance(there, str):
            assert there == here, drawn
            continue
        assert there[:2] == here[:2], drawn
        np.testing.assert_allclose(there[2], here[2], atol=2e-4, err_msg=str(drawn))
        filled += bool(here[0])
    assert filled > REQUESTS // 2


def test_filters_are_conditions_that_name_only_rows_that_were_removed_or_changed(
    build: Build,
    server: QdrantServer,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    gallery = write_gallery(tmp_path / "many", range(20))
    build(gallery, engine=f"qdrant={server.url}")
    change_metadata(
        index,
        [("n3", {"price": 7.5, "brand": "lynx"}), ("n4", {"price": 1})],
        "a test",
    )
    remove(index, ["n5"])
    opened = Index.open(index, device="cpu")
    given = {"price": {"gt": 6}, "brand": ["lynx", "12"]}
    server.calls.clear()
    assert opened.search("a lynx", filter=given)["results"]
    sent = server.searches()[0][0]["filter"]["should"]
    ids = opened.served.index.column("id").to_pylist()
    assert {ids[row] for row in sent[0]["must_not"][0]["has_id"]} == {"n3", "n4", "n5"}
    conditions = json.dumps(sent[0]["must"], separators=(",", ":"))
    assert '"key":"price","range":{"gt":6.0}' in conditions
    assert '"key":"brand","match":{"any":["lynx","12"]}' in conditions
    assert [ids[row] for row in sent[1]["has_id"]] == ["n3"], "its changed price fits"


@pytest.mark.parametrize(
    "condition",
    ["cheap", {"not": "cheap"}, {"gt": "c"}, {"gt": 10**400}, {"contains": "c"}],
)
@pytest.mark.parametrize("kind", ["int64", "double", "bool"])
def test_what_a_server_cannot_compare_is_matched_by_rows(
    condition: Any, kind: str
) -> None:
    """All values of a field were removed, and then it was given texts, for which the
    server has no index.
    """
    rows = RowFilter(lambda: np.array([True, False, False]), {"price": condition})
    sent = to_conditions(rows, {"price": ["price", kind]}, 3).model_dump(
        exclude_none=True
    )
    assert sent == {"must": [{"has_id": [0]}]}


@pytest.mark.parametrize("count", [3, 9])
def test_the_fewer_rows_are_named(count: int) -> None:
    mask = np.arange(10) < count
    sent = to_conditions(RowFilter.of_mask(mask), {}, 10).model_dump(exclude_none=True)
    assert (sent.get("must_not") or sent["must"])[0] == {
        "has_id": [9] if count == 9 else [0, 1, 2]
    }


def test_bounds_of_integers_are_integers() -> None:
    """A server compares the integers of a field with a bound whose fraction it has cut
    off.
    """
    bounds = {"gt": -2.5, "gte": -2.5, "lt": 2.5, "lte": 2.5}
    rows = RowFilter(lambda: np.ones(1, np.bool_), {"stock": bounds})
    sent = to_conditions(rows, {"stock": ["stock", "int64"]}, 1).model_dump(
        exclude_none=True
    )
    assert sent["must"][0]["must"][0]["must"][0]["range"] == {
        "gt": -3,
        "gte": -2,
        "lt": 3,
        "lte": 2,
    }


def test_many_searches_that_name_many_rows_are_sent_in_small_parts(
    build: Build,
    server: QdrantServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(engine=f"qdrant={server.url}")
    opened = open_current(tmp_path / "index")
    vectors = opened.vectors(np.arange(24))
    rows = RowFilter.of_mask(np.arange(24) % 2 == 0)
    whole = opened.search(vectors, 5, rows)
    monkeypatch.setattr(qdrant_index, "FILTER_BYTES", 500)
    server.calls.clear()
    found = opened.search(vectors, 5, rows)
    assert np.array_equal(found[0], whole[0])
    assert np.array_equal(found[1], whole[1])
    assert [len(searches) for searches in server.searches()] == [8, 8, 8]


@pytest.mark.slow
def test_the_benchmark_prints_a_row_of_each_engine() -> None:
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "benchmark.py"),
        "core",
        "--count",
        "600",
        "--dim",
        "16",
    ]
    rows = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-2:]
    assert [row.partition(",")[0] for row in rows] == ["| qdrant", "| faiss"]
    assert all(
        float(cell.split(" / ")[-1]) >= 0.95
        for row in rows
        for cell in row.strip("| ").split(" | ")[2:]
    )
