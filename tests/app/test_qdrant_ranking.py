"""Random requests over Qdrant have the responses of FAISS: filters, pages, groups, facets, sorting and words."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.search import Index
from app.search.errors import SearchError
from app.search.rows import filter_rows
from app.search.sorting import sort_rows
from dcar_core.util.arrays import Rows
from index_jobs.jobs.update import add, remove
from index_jobs.rebuild import rebuild
from index_jobs.selection import Selection
from index_jobs.store.artifact import Artifact
from index_jobs.store.changes import change_metadata
from index_jobs.store.filters import select_rows
from tests.support.parts import needs
from tests.support.qdrant_server import qdrant_url, running_server

pytestmark = needs("qdrant")

COUNT, ADDED, REQUESTS = 70, 15, {"local": 500, "core": 150}
BRANDS = ["Löwe", "lynx", "Ibis & Co", "12", ""]
TAGS = ["red", "soft", "new", "XL"]


def write_gallery(folder: Path, numbers: range) -> Path:
    """Draw images of noise, with fields of each type, some of them missing, and one with an awkward name."""
    rng, noise, lines = random.Random(numbers.start), np.random.default_rng(numbers.start), []
    folder.mkdir()
    for number in numbers:
        Image.fromarray(noise.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
        record = {
            "id": f"n{number}", "caption": rng.choice(["a lynx", "soft red lion", "the ibis", ""]),
            "category": rng.choice(["cat", "bird", ""]), "price": rng.choice([None, 5, 7.5, 10.25, 0.0, 99]),
            "stock": rng.choice([None, 0, 1, 2, 2**60, -(2**63)]), "sale": rng.choice([None, True, False]),
            "brand": rng.choice([None, *BRANDS]), "tags": rng.sample(TAGS, rng.randint(0, 3)),
            'a.b["c"]': rng.choice([None, "x", "y"]), "gift": True if number == 4 else None,
        }  # fmt: skip
        if rng.random() < 0.2:
            del record["tags"]
        lines.append(
            {"file_name": f"{number}.png"} | {name: value for name, value in record.items() if value is not None}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@contextmanager
def served(place: str, folder: Path) -> Iterator[str]:
    """Yield a location: the server of QDRANT_URL or the local mode, or the core over HTTP."""
    if place == "local":
        with qdrant_url() if os.environ.get("QDRANT_URL") else nullcontext(":memory:") as url:
            yield url
        return
    with running_server(folder) as server:
        yield server.url
        server.client.close()


@pytest.fixture(scope="module", params=["local", pytest.param("core", marks=needs("qdrant-core"))])
def opened(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Index, Index]]:
    """The same index with FAISS and with Qdrant: built, with items added, changed and removed.

    The only `gift` is true, then removed, and then texts.
    """
    root = tmp_path_factory.mktemp("both")
    gallery, more = (
        write_gallery(root / "gallery", range(COUNT)),
        write_gallery(root / "more", range(COUNT, COUNT + ADDED)),
    )
    changes: list[tuple[str, dict[str, Any]]] = [
        ("n3", {"price": 7.5, "brand": "lynx"}), ("n4", {"stock": None, "tags": ["new"], "gift": None}),
        ("n71", {"sale": True}), ("n9", {"caption": "", "category": "bird", "gift": "true"}),
        ("n10", {"fresh": "yes"}), ("n6", {"brand": "Ibis & Co"}),
    ]  # fmt: skip
    with served(request.param, tmp_path_factory.mktemp("core")) as url:
        found = []
        for name, engine in (("faiss", "faiss"), ("qdrant", f"qdrant={url}")):
            out = root / name
            rebuild(gallery, tiny_checkpoint, out, engine=engine, workers=0, progress=False)
            change_metadata(out, changes[:2], "a test")
            add(out, more, progress=False, workers=0)
            change_metadata(out, changes[2:], "a test")
            remove(out, ["n5", "n6", "n72"])
            found.append(Index.open(out, device="cpu"))
        shutil.rmtree(gallery)
        yield found[0], found[1]


def draw_condition(rng: random.Random, field: str) -> Any:
    values: dict[str, list[Any]] = {
        "price": [5, 7.5, 10.25, -0.0, 99, 3], "stock": [0, 1, 2.0, 2.5, 2**60, 2**60 + 1, -(2**63)],
        "sale": [True, False], "brand": BRANDS, "tags": TAGS, 'a.b["c"]': ["x", "y"], "category": ["cat", "bird", ""],
        "caption": ["a lynx", ""], "id": [f"n{number}" for number in range(0, COUNT, 5)], "fresh": ["yes"],
        "gift": ["true", "wrapped"],
    }  # fmt: skip
    some, is_number = [*values[field], None], field in ("price", "stock")
    kinds = [
        "value",
        "list",
        "in",
        "not",
        *(["range"] * 3 if is_number else []),
        *(["contains", "range"] if field in TEXTS else []),
    ]
    match rng.choice(kinds):
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
FIELDS = ["price", "stock", "sale", "brand", "tags", 'a.b["c"]', "category", "caption", "id", "fresh", "gift"]


def draw_filter(rng: random.Random) -> dict[str, Any]:
    filter = {field: draw_condition(rng, field) for field in rng.sample(FIELDS, rng.randint(1, 2))}
    return filter | ({"$or": [draw_filter(rng), draw_filter(rng)]} if rng.random() < 0.2 else {})


def draw_request(rng: random.Random) -> dict[str, Any]:
    request: dict[str, Any] = {
        "query": rng.choice(["a lynx", "soft red", "ibis", "lön", "unknown"]),
        "k": rng.randint(1, 12),
    }
    options: list[tuple[float, dict[str, Any]]] = [
        (0.7, {"filter": draw_filter(rng)}), (0.3, {"offset": rng.randint(0, 20)}),
        (0.3, {"group_by": rng.choice(["brand", "category", "price", "stock", "sale", "gift", 'a.b["c"]'])}),
        (0.2, {"facets": rng.sample(["brand", "tags", "price", "sale", "gift"], 2)}), (0.3, {"hybrid": True}),
        (0.2, {"without": "red"}),
        (0.2, {"more_like": ["n8", "n73"]}), (0.2, {"min_score": rng.choice([-0.2, 0.0, 0.1])}),
    ]  # fmt: skip
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
    matches = [(each.item.id, each.group, each.folded, each.level) for each in found]
    scores = [(each.score, each.text_score or 0) for each in found]
    return matches, found.facets, found.count, found.next_offset, np.array(scores).round(4).tolist()


@pytest.mark.slow
def test_random_requests_have_equal_responses(
    opened: tuple[Index, Index], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index_jobs.store.filters._MAX_VALUES_BYTES", 40)  # so some are lists of rows
    rng, filled, count = random.Random(7), 0, REQUESTS[request.node.callspec.params["opened"]]
    for _ in range(count):
        drawn = draw_request(rng)
        here, there = (response(index, drawn) for index in opened)
        assert there == here, drawn
        filled += bool(here[0]) and not isinstance(here, str)
    assert filled > count // 2


def test_filters_are_conditions_and_no_lists_of_rows(
    opened: tuple[Index, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rows that were removed or changed are named, and the table of fields is not read."""
    there = opened[1]
    artifact, sent = there.snapshot.artifact, list[str]()
    for segment in artifact.segments:
        client = segment.vectors._client  # type: ignore[attr-defined]
        ask = client.query_batch_points

        def noted(name: str, requests: Any, ask: Any = ask, **given: Any) -> Any:
            sent.append(requests[0].filter.model_dump_json(exclude_none=True))
            return ask(name, requests, **given)

        monkeypatch.setattr(client, "query_batch_points", noted)
    monkeypatch.setattr("index_jobs.store.filters.match_rows", None)
    assert there.search("a lynx", filter={"price": {"gt": 6}, "brand": ["lynx", "12"]}, group_by="").matches
    built = json.loads(sent[0])
    ids = artifact.column("id").to_pylist()
    named = {ids[row] for row in built["should"][0]["must_not"][0]["has_id"]}
    assert named == {"n3", "n4", "n5", "n6", "n9", "n10"}
    assert '"key":"price","range":{"gt":6.0}' in sent[0]
    assert '"key":"brand","match":{"any":["lynx","12"]}' in sent[0]
    assert [ids[row] for row in built["should"][1]["has_id"]] == ["n3"], "its changed price fits"


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ({"contains": "I"}, ["Ibis & Co"]),
        ({"contains": "zz"}, []),
        ({"not": {"gte": "a", "lt": "m"}}, ["lynx"]),
    ],
)
def test_substrings_and_ranges_of_texts_are_lists_of_values(
    opened: tuple[Index, Index], monkeypatch: pytest.MonkeyPatch, condition: Any, values: list[str]
) -> None:
    artifact = opened[1].snapshot.artifact
    monkeypatch.setattr("index_jobs.store.filters.match_rows", None)
    sent = json.dumps(select_rows(artifact, {"$or": [{"brand": condition}]}).filters)
    assert sent == json.dumps([{"$or": [{"brand": {"not": values} if "not" in condition else values}]}])
    assert select_rows(artifact, {"caption": condition}).filters == ({"caption": condition},), "which has no index"


