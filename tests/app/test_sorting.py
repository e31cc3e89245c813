"""Sorted searches and listings, against a plain sort of all items that fit."""

import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.schemas import ItemsResponse, SearchResponse
from app.search import sorting
from app.search.plan import Plan
from app.search.query import Query
from app.search.rank import contained_share
from app.search.snapshots import Recent
from app.search.sorting import sort_matches
from index_jobs.jobs.update import add, remove
from index_jobs.row_filter import RowFilter
from index_jobs.store.lexical.fusion import text_bonus
from index_jobs.store.lexical.lexical_index import LexicalIndex, write_lexical
from tests.support.files import write_jsonl
from tests.support.images import draw, png
from tests.support.ranking import ArtifactStub, first_of_each
from tests.support.responses import assert_problem
from tests.support.service import ServiceClient, opened

ROWS = 90
WORDS = ["ghost", "spook", "fish", "cake", "red", "blue", "truck", "car", "face", "smile"]
COLUMNS = {
    "price": (1.5, st.none() | st.floats(-2, 2, width=16) | st.just(math.nan)),
    "stock": (1, st.none() | st.integers(-2, 2)),
    "brand": ("acme", st.none() | st.sampled_from(["", "acme", "Acme", "zeta", "Étoile", "2024-01-31"])),
    "sale": (True, st.none() | st.booleans()),
}


@pytest.fixture(scope="module")
def lexical(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("lexical") / "lexical"
    write_lexical(path, [" ".join(generator.choices(WORDS, k=generator.randint(1, 5))) for _ in range(ROWS)])
    return LexicalIndex(path)


def plain_sort(rows: list[int], values: list[Any], relevance: Any, descending: bool) -> list[int]:
    """Return rows in the order of their values, missing ones last, and equal ones in the order of relevance."""

    def is_missing(value: Any) -> bool:
        return value is None or value == "" or (isinstance(value, float) and math.isnan(value))

    rows = sorted(rows, key=lambda row: (-relevance[row], row))
    present = [row for row in rows if not is_missing(values[row])]
    key = {row: values[row].lower() if isinstance(values[row], str) else values[row] for row in present}
    present = sorted(present, key=key.__getitem__, reverse=descending)
    return present + [row for row in rows if is_missing(values[row])]


@pytest.mark.filterwarnings("ignore")  # hypothesis warns about itself
def test_sorted_matches_equal_a_plain_sort_of_all_rows_that_fit(lexical: LexicalIndex) -> None:
    """Vectors of small integers: cosines are exact, and many of them equal."""

    @settings(max_examples=80, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(COLUMNS)))
        some, drawn = COLUMNS[name]
        values = [some, *data.draw(st.lists(drawn, min_size=6, max_size=6))] * ROWS
        product = data.draw(st.lists(st.none() | st.sampled_from("abcdefgh"), min_size=11, max_size=11)) * ROWS
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        vectors = rng.integers(-2, 3, (ROWS, 4)).astype(np.float32)
        vector = rng.integers(-2, 3, 4).astype(np.float32)
        columns: dict[str, Any] = {"product": product[:ROWS], name: values[:ROWS]}
        artifact: Any = ArtifactStub(vectors, lexical=lexical, **columns)
        artifact.vectors = lambda rows: vectors[rows]  # not normalized
        cutoff = data.draw(st.none() | st.just({"min_score": float(rng.integers(-3, 9)), "strong_score": 6.0}))
        artifact.manifest.cutoff = cutoff or {}
        text = data.draw(st.sampled_from(["ghost", "red fish cake", "gohst", "smile nothing"]))
        mask = data.draw(st.sampled_from([None, rng.random(ROWS) < 0.5]))
        descending = data.draw(st.booleans())
        plan = Plan(
            Query(query=text, sort=f"-{name}" if descending else name, k=data.draw(st.integers(1, 40))),
            min_score=data.draw(st.none() | st.sampled_from([-2.0, 2.0])),
            words_weight=data.draw(st.sampled_from([0.0, 0.7])),
            group_by=data.draw(st.sampled_from(["", "product"])),
            excluded_rows=frozenset(data.draw(st.sampled_from([(), (3, 14)]))),
            is_judged=data.draw(st.booleans()),
        )
        snapshot: Any = SimpleNamespace(artifact=artifact, groups=Recent(8), orders=Recent(8))
        matches, facts = sort_matches(snapshot, plan, vector, None if mask is None else RowFilter.of_mask(mask))

        cosines, texts = vectors @ vector, np.zeros(ROWS, np.float32)
        relevance, lowest, contained = cosines, plan.min_score, math.inf
        if lowest is None:
            lowest = cutoff["min_score"] if cutoff and plan.is_judged else math.inf
        if plan.words_weight:
            texts = lexical.score(text, np.arange(ROWS))
            relevance = cosines + np.float32(text_bonus(artifact.sample_vectors, vector, 0.7)) * texts
            if plan.min_score is None:
                is_strong = (
                    cutoff and plan.is_judged and cosines[np.ones(ROWS, bool) if mask is None else mask].max() >= 6
                )
                contained = 0.6 if is_strong else contained_share(artifact, text)[0]
        left_out = {product[row] or row if plan.group_by else row for row in plan.excluded_rows}
        fitting = [
            row
            for row in range(ROWS)
            if (mask is None or mask[row]) and (cosines[row] >= lowest or texts[row] >= contained)
            and (product[row] or row if plan.group_by else row) not in left_out
        ]  # fmt: skip
        expected = plain_sort(fitting, values, relevance, descending)
        if plan.group_by:
            expected = first_of_each(expected, product)
        assert [match.row for match in matches] == expected[: plan.depth]
        assert (facts["count"], facts["has_exact_count"]) == (len(expected), True)

    check()


