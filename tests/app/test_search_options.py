"""Search options, each compared with the same result computed by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from app.api.responses import result_chars
from app.api.schemas import BatchResponse, ItemsResponse
from app.middleware.body_limit import UNSENT_BYTES
from app.search.query import Match, SearchResults
from dcar_core import Encoder
from index_jobs.rebuild import rebuild
from index_jobs.store.artifact import Artifact, Item
from index_jobs.store.versions import open_current
from tests.support.images import png
from tests.support.responses import assert_problem
from tests.support.searches import Client, close, ids, ranked
from tests.support.service import ServiceClient, opened


async def test_pages_together_equal_one_large_page(built_index: Path) -> None:
    async with opened(built_index, max_window=20) as http:
        client = Client(http)
        whole = await client.text(query="red", k=20)
        assert "next_offset" not in whole, "the window ends here"
        pages: list[str] = []
        offset: int | None = 0
        while offset is not None:
            page = await client.text(query="red", k=6, offset=offset)
            assert [r["rank"] for r in page["results"]] == list(range(offset + 1, offset + 7))
            pages += ids(page)
            offset = page.get("next_offset")
        assert pages == ids(whole)[:18], "another page would exceed the window"
        assert_problem(await http.post("/search/text", json={"query": "red", "k": 6, "offset": 15}), 422, "offset")
    async with opened(built_index) as http:
        client = Client(http)
        last = await client.text(query="red", k=10, offset=20)
        assert len(last["results"]) == 4
        assert "next_offset" not in last
        assert "next_offset" not in await client.text(query="red", k=24)
        assert (await client.text(query="red", k=23))["next_offset"] == 23
        assert (await client.text(query="red", offset=500))["results"] == []
        similar = (await http.get("/items/circle%2Fred.png/similar", params={"k": 5, "offset": 5})).json()
        first = (await http.get("/items/circle%2Fred.png/similar", params={"k": 10})).json()
        assert ids(similar) == ids(first)[5:]


async def test_filtered_search_returns_k_matching_results(started: ServiceClient) -> None:
    client = Client(started)
    order = ids(await client.text(query="red square", k=24))

    async def found(**filter: Any) -> list[str]:
        return ids(await client.text(query="red square", k=6, filter=filter))

    crosses = [item for item in order if item.startswith(("cross", "été"))]
    assert await found(category="cross") == crosses, "all six, at any rank"
    both = [i for i in order if i.startswith(("circle", "square"))]
    assert await found(category=["circle", "square"]) == both[:6]
    assert await found(category={"not": ["circle", "square", "triangle"]}) == crosses
    assert sorted(await found(color="red")) == [f"{s}/red.png" for s in ("circle", "cross", "square", "triangle")]
    assert await found(color="red", category="circle") == ["circle/red.png"]
    assert await found(color={"gt": "green", "lt": "purple"}) == [i for i in order if "orange" in i]
    assert await found(color="pink") == []
    form = await client.image(png(), k="4", filter='{"color": "red"}')
    assert len(form["results"]) == 4
    bad = await started.post("/search/image", files={"file": png()}, data={"filter": "red"})
    assert_problem(bad, 422, "filter")


async def test_invalid_json_and_charsets_in_forms_name_the_field(started: ServiceClient) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="query"\r\n\r\nxn--a\r\n'
    body += b'--b\r\nContent-Disposition: form-data; name="file"; filename="p"\r\n\r\n' + png() + b"\r\n--b--\r\n"

    for name, value in (
        ("filter", r'{"category": "\ud800"}'),
        ("filter", r'{"\ud800": 1}'),
        ("filter", '{"category": ' + "[" * 5000 + "]" * 5000 + "}"),
        ("weights", r'{"\udfff": 1}'),
        ("min_score", r'"\ud800"'),
    ):
        response = await started.post("/search/image", files={"file": png()}, data={name: value})
        problem = assert_problem(response, 422)
        assert all(each["field"].startswith(name) for each in problem["errors"])
    for charset, status in (
        *((codec, 400) for codec in ("idna", "punycode", "undefined", "utf-7", "rot13", "zlib", "no-such", "")),
        *((codec, 200) for codec in ("utf-8", "UTF-8", '"utf-8"', "us-ascii", "iso-8859-1")),
    ):
        kind = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
        response = await started.post("/search/image", content=body, headers=kind)
        assert response.status_code == status, charset
        if status == 400:
            assert_problem(response, 400, "Content-Type")


async def test_min_score_drops_lower_results(started: ServiceClient) -> None:
    client = Client(started)
    whole = await client.text(query="red", k=24)
    cut = whole["results"][9]["score"]
    some = await client.text(query="red", k=24, min_score=cut - 1e-6)
    assert ids(some) == ids(whole)[:10]
    assert some["min_score"] == cut - 1e-6
    assert (await client.text(query="red", min_score=1.0))["results"] == []
    assert "min_score" not in whole
    never = assert_problem(
        await started.post("/search/text", json={"query": "x", "min_score": "auto"}), 409, "min_score"
    )
    assert "--validation" in never["detail"]
    by_picture = await started.post("/search/image", files={"file": png()}, data={"min_score": "auto"})
    assert_problem(by_picture, 422, "min_score")


async def test_levels_and_the_auto_min_score_follow_from_the_cutoff_of_the_index(
    tiny_data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rebuild(tiny_data, tiny_checkpoint, tmp_path / "index", workers=0, progress=False, validation=tiny_data)
    cut = open_current(tmp_path / "index").manifest.cutoff["min_score"]
    async with opened(tmp_path / "index") as http:
        client = Client(http)
        (collection,) = (await http.get("/collections")).json()["collections"]
        whole = await client.text(query="red", k=24)
        assert whole["cutoff"] == collection["min_score"] == cut
        levels = [result["level"] for result in whole["results"]]
        assert levels == ["likely" if result["score"] >= cut else "unlikely" for result in whole["results"]]
        assert whole["nothing_fits"] == ("likely" not in levels)
        page = await client.text(query="red", k=4, offset=20)
        assert [each["level"] for each in page["results"]] == levels[20:]
        assert page["nothing_fits"] == whole["nothing_fits"]
        auto = await client.text(query="red", k=24, min_score="auto")
        assert auto["min_score"] == cut
        assert ids(auto) == [r["id"] for r in whole["results"] if r["score"] >= cut]
        assert 0 < len(auto["results"]) < 24
        by_image = await client.image(png())
        assert ({each["level"] for each in by_image["results"]}, by_image["nothing_fits"]) == ({"possible"}, False)
        assert "cutoff" not in by_image
        equal = await client.text(query="red", without="blue", weights={"without": 0})  # the same vector
        assert ("cutoff" in equal, "cutoff" in await client.text(query="red")) == (False, True)


async def test_text_and_image_are_weighted(
    started: ServiceClient, gallery: Path, encoder: Encoder, artifact: Artifact
) -> None:
    data = (gallery / "circle/blue.png").read_bytes()
    text, image = encoder.encode_text(["a red square"])[0], encoder.encode_images([data])[0]

    client = Client(started)
    both = await client.image(data, k="24", query="a red square")
    close(both, ranked(artifact, text + image))
    words = await client.image(data, k="24", query="a red square", weights='{"text": 3, "image": 0.5}')
    close(words, ranked(artifact, 3 * text + 0.5 * image))
    alone = await client.image(data, k="24", query="a red square", weights='{"text": 0}')
    close(alone, ranked(artifact, image))
    for wrong in ('{"text": -1}', '{"text": "a"}', '{"colour": 1}', "3", '{"text": NaN}'):
        response = await started.post("/search/image", files={"file": data}, data={"weights": wrong})
        assert response.status_code == 422, wrong
    nothing = {"query": "x", "weights": json.dumps({"text": 0, "image": 0})}
    assert_problem(await started.post("/search/image", files={"file": data}, data=nothing), 422, "weights")


async def test_more_like_and_less_like_shift_the_query(
    started: ServiceClient, encoder: Encoder, artifact: Artifact
) -> None:
    def vector(item: str) -> np.ndarray:
        row = artifact.row_of(item)
        assert row is not None
        return artifact.vectors(np.array([row]))[0]

    text = encoder.encode_text(["red"])[0]
    a, b, c = (vector(item) for item in ("circle/red.png", "cross/blue.png", "square/green.png"))

    client = Client(started)
    more = await client.text(more_like=["circle/red.png"], k=23)
    similar = (await started.get("/items/circle%2Fred.png/similar", params={"k": 23})).json()
    assert more["results"] == similar["results"]
    two = await client.text(more_like=["circle/red.png", "cross/blue.png"], k=24)
    given = {"circle/red.png", "cross/blue.png", "square/green.png"}
    close(two, [each for each in ranked(artifact, a + b) if each[0] not in given - {"square/green.png"}])
    few = (await started.get("/items/circle%2Fred.png/similar", params={"k": 5})).json()
    assert (ids(few), few["next_offset"]) == (ids(similar)[:5], 5), "excluded items do not use up results"
    all_of_it = await client.text(
        query="red", k=24, more_like=["circle/red.png", "cross/blue.png"], less_like=["square/green.png"],
        weights={"more": 2, "less": 0.25},
    )  # fmt: skip
    wanted = ranked(artifact, text + 2 * (a + b) / 2 - 0.25 * c)
    close(all_of_it, [each for each in wanted if each[0] not in given])
    form = await client.image(png(), less_like=["circle/red.png", "cross/blue.png"], k="24")
    same = await client.image(png(), less_like='["circle/red.png", "cross/blue.png"]', k="24")
    assert [each["id"] for each in same["results"]] == [each["id"] for each in form["results"]]
    assert not {"circle/red.png", "cross/blue.png"} & set(ids(form))


async def test_near_duplicates_are_folded(started: ServiceClient) -> None:
    client = Client(started)
    plain = await client.text(query="x", k=24)
    folded = await client.text(query="x", k=24, fold=0.95)
    groups = [[result["id"], *result.get("folded", [])] for result in folded["results"]]
    assert sorted(each for group in groups for each in group) == sorted(ids(plain))
    assert 1 < len(groups) < 24
    assert ids(folded) == [each for each in ids(plain) if each in ids(folded)]
    first = await client.text(query="x", k=3, fold=0.95)
    second = await client.text(query="x", k=3, offset=3, fold=0.95)
    assert ids(first) + ids(second) == ids(folded)[:6], "other items fill the page"


async def test_batch_answers_each_query(built_index: Path) -> None:
    async with opened(built_index, max_queries=4, cache_size=0) as http:
        client = Client(http)
        queries: list[dict[str, Any]] = [
            {"query": "red", "k": 3},
            {"query": "blue circle", "filter": {"category": "circle"}},
            {"more_like": ["cross/blue.png"], "k": 2, "offset": 1},
            {"query": "red", "k": 3},
        ]
        response = await http.post("/search/batch", json={"queries": queries})
        body = response.json()
        BatchResponse.model_validate(body, strict=True)
        assert [len(each["results"]) for each in body["answers"]] == [3, 6, 2, 3]
        for query, each in zip(queries, body["answers"], strict=True):
            alone = await client.text(**query)
            np.testing.assert_allclose(
                [r["score"] for r in each["results"]], [r["score"] for r in alone["results"]], atol=1e-5
            )
        for wrong, field in (
            ({"queries": []}, "queries"),
            ({"queries": [{"query": "x"}] * 5}, "queries"),
            ({"queries": [{"query": "x"}, {"query": ""}]}, "queries.1.query"),
            ({"queries": [{"query": "x"}, {"query": "y", "k": 0}]}, "queries.1.k"),
            ({"queries": [{"query": "x", "filter": {"a": 1}}]}, "queries.0.filter.a"),
        ):
            assert_problem(await http.post("/search/batch", json=wrong), 422, field)
        assert_problem(await http.post("/search/batch", content=b"{}"), 415)


async def test_results_have_the_requested_fields(started: ServiceClient, artifact: Artifact) -> None:
    client = Client(started)
    plain = await client.text(query="a red square", k=3)
    assert all("metadata" not in result for result in plain["results"])
    every = {"file_name", "color"}
    for fields, wanted in ((["color"], {"color"}), (["*"], every), (["id", "caption"], set())):
        results = (await client.text(query="a red square", k=3, fields=fields))["results"]
        assert [result["id"] for result in results] == ids(plain)
        for result in results:
            assert result["metadata"].keys() == wanted
            for name, value in result["metadata"].items():
                row = artifact.row_of(result["id"])
                assert row is not None
                assert artifact.item(row).metadata[name] == value
    form = {"fields": '["file_name"]', "k": "1"}
    found = (await started.post("/search/image", files={"file": png()}, data=form)).json()["results"]
    assert found[0]["metadata"].keys() == {"file_name"}


async def test_long_metadata_are_bounded_in_responses(started: ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    query = {"query": "red", "k": 20, "fields": ["*"]}
    batch = {"queries": [query, {"query": "blue", "facets": ["category"]}]}
    whole = (await started.post("/search/text", json=query)).json()["results"]
    monkeypatch.setattr("app.api.responses._QUICK_CHARS", 0)  # made in a thread
    assert (await started.post("/search/text", json=query)).json()["results"] == whole
    assert (await started.post("/search/batch", json=batch)).json()["answers"][0]["results"] == whole
    listed = (await started.get("/items", params={"k": 20})).json()
    assert (await started.get("/ui/browse", params={"k": 20})).json() == listed
    bodies = started.app.state.bodies
    assert not bodies._unsent, "they have been sent"
    bodies._unsent["other"] = UNSENT_BYTES
    assert_problem(await started.post("/search/text", json=query), 503)
    bodies._unsent.clear()
    monkeypatch.setattr("app.api.responses._MAX_CHARS", 500)
    assert_problem(await started.post("/search/text", json=query), 422, "k")
    assert_problem(await started.post("/search/batch", json=batch), 422, "queries")
    for path in ("/items", "/ui/browse"):
        assert_problem(await started.get(path, params={"k": 20}), 422, "k")
    short = query | {"k": 2}
    assert (await started.post("/search/text", json=short)).json()["results"] == whole[:2]


def test_every_text_of_a_response_counts() -> None:
    item = Item("é" * 10, "\n" * 10, "c", None, None, pa.scalar('{"a":1}'))
    match = Match(0, 0.5, folded=["f" * 7], group={"value": "v" * 100, "count": 1234})
    match.item = item
    facets: dict[str, list[dict[str, Any]]] = {"x": [{"value": "\n" * 10, "count": 1}, {"value": 3, "count": 2}]}
    results = SearchResults(version=1, matches=[match], facets=facets, fields=("*",))
    without = replace(results, fields=(), facets=None)
    assert result_chars([without]) == 4 * 20 + len(json.dumps("\n" * 10)) + 1 + 7 + 100 + 4
    assert result_chars([results, without]) == 2 * result_chars([without]) + 7 + len(json.dumps("\n" * 10)) + 1
    assert result_chars([results] * 1_000_000) < 16 * 2**20 + 1000, "no longer than needed"


async def test_items_are_listed_page_by_page(started: ServiceClient, artifact: Artifact) -> None:
    whole, offset = list[dict[str, Any]](), 0
    while offset is not None:
        page = (await started.get("/items", params={"k": 7, "offset": offset})).json()
        assert (page["count"], page["index_version"]) == (24, 1)
        whole += page["items"]
        offset = page.get("next_offset")
    assert [each["id"] for each in whole] == [artifact.item(row).id for row in range(24)]
    one = (await started.get("/items/circle%2Fred.png")).json()
    del one["index_version"]
    assert one in whole
    some = (await started.get("/items", params={"filter": '{"category": ["circle"]}'})).json()
    assert {each["category"] for each in some["items"]} == {"circle"}
    assert (some["count"], len(some["items"])) == (6, 6)
    ItemsResponse.model_validate(some, strict=True)
    for given, field in (
        ({"filter": "{"}, "filter"), ({"filter": "[]"}, "filter"),
        ({"filter": '{"colour": 1}'}, "filter.colour"), ({"k": 201}, "k"), ({"k": 0}, "k"),
        ({"offset": -1}, "offset"), ({"filters": "{}"}, "filters"),
    ):  # fmt: skip
        assert_problem(await started.get("/items", params=given), 422, field)


ITEM, LEFT = "circle/red.png", {"x": 0, "y": 0, "width": 0.5, "height": 1}
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"query": "x", "filter": {"price": 3}}, "filter.price"),
    ({"query": "x", "filter": {"color": 3}}, "filter.color"),
    ({"query": "x", "filter": {"color": {"near": "red"}}}, "filter.color"),
    ({"query": "x", "filter": ["red"]}, "filter"),
    *(({"query": "x", "min_score": wrong}, "min_score") for wrong in (2, -2, "high", True)),
    *(({"query": "x", "min_score": "auto", name: [ITEM]}, "min_score") for name in ("more_like", "less_like")),
    ({"query": "x", "min_score": "auto", "without": "red"}, "min_score"),
    ({"more_like": ["nothing"]}, "more_like"),
    ({"query": "", "without": "red", "more_like": ["nothing"]}, "more_like"),
    ({"query": "x", "more_like": ["a"] * 40}, "more_like"),
    ({"query": "x", "less_like": ["nothing"]}, "less_like"),
    ({"less_like": [ITEM]}, "less_like"),
    ({"query": "x", "weights": {"text": 0}}, "weights"),
    ({"query": "red", "without": "red", "weights": {"without": 1}}, "weights"),
    ({"more_like": [ITEM], "less_like": [ITEM], "weights": {"more": 1, "less": 1}}, "weights"),
    *(({"query": "x", "fold": wrong}, "fold") for wrong in (0, 1.5, "much")),
    ({"query": "x", "fields": ["colour"]}, "fields"),
    ({"query": "red", "crop": LEFT}, "crop"),
    *(({"query": "x", "hybrid": wrong}, "hybrid") for wrong in (1.5, -0.1, "yes", None)),
    ({"query": "x", "hybrid": True, "rerank": True}, "hybrid"),
    ({"more_like": [ITEM], "hybrid": True}, "hybrid"),
    *(({"query": "x", "group_by": wrong}, "group_by") for wrong in ("brand", 7, "c" * 1025)),
    ({"query": "x", "group_by": "color", "fold": 0.9}, "group_by"),
    *(({"query": "x", "facets": wrong}, "facets") for wrong in (["brand"], "color", ["color"] * 9)),
    ({"without": "red"}, "without"),
    *(({"query": "x", "without": wrong}, "without") for wrong in (" ", "<|endoftext|>", "r" * 1001, 7)),
]


async def test_invalid_options_name_the_field(started: ServiceClient) -> None:
    for body, field in INVALID:
        problem = assert_problem(await started.post("/search/text", json=body), 422)
        assert problem["errors"][0]["field"].startswith(field), body
        if field == "fields":
            assert "available: caption, category, color, file_name, id" in problem["detail"]
