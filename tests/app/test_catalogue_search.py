"""Hybrid search, groups and facets over HTTP."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from app.api.schemas import SearchResponse
from index_jobs.jobs.update import add, remove
from tests.support.images import draw, png
from tests.support.service import ServiceClient, opened

COLORS, SHAPES = 6, 4


async def test_words_of_the_query_are_looked_up(started: ServiceClient) -> None:
    """The tiny model has random weights, so its vectors alone find nothing."""
    body = (await started.post("/search/text", json={"query": "a red square", "hybrid": True})).json()
    SearchResponse.model_validate(body, strict=True)
    first = body["results"][0]
    assert (first["caption"], first["text_score"] > 0.8) == ("a red square", True)
    alone = (await started.post("/search/text", json={"query": "a red square", "k": 24})).json()
    assert "text_score" not in alone["results"][0]
    scores = {result["id"]: result["score"] for result in alone["results"]}
    assert all(result["score"] == pytest.approx(scores[result["id"]], abs=1e-5) for result in body["results"])
    moved = {"query": "a red square", "without": "blue", "k": 24}
    scores = {each["id"]: each["score"] for each in (await started.post("/search/text", json=moved)).json()["results"]}
    moved_hybrid = (await started.post("/search/text", json=moved | {"hybrid": True})).json()["results"]
    assert {each["id"]: each["score"] for each in moved_hybrid} == pytest.approx(scores, abs=1e-5)
    assert next(each for each in moved_hybrid if each["id"] == first["id"])["text_score"] == first["text_score"]
    form = {"query": "red square", "hybrid": "1", "k": "3"}
    image = (await started.post("/search/image", files={"file": ("a.png", png())}, data=form)).json()
    assert image["results"][0]["caption"] == "a red square"
    batch = {"queries": [{"query": "bleu circle", "hybrid": 0.9, "k": 1}, {"query": "a red square", "k": 1}]}
    answers = (await started.post("/search/batch", json=batch)).json()["answers"]
    assert "circle" in answers[0]["results"][0]["caption"]
    assert "text_score" not in answers[1]["results"][0]


async def test_hybrid_true_is_the_weight_that_the_build_chose(index: Path) -> None:
    async with opened(index) as client:
        artifact = client.app.state.collections[None].live.artifact
        artifact.manifest = replace(artifact.manifest, hybrid_weight=0.02)
        answers = [
            (await client.post("/search/text", json={"query": "red circle", "hybrid": hybrid, "k": 24})).json()[
                "results"
            ]
            for hybrid in (True, 0.02, 0.7)
        ]
        assert answers[0] == answers[1] != answers[2]


async def test_words_of_added_items_are_found_and_of_removed_ones_not(index: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "more"
    gallery.mkdir()
    for number, caption in enumerate(["WX-300 left mirror", "WX-301 right mirror"]):
        draw("pink", "square").save(gallery / f"{number}.png")
        with (gallery / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{number}.png", "id": f"new{number}", "caption": caption}) + "\n")
    add(index, gallery, progress=False)
    remove(index, ["circle/red.png", "new1"])
    async with opened(index) as client:
        code = (await client.post("/search/text", json={"query": "wx300", "hybrid": 1, "k": 1})).json()
        assert [result["id"] for result in code["results"]] == ["new0"]
        query = {"query": "red circle mirror", "hybrid": 1, "k": 30}
        ids = [result["id"] for result in (await client.post("/search/text", json=query)).json()["results"]]
        assert len(ids) == 24
        assert not {"circle/red.png", "new1"} & {*ids}
        listed = (await client.get("/items", params={"k": 30})).json()
        assert (listed["count"], {item["id"] for item in listed["items"]}) == (24, {*ids})
        counted = (await client.post("/search/text", json={"query": "x", "facets": ["category"]})).json()["facets"]
        assert {entry["value"]: entry["count"] for entry in counted["category"]} == {
            "circle": 5, "cross": 6, "square": 6, "triangle": 6
        }  # fmt: skip


async def test_each_group_is_returned_once(started: ServiceClient) -> None:
    everything = (await started.post("/search/text", json={"query": "x", "k": 24, "fields": ["color"]})).json()
    best: dict[str, str] = {}
    for result in everything["results"]:
        best.setdefault(result["metadata"]["color"], result["id"])
    body = (await started.post("/search/text", json={"query": "x", "group_by": "color", "k": 4})).json()
    SearchResponse.model_validate(body, strict=True)
    rest = {"query": "x", "group_by": "color", "k": 4, "offset": body["next_offset"]}
    pages = body["results"] + (await started.post("/search/text", json=rest)).json()["results"]
    assert {result["group"]["value"]: result["id"] for result in pages} == best
    assert [result["rank"] for result in pages] == list(range(1, COLORS + 1))
    assert {result["group"]["count"] for result in pages} == {SHAPES}
    some = {"query": "x", "group_by": "color", "filter": {"category": ["circle", "cross"]}}
    groups = [result["group"] for result in (await started.post("/search/text", json=some)).json()["results"]]
    assert {group["count"] for group in groups} == {2}


async def test_an_index_with_a_group_field_returns_products(products: Path) -> None:
    async with opened(products) as client:
        results = (await client.post("/search/text", json={"query": "x"})).json()["results"]
        assert len(results) == COLORS
        results = (await client.get("/items/circle%2Fred.png/similar")).json()["results"]
        assert len(results) == COLORS - 1, "the product itself is left out with all of its images"
        assert "red" not in {result["group"]["value"] for result in results}
        listed = (await client.get("/items", params={"k": 3})).json()
        assert (listed["count"], listed["next_offset"], len(listed["items"])) == (COLORS, 3, 3)
        first_of = dict[str, str]()
        for each in (await client.get("/items", params={"group_by": "", "k": 24})).json()["items"]:
            first_of.setdefault(each["metadata"]["color"], each["id"])
        rest = (await client.get("/items", params={"k": 24, "offset": 3})).json()["items"]
        assert [each["id"] for each in listed["items"] + rest] == list(first_of.values())
        some = {"filter": '{"category": "circle"}', "group_by": "category"}
        assert (await client.get("/items", params=some)).json()["count"] == 1
        wrong = await client.get("/items", params={"group_by": "brand"})
        assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "group_by")
        query = {"query": "x", "group_by": "", "k": 24}
        assert len((await client.post("/search/text", json=query)).json()["results"]) == 24
        query = {"query": "x", "fold": 1.0, "k": 24}
        assert len((await client.post("/search/text", json=query)).json()["results"]) == 24


async def test_facets_count_what_the_filter_allows(started: ServiceClient) -> None:
    query = {"query": "x", "k": 1, "facets": ["category", "color"], "filter": {"color": ["red", "blue"]}}
    body = (await started.post("/search/text", json=query)).json()
    SearchResponse.model_validate(body, strict=True)
    assert {entry["value"]: entry["count"] for entry in body["facets"]["color"]} == {"red": SHAPES, "blue": SHAPES}
    assert {entry["count"] for entry in body["facets"]["category"]} == {2}
    grouped = (await started.post("/search/text", json=query | {"group_by": "color"})).json()["facets"]
    assert {entry["value"]: entry["count"] for entry in grouped["color"]} == {"red": 1, "blue": 1}
    everything = (await started.post("/search/text", json={"query": "x", "k": 24, "fields": ["color"]})).json()
    cutoff = everything["results"][9]["score"]
    reached = [result for result in everything["results"] if result["score"] >= cutoff]
    body = (await started.post("/search/text", json={"query": "x", "facets": ["color"], "min_score": cutoff})).json()
    expected = Counter(result["metadata"]["color"] for result in reached)
    assert {entry["value"]: entry["count"] for entry in body["facets"]["color"]} == dict(expected)
    assert "facets_approximate" not in body
    form = {"facets": '["color"]', "k": "1", "group_by": "null"}  # as the page of the documentation sends it
    image = (await started.post("/search/image", files={"file": ("a.png", png())}, data=form)).json()
    assert len(image["facets"]["color"]) == COLORS
    form = {"group_by": "color", "k": "24"}
    image = (await started.post("/search/image", files={"file": ("a.png", png())}, data=form)).json()
    assert len(image["results"]) == COLORS


async def test_counts_of_the_best_rows_alone_are_approximate(
    started: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.search.facets._MAX_SCORED", 5)
    query = {"query": "x", "facets": ["color"], "min_score": -1}
    body = (await started.post("/search/text", json=query)).json()
    assert body["facets_approximate"]
    assert sum(entry["count"] for entry in body["facets"]["color"]) == 5