def set_cutoff(client: ServiceClient, min_score: float | None) -> None:
    snapshot = client.app.state.collections[None].live
    snapshot.pages.clear()
    artifact = snapshot.artifact
    cutoff = {} if min_score is None else {"min_score": min_score, "strong_score": -1.0}
    artifact.manifest = replace(artifact.manifest, cutoff=cutoff)


async def search(client: ServiceClient, **query: Any) -> dict[str, Any]:
    response = await client.post("/search/text", json={"k": 24, "fields": ["*"]} | query)
    assert response.status_code == 200, response.text
    SearchResponse.model_validate(response.json(), strict=True)
    return dict(response.json())


def order_of(results: list[dict[str, Any]], sort: str) -> list[str]:
    """Return the ids of ranked results in the order of a field, by a plain sort."""
    values = [{**each, **(each.get("metadata") or {})}[sort.removeprefix("-")] for each in results]
    ranks = plain_sort([*range(len(results))], values, range(len(results), 0, -1), sort.startswith("-"))
    return [results[place]["id"] for place in ranks]


@pytest.mark.parametrize("sort", ["color", "-color", "-caption", "id"])
async def test_results_that_are_not_unlikely_are_sorted(built_index: Path, sort: str) -> None:
    async with opened(built_index) as client:
        scores = [each["score"] for each in (await search(client, query="a red square"))["results"]]
        set_cutoff(client, scores[9])
        for options in ({}, {"hybrid": True}, {"filter": {"category": ["circle", "square"]}}, {"min_score": scores[4]}):
            ranked = (await search(client, query="a red square", **options))["results"]
            fitting = [each for each in ranked if each["level"] != "unlikely"]
            found = await search(client, query="a red square", sort=sort, facets=["color"], **options)
            assert [each["id"] for each in found["results"]] == order_of(fitting, sort)
            assert {each["id"]: each["level"] for each in found["results"]} == {e["id"]: e["level"] for e in fitting}
            assert (found["count"], found["nothing_fits"]) == (len(fitting), False)
            assert sum(each["count"] for each in found["facets"]["color"]) == len(fitting)
            page = await search(client, query="a red square", sort=sort, k=2, offset=2, **options)
            assert (page["results"], page["next_offset"]) == (
                [each | {"rank": rank} for rank, each in enumerate(found["results"][2:4], 3)],
                4,
            )


async def test_each_group_is_sorted_by_its_first_item(built_index: Path) -> None:
    async with opened(built_index) as client:
        everything = await search(client, query="x", min_score=-1.0)
        expected = order_of(everything["results"], "-caption")
        color = {each["id"]: each["metadata"]["color"] for each in everything["results"]}
        found = await search(client, query="x", min_score=-1.0, sort="-caption", group_by="color")
        assert [each["id"] for each in found["results"]] == list(
            {color[each]: each for each in expected[::-1]}.values()
        )[::-1]
        assert {each["group"]["count"] for each in found["results"]} == {4}
        assert found["count"] == 6
        folded = await search(client, query="x", min_score=-1.0, sort="-caption", fold=0.001)
        shown = [[each["id"], *each.get("folded", [])] for each in folded["results"]]
        assert [ids[0] for ids in shown] == [each for each in expected if each in {ids[0] for ids in shown}]
        assert sorted(each for ids in shown for each in ids) == sorted(expected)
        assert shown[0][0] == expected[0]