def test_searches_read_only_the_rows_that_they_meet(
    opened: tuple[Index, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words, groups with their sizes, and sorting: none makes a mask or reads a field of every item."""
    read, there = Artifact.column, opened[1]

    def column(self: Artifact, name: str, rows: Rows | None = None) -> Any:
        assert rows is not None, name
        return read(self, name, rows)

    requests: list[dict[str, Any]] = [
        {"query": "soft red lion", "hybrid": True, "filter": {"price": {"gte": 5}}, "group_by": "brand"},
        {"query": "lynx", "hybrid": True, "group_by": "stock", "more_like": ["n8"]},
        {"query": "lynx", "sort": "-brand", "min_score": -1, "hybrid": True, "filter": {"sale": True}, "group_by": ""},
    ]
    requests.append({"query": "ibis", "hybrid": True, "group_by": ""})
    expected = [response(opened[0], request) for request in requests]
    monkeypatch.setattr(Artifact, "column", column)
    monkeypatch.setattr(Artifact, "live", property(lambda _: pytest.fail("a mask is made")))
    monkeypatch.setattr("index_jobs.store.filters.match_rows", None)
    assert [response(there, request) for request in requests] == expected
    assert all(found[0] for found in expected)


def test_sorted_items_of_a_filter_are_those_of_faiss_and_sort_no_other_row(opened: tuple[Index, Index]) -> None:
    for sort in ("price", "-brand", "-stock"):
        for filter in ({"price": {"gte": 5}}, {"brand": {"contains": "l"}}, None):
            here, there = (
                sort_rows(index.snapshot, sort, filter_rows(index.snapshot, filter) if filter else None)
                for index in opened
            )
            assert there.tolist() == here.tolist()
            assert len(here)
            assert (opened[1].snapshot.orders.use(sort) is None) == bool(filter)


@pytest.mark.parametrize("condition", ["cheap", {"not": "cheap"}, {"gt": "c"}, {"gt": 10**400}])
@pytest.mark.parametrize("kind", ["int64", "double", "bool"])
def test_what_a_server_cannot_compare_is_matched_by_rows(condition: Any, kind: str) -> None:
    """All values of a field were removed, and then it was given texts, for which the server has no index."""
    from index_jobs.engines.qdrant.conditions import to_conditions

    selection = Selection(lambda: np.array([True, False, False]), ({"price": condition},))
    sent = to_conditions(selection, {"price": ["price", kind]}).model_dump(exclude_none=True)
    assert sent == {"must": [{"has_id": [0]}]}


def test_bounds_of_integers_are_integers() -> None:
    """A server compares the integers of a field with a bound whose fraction it has cut off."""
    from index_jobs.engines.qdrant.conditions import to_conditions

    bounds = {"gt": -2.5, "gte": -2.5, "lt": 2.5, "lte": 2.5}
    sent = to_conditions(Selection(lambda: np.ones(1, np.bool_), ({"stock": bounds},)), {"stock": ["stock", "int64"]})
    limits = sent.model_dump(exclude_none=True)["must"][0]["must"][0]["must"][0]["range"]
    assert limits == {"gt": -3, "gte": -2, "lt": 3, "lte": 2}
