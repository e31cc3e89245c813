"""Searches over HTTP equal the results of encoder and index."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dcar_client.models import ItemResponse

from app.api.responses import JsonResponse
from app.core.settings import Settings
from app.search import results
from app.search.hits import Hits, find_hits
from app.search.query import Plan
from app.search.snapshots import Snapshot, load_snapshot
from dcar_core.util.errors import ArtifactError, StoreUnavailableError
from index_jobs.index.versions import open_current
from index_jobs.rebuild import rebuild
from tests.support.searches import VALID
from tests.support.service import ALICE, BOB, KEYS, ServiceClient, bearer, before_encoding, hold, opened, until
from tests.support.versions import write_manifest


async def test_a_text_is_normalized_before_it_is_cached(started: ServiceClient) -> None:
    for query in ("a red square", "🙂"):
        asked = [query, f" {query.replace(' ', '  ')}\n"]
        one, two = [(await started.post("/search/text", json={"query": each})).json() for each in asked]
        assert (one["cached"], two["cached"], two["results"]) == (False, True, one["results"])
        assert len(one["results"]) == 10
        assert one["took_ms"] > 0


async def test_a_repeated_query_is_not_ranked_again(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[Plan] = []

    def counted(snapshot: Snapshot, plan: Plan, *rest: Any) -> Hits:
        ranked.append(plan)
        return find_hits(snapshot, plan, *rest)

    monkeypatch.setattr(results, "find_hits", counted)
    async with opened(built_index, cache_size=9) as client:
        asked = {"query": "a green triangle", "k": 3}
        others: list[dict[str, Any]] = [
            {"hybrid": 0.5}, {"hybrid": 0.6}, {"min_score": 0.1}, {"more_like": ["circle/red.png"]}, {"offset": 2},
            {"k": 4}, {"query": "a red circle"}, {"without": "red", "weights": {"without": 0}, "fields": ["color"]},
        ]  # fmt: skip
        for other in [{}, *others]:
            first, second = [(await client.post("/search/text", json=asked | other)).json() for _ in range(2)]
            assert first["results"] == second["results"]
        assert len(ranked) == 9, "each once"
        for other in ({"filter": {"category": "circle"}}, {"fold": 0.9}, {"group_by": "category"}):
            for _ in range(2):
                await client.post("/search/text", json=asked | other)
        assert len(ranked) == 15, "rows of filters, folds and groups are not cached"
        await client.post("/search/text", json={"query": "a tenth query"})
        await client.post("/search/text", json=asked)
        assert len(ranked) == 17, "as many rankings are cached as embeddings"


async def test_concurrent_queries_share_forward_passes_and_keep_their_results(built_index: Path) -> None:
    queries = [f"query number {i % 12}" for i in range(48)]
    async with opened(built_index, cache_size=0) as client:
        encoder = client.app.state.collections[None].live.encoder
        passes: list[int] = []
        before_encoding(encoder, lambda texts: passes.append(len(texts)))
        responses = await asyncio.gather(
            *(client.post("/search/text", json={"query": query, "k": 24}) for query in queries)
        )
        assert sum(passes) == 12, "identical concurrent queries are computed once"
        assert len(passes) < 12
        singles = {q: (await client.post("/search/text", json={"query": q, "k": 24})).json() for q in queries[:12]}
    for query, response in zip(queries, responses, strict=True):
        wanted = singles[query]["results"]
        scores = [r["score"] for r in response.json()["results"]]
        np.testing.assert_allclose(scores, [r["score"] for r in wanted], atol=5e-5)


async def test_searches_beyond_max_pending_are_refused(built_index: Path) -> None:
    async with opened(built_index, max_pending=2) as client:
        responses = await asyncio.gather(*(client.post("/search/text", json={"query": f"q{i}"}) for i in range(10)))
        statuses = sorted(response.status_code for response in responses)
        assert statuses == [200] * 2 + [503] * 8
        assert all("retry-after" in a.headers for a in responses if a.status_code == 503)
        assert (await client.post("/search/text", json={"query": "q1"})).status_code == 200
        for count, status in ((2, 200), (3, 503), (2, 200)):  # each search of a batch counts
            batch = {"queries": [{"query": f"q{i}"} for i in range(count)]}
            assert (await client.post("/search/batch", json=batch)).status_code == status


async def test_one_caller_has_at_most_half_of_what_may_be_pending(built_index: Path) -> None:
    async with opened(built_index, max_pending=8, max_queries=4, **KEYS) as client:
        gate, _ = hold(client.app.state.collections[None].live.encoder)
        tasks = [
            asyncio.create_task(client.post("/search/text", json={"query": f"{number}"}, headers=bearer(key)))
            for number, key in enumerate([ALICE] * 5 + [BOB] * 4)
        ]
        await until(lambda: any(task.done() for task in tasks))
        gate.set()
        assert [(await task).status_code for task in tasks] == [200] * 4 + [503] + [200] * 4
        batch = {"queries": [{"query": f"again {number}"} for number in range(4)]}
        answer = await client.post("/search/batch", json=batch, headers=bearer(ALICE))
        assert answer.status_code == 200, "the ended ones count no more"


async def test_items_have_images_and_similar_items(started: ServiceClient, gallery: Path) -> None:
    found = (await started.post("/search/text", json={"query": "cross", "k": 24})).json()["results"]
    for result in found:
        image = await started.get(result["image_url"])
        item = (await started.get(result["image_url"].removesuffix("/image"))).json()
        ItemResponse.model_validate(item, strict=True)
        assert item["id"] == result["id"]
        assert (result["width"], item["height"]) == (48, 48)
        assert image.content == (gallery / item["metadata"]["file_name"]).read_bytes()
    assert image.headers["content-type"] == "image/png"
    assert image.headers["x-content-type-options"] == "nosniff"
    assert "max-age" in image.headers["cache-control"]
    again = await started.get(result["image_url"], headers={"If-None-Match": image.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")

    similar = (await started.get("/items/circle%2Fred.png/similar", params={"k": 23})).json()
    VALID.validate_python(similar, strict=True)
    assert not similar["cached"], "no query was embedded"
    ids = [r["id"] for r in similar["results"]]
    assert len(ids) == 23
    assert "circle/red.png" not in ids


def test_an_index_of_another_encoder_is_refused(index: Path) -> None:
    manifest = open_current(index).manifest
    manifest = replace(manifest, spec=replace(manifest.spec, fingerprint="f" * 64))
    write_manifest(index, manifest)
    with pytest.raises(ArtifactError, match="was built by encoder ffffffffffff, not by"):
        load_snapshot(index, Settings(index=index, device="cpu"))


async def test_an_unavailable_vector_store_is_a_503_with_retry_after(built_index: Path) -> None:
    async with opened(built_index) as client:
        artifact = client.app.state.collections[None].live.artifact

        def away(*_: object, **__: object) -> None:
            raise StoreUnavailableError("the store does not respond: timed out")

        artifact.search = artifact.vectors = away
        for path, body in (
            ("/search/text", {"query": "red"}),
            ("/search/text", {"more_like": ["circle/red.png"]}),
            ("/search/batch", {"queries": [{"query": "red"}]}),
        ):
            response = await client.post(path, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (503, "2"), path
            assert "timed out" not in response.text
        similar = await client.get("/items/circle%2Fred.png/similar")
        assert similar.status_code == 503


def test_nan_and_infinity_become_null() -> None:
    metadata = {"price": float("nan"), "sizes": [1.5, float("inf")], "more": {"least": float("-inf")}}
    assert JsonResponse(metadata).body == b'{"price":null,"sizes":[1.5,null],"more":{"least":null}}'


async def test_responses_show_no_absolute_path(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    place = str(gallery / "circle" / "red.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"id": "red", "path": place, "note": f"not {place}"}) + "\n")
    rebuild(tmp_path / "list.jsonl", tiny_checkpoint, tmp_path / "index", workers=0, progress=False)
    async with opened(tmp_path / "index") as client:
        item = (await client.get("/items/red")).json()
        (found,) = (await client.post("/search/text", json={"query": "red", "fields": ["*"]})).json()["results"]
        for metadata in (item["metadata"], found["metadata"]):
            assert metadata["file_name"] == "red.png"
            assert place not in metadata.values()