async def test_images_batches_and_python_sort_like_texts(built_index: Path) -> None:
    from app.search import Index

    async with opened(built_index) as client:
        form = {"sort": "-caption", "min_score": "-1", "k": "24"}
        image = (await client.post("/search/image", files={"file": png()}, data=form)).json()
        captions = [each["caption"] for each in image["results"]]
        assert (captions, image["count"]) == (sorted(captions, reverse=True), 24)
        query: dict[str, Any] = {"query": "x", "sort": "caption", "min_score": -1.0, "k": 24}
        (answer,) = (await client.post("/search/batch", json={"queries": [query]})).json()["answers"]
        one = (await client.post("/search/text", json=query)).json()
        assert answer["results"] == one["results"]
        matches = Index.open(built_index, runtime="torch").search(**query)
        assert [each.item.id for each in matches] == [each["id"] for each in one["results"]]
        assert matches.count == 24


async def test_nothing_is_sorted_where_nothing_fits(built_index: Path) -> None:
    async with opened(built_index) as client:
        set_cutoff(client, 1.0)
        found = await search(client, query="zzz", sort="caption", facets=["color"])
        assert (found["results"], found["count"], found["nothing_fits"], found["facets"]) == (
            [],
            0,
            True,
            {"color": []},
        )
        only_words = await search(client, query="red", without="square", hybrid=True, sort="caption")
        assert {each["metadata"]["color"] for each in only_words["results"]} == {"red"}


async def test_more_matches_than_are_sorted_are_told(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(built_index) as client:
        best = [each["id"] for each in (await search(client, query="red", k=5))["results"]]
        query = {"query": "red", "sort": "caption", "min_score": -1.0}
        assert "count_approximate" not in await search(client, **query)
        monkeypatch.setattr(sorting, "_FIRST_WIDTH", 2)
        monkeypatch.setattr(sorting, "MAX_SORTED", 5)
        found = await search(client, **query)
        assert (found["count"], found["count_approximate"]) == (5, True)
        assert {each["id"] for each in found["results"]} == {*best}


async def test_sorts_that_cannot_be_are_refused(built_index: Path) -> None:
    async with opened(built_index) as client:
        for options, status in (
            ({"sort": "price", "min_score": 0.1}, 422), ({"sort": "-", "min_score": 0.1}, 422),
            ({"sort": "color", "rerank": True, "min_score": 0.1}, 422), ({"sort": 3}, 422),
            ({"sort": "color", "more_like": ["circle/red.png"]}, 422), ({"sort": "color"}, 409),
        ):  # fmt: skip
            refused = await client.post("/search/text", json={"query": "red"} | options)
            assert_problem(refused, status, "sort")
            batch = await client.post("/search/batch", json={"queries": [{"query": "red"} | options]})
            assert_problem(batch, status, "queries.0.sort")
        for sort in ("price", "-"):
            assert_problem(await client.get("/items", params={"sort": sort}), 422, "sort")


async def test_listed_items_are_sorted(index: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "more"
    gallery.mkdir()
    rows = list[dict[str, Any]]()
    for number, price in enumerate([3, 1.5, None, None, 2]):
        draw("pink", "square").save(gallery / f"{number}.png")
        row = {"file_name": f"{number}.png", "id": f"new{number}", "color": "pink", "tags": ["a", "b"]}
        rows.append(row if price is None else row | {"price": price})
    write_jsonl(gallery / "metadata.jsonl", *rows)
    add(index, gallery, progress=False)
    remove(index, ["new4", "circle/red.png"])
    async with opened(index) as client:

        async def listed(**given: Any) -> dict[str, Any]:
            response = await client.get("/items", params={"k": 30, **given})
            ItemsResponse.model_validate(response.json(), strict=True)
            return dict(response.json())

        plain = [each["id"] for each in (await listed())["items"]]
        cheapest = [each["id"] for each in (await listed(sort="price"))["items"]]
        assert cheapest == ["new1", "new0", *(each for each in plain if each not in {"new0", "new1"})]
        dearest = [each["id"] for each in (await listed(sort="-price"))["items"]]
        assert dearest == ["new0", "new1", *cheapest[2:]]
        page = await listed(sort="-price", k=1, offset=1)
        assert ([each["id"] for each in page["items"]], page["count"], page["next_offset"]) == (["new1"], 27, 2)
        some = await listed(sort="price", filter='{"price": {"gt": 2}}')
        assert [each["id"] for each in some["items"]] == ["new0"]
        groups = await listed(sort="-price", group_by="color")
        assert (groups["items"][0]["id"], groups["count"]) == ("new0", 7)
        assert_problem(await client.get("/items", params={"sort": "tags"}), 422, "sort")
        assert_problem(
            await client.post("/search/text", json={"query": "x", "sort": "tags", "min_score": 0}), 422, "sort"
        )
