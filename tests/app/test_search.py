"""Searches, embeddings, re-ranking and explanations, over HTTP and by `Index`, equal
what encoder and index compute.
"""

import asyncio
import base64
import json
import re
import shutil
import sys
import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from dcar_client.models import EmbeddingsResponse, ItemResponse

from app.api.routing import JsonResponse
from app.core.settings import Settings
from app.search import Index
from app.search.errors import InvalidQueryError, ItemNotFoundError
from app.search.query import normalize_text
from app.search.served_version import load_served_version
from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.dcar import DCAR, SecondStage, take
from dcar_core.model.methods import find_method
from dcar_core.util.errors import ArtifactError, ImageError, StoreUnavailableError
from index_jobs.index.versions import open_current
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.responses import assert_problem
from tests.support.searches import VALID, Client, close, ids
from tests.support.service import (
    ALICE,
    BOB,
    KEYS,
    ServiceClient,
    bearer,
    before_encoding,
    hold,
    opened,
    until,
)
from tests.support.versions import write_manifest


async def test_a_text_is_normalized_before_it_is_cached(started: ServiceClient) -> None:
    for query in ("a red square", "🙂"):
        asked = [query, f" {query.replace(' ', '  ')}\n"]
        one, two = [
            (await started.post("/search/text", json={"query": each})).json()
            for each in asked
        ]
        assert one["cached"] is False
        assert two["cached"] is True
        assert two["results"] == one["results"]
        assert len(one["results"]) == 10
        assert one["took_ms"] > 0


async def test_concurrent_queries_share_forward_passes_and_keep_their_results(
    built_index: Path,
) -> None:
    queries = [f"query number {i % 12}" for i in range(48)]
    async with opened(built_index, cache_size=0) as client:
        encoder = client.app.state.collections[None].current.encoder
        passes: list[int] = []
        before_encoding(encoder, lambda texts: passes.append(len(texts)))
        responses = await asyncio.gather(
            *(
                client.post("/search/text", json={"query": query, "k": 24})
                for query in queries
            )
        )
        assert sum(passes) == 12, "identical concurrent queries are computed once"
        assert len(passes) < 12
        singles = {
            q: (await client.post("/search/text", json={"query": q, "k": 24})).json()
            for q in queries[:12]
        }
    for query, response in zip(queries, responses, strict=True):
        wanted = singles[query]["results"]
        scores = [r["score"] for r in response.json()["results"]]
        np.testing.assert_allclose(scores, [r["score"] for r in wanted], atol=5e-5)


async def test_one_caller_has_at_most_half_of_what_may_be_pending(
    built_index: Path,
) -> None:
    async with opened(built_index, max_pending=8, max_queries=4, **KEYS) as client:
        gate, _ = hold(client.app.state.collections[None].current.encoder)
        tasks = [
            asyncio.create_task(
                client.post(
                    "/search/text",
                    json={"query": f"{number}"},
                    headers=bearer(key),
                )
            )
            for number, key in enumerate([ALICE] * 5 + [BOB] * 4)
        ]
        await until(lambda: any(task.done() for task in tasks))
        gate.set()
        assert [(await task).status_code for task in tasks] == [200] * 4 + [503] + [
            200
        ] * 4
        batch = {"queries": [{"query": f"again {number}"} for number in range(4)]}
        answer = await client.post("/search/batch", json=batch, headers=bearer(ALICE))
        assert answer.status_code == 200, "the ended ones count no more"


async def test_items_have_images_and_similar_items(
    started: ServiceClient, gallery: Path
) -> None:
    response = await started.post("/search/text", json={"query": "cross", "k": 24})
    found = response.json()["results"]
    for result in found:
        image = await started.get(result["image_url"])
        response = await started.get(result["image_url"].removesuffix("/image"))
        item = response.json()
        ItemResponse.model_validate(item, strict=True)
        assert item["id"] == result["id"]
        assert result["width"] == 48
        assert item["height"] == 48
        assert image.content == (gallery / item["metadata"]["file_name"]).read_bytes()
    assert image.headers["content-type"] == "image/png"
    assert image.headers["x-content-type-options"] == "nosniff"
    assert "max-age" in image.headers["cache-control"]
    again = await started.get(
        result["image_url"], headers={"If-None-Match": image.headers["etag"]}
    )
    assert again.status_code == 304
    assert again.content == b""

    response = await started.get("/items/circle%2Fred.png/similar", params={"k": 23})
    similar = response.json()
    VALID.validate_python(similar, strict=True)
    assert not similar["cached"], "no query was embedded"
    ids = [r["id"] for r in similar["results"]]
    assert len(ids) == 23
    assert "circle/red.png" not in ids


def test_an_index_of_another_encoder_is_refused(index: Path) -> None:
    manifest = open_current(index).manifest
    manifest = replace(manifest, spec=replace(manifest.spec, fingerprint="f" * 64))
    write_manifest(index, manifest)
    with pytest.raises(
        ArtifactError, match="was built by encoder ffffffffffff, not by"
    ):
        load_served_version(index, Settings(index=index, device="cpu"))


async def test_an_unavailable_vector_store_is_a_503_with_retry_after(
    built_index: Path,
) -> None:
    async with opened(built_index) as client:
        index = client.app.state.collections[None].current.index

        def away(*_: object, **__: object) -> None:
            raise StoreUnavailableError("the store does not respond: timed out")

        index.search = index.vectors = away
        for path, body in (
            ("/search/text", {"query": "red"}),
            ("/search/text", {"more_like": ["circle/red.png"]}),
            ("/search/batch", {"queries": [{"query": "red"}]}),
        ):
            response = await client.post(path, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (
                503,
                "2",
            ), path
            assert "timed out" not in response.text
        similar = await client.get("/items/circle%2Fred.png/similar")
        assert similar.status_code == 503


def test_nan_and_infinity_become_null() -> None:
    metadata = {
        "price": float("nan"),
        "sizes": [1.5, float("inf")],
        "more": {"least": float("-inf")},
    }
    assert (
        JsonResponse(metadata).body
        == b'{"price":null,"sizes":[1.5,null],"more":{"least":null}}'
    )


async def test_responses_show_no_absolute_path(
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    place = str(gallery / "circle" / "red.png")
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"id": "red", "path": place, "note": f"not {place}"}) + "\n"
    )
    rebuild(
        tmp_path / "list.jsonl",
        tiny_checkpoint,
        tmp_path / "index",
        workers=0,
        progress=False,
    )
    async with opened(tmp_path / "index") as client:
        response = await client.get("/items/red")
        item = response.json()
        response = await client.post(
            "/search/text", json={"query": "red", "fields": ["*"]}
        )
        (found,) = response.json()["results"]
        for metadata in (item["metadata"], found["metadata"]):
            assert metadata["file_name"] == "red.png"
            assert place not in metadata.values()


async def test_index_answers_as_the_service_does(
    reranking_index: Path, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    options: dict[str, Any] = {"query": "a red square", "rerank": True}
    crop = {"x": 0, "y": 0, "width": 0.5, "height": 1}
    async with opened(reranking_index) as client:
        reranked = await client.post("/search/text", json=options)
        form = {"query": "circle", "crop": json.dumps(crop)}
        cropped = await client.post(
            "/search/image",
            files={"file": png("red")},
            data=form,
        )
    index = Index.open(reranking_index, device="cpu", runtime="torch")
    answers: list[tuple[Any, httpx.Response]] = [(index.search(**options), reranked)]
    for image in (png("red"), tmp_path / "red.png", str(tmp_path / "red.png")):
        answers.append((index.search("circle", image=image, crop=crop), cropped))
    own = {"took_ms", "cached", "results"}
    scores = {"score", "text_score", "rerank_score", "explanation"}
    for found, answer in answers:
        body = answer.json()
        close(body, [(result["id"], result["score"]) for result in found["results"]])
        for one, other in zip(found["results"], body["results"], strict=True):
            assert one.keys() == other.keys()
            assert {k: one[k] for k in one.keys() - scores} == {
                k: other[k] for k in other.keys() - scores
            }
        assert {k: found[k] for k in found.keys() - own} == {
            k: body[k] for k in body.keys() - own
        }


def test_wrong_options_and_images_are_errors_that_name_them(
    built_index: Path, tmp_path: Path
) -> None:
    opened_index = Index.open(built_index, device="cpu")
    for options, field in (
        ({}, "query"),
        ({"query": " "}, "query"),
        ({"query": "red", "limit": 3}, "limit"),
        ({"query": "red", "k": 0}, "k"),
        ({"query": "red", "crop": {"x": 0, "y": 0, "width": 1, "height": 1}}, "crop"),
        ({"less_like": ["circle/red.png"]}, "less_like"),
    ):
        with pytest.raises(InvalidQueryError) as caught:
            opened_index.search(**options)
        assert caught.value.field == field
    with pytest.raises(
        InvalidQueryError, match=r"limit: unknown option; there are: .*, k, "
    ):
        opened_index.search("red", limit=3)
    with pytest.raises(ItemNotFoundError):
        opened_index.search(more_like=["nothing"])
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        opened_index.search(image=tmp_path / "none.png")
    with pytest.raises(ImageError):
        opened_index.search(image=b"no image")


IMAGE = base64.b64encode(png("red")).decode()


async def test_inputs_have_the_vectors_of_searches(
    started: ServiceClient,
    encoder: Encoder,
    tmp_path: Path,
) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    texts = encoder.encode_text(["a red circle", "cafe"])
    image = encoder.encode_images([tmp_path / "red.png"])[0]
    given: list[Any] = [
        "  a red  circle",
        {"image": IMAGE},
        "cafe",
        {"image": f"data:image/png;base64,{IMAGE}"},
    ]
    response = await started.post(
        "/v1/embeddings", json={"input": given, "user": "someone"}
    )
    found = EmbeddingsResponse.model_validate(response.json())
    assert found.object == "list"
    assert found.model == "index"
    assert found.fingerprint == encoder.fingerprint
    assert [each.index for each in found.data] == [0, 1, 2, 3]
    expected = np.array([texts[0], image, texts[1], image])
    np.testing.assert_allclose(
        np.array([each.embedding for each in found.data], np.float64),
        expected,
        atol=1e-6,
    )
    body = {
        "input": "cafe",
        "encoding_format": "base64",
        "model": "index",
        "dimensions": encoder.dim,
    }
    (packed,) = (await started.post("/v1/embeddings", json=body)).json()["data"]
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"),
        expected[2],
        atol=1e-6,
    )
    many = (
        await started.post(
            "/v1/embeddings", json={"input": [*["cafe"] * 2047, "a red circle"]}
        )
    ).json()["data"]
    np.testing.assert_allclose(
        [many[index]["embedding"] for index in (2046, 2047)],
        expected[[2, 0]],
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("given", "status", "field"),
    [
        ({}, 422, "input"),
        ({"input": []}, 422, "input"),
        ({"input": None}, 422, "input.0"),
        ({"input": [[1, 2, 3]]}, 422, "input.0"),
        ({"input": ["red", 5]}, 422, "input.1"),
        ({"input": ["red", " "]}, 422, "input.1"),
        ({"input": ["red"] * 2049}, 422, "input"),
        ({"input": "x" * 1001}, 422, "input.0"),
        ({"input": {"image": ""}}, 422, "input.0.image"),
        ({"input": {"image": "no base64!"}}, 422, "input.0.image"),
        (
            {
                "input": (
                    ["red"] * 40 + [{"image": base64.b64encode(b"no image").decode()}]
                )
            },
            422,
            "input.40.image",
        ),
        (
            {"input": {"image": base64.b64encode(png("red") + bytes(20_000)).decode()}},
            413,
            "input.0.image",
        ),
        ({"input": {"image": IMAGE, "url": "http://x"}}, 422, "input.0.url"),
        ({"input": "red", "dimensions": 8}, 422, "dimensions"),
        ({"input": "red", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "red", "model": "text-embedding-3-small"}, 404, "model"),
        ({"input": "red", "modell": "index"}, 422, "modell"),
    ],
)
async def test_invalid_input_is_named(
    started: ServiceClient,
    given: dict[str, Any],
    status: int,
    field: str,
) -> None:
    assert_problem(await started.post("/v1/embeddings", json=given), status, field)


async def test_keys_and_rates_count_each_input_and_very_many_values_are_refused(
    built_index: Path,
) -> None:
    async with opened(built_index, **KEYS, rate_limit="5/minute") as client:
        many = b'{"user": [' + b"0," * 600_000 + b"0]}"
        headers = {"Content-Type": "application/json", **bearer(BOB)}
        for path in ("/v1/embeddings", "/search/batch"):
            assert_problem(
                await client.post(path, content=many, headers=headers),
                413,
                "body",
            )
        body = {"input": ["red", "blue", "green"]}
        response = await client.post("/v1/embeddings", json=body)
        assert response.status_code == 401
        response = await client.post("/v1/embeddings", json=body, headers=bearer(ALICE))
        assert response.status_code == 200
        refused = await client.post("/v1/embeddings", json=body, headers=bearer(ALICE))
        assert_problem(refused, 429)
    async with opened(built_index, max_upload_bytes=20_000, max_queries=1) as client:
        refused = await client.post(
            "/v1/embeddings", json={"input": {"image": "A" * 100_000}}
        )
        assert_problem(refused, 413, "body")


async def test_reranking_adds_the_second_stage_to_the_cosine(
    reranking_index: Path, reranking_checkpoint: Path
) -> None:
    model = Encoder.load(reranking_checkpoint, device="cpu").model
    stage = SecondStage(model)
    texts = take(
        stage.texts(model.backbone.tokenize(["a red square"])),
        torch.zeros(8, dtype=torch.long),
    )
    async with opened(reranking_index, rerank_depth=8) as http:
        client = Client(http)
        served = http.app.state.collections[None].current
        plain = await client.text(query="a red square", k=24)
        again = await client.text(query="a red square", k=24, rerank=True)
        assert sorted(ids(again)[:8]) == sorted(ids(plain)[:8])
        assert ids(again)[8:] == ids(plain)[8:]
        rows = [served.index.row_of(each) for each in ids(again)[:8]]
        pixels = np.stack(
            [served.encoder.preprocess(served.index.image_bytes(row)) for row in rows]
        )
        images = stage.images(stage.image_rows(model.backbone.standardized(pixels)))
        expected = [r["score"] for r in again["results"][:8]] + stage.scores(
            texts, images
        ).numpy()
        rescored = [r["rerank_score"] for r in again["results"][:8]]
        np.testing.assert_allclose(rescored, expected, atol=2e-3)
        assert rescored == sorted(rescored, reverse=True)
        assert all("rerank_score" not in r for r in again["results"][8:])
        assert {r["id"]: r["score"] for r in again["results"]} == {
            r["id"]: r["score"] for r in plain["results"]
        }
        pages = [
            ids(
                await client.text(
                    query="a red square",
                    k=4,
                    offset=o,
                    rerank=True,
                )
            )
            for o in (0, 4, 8)
        ]
        assert list(chain.from_iterable(pages)) == ids(again)[:12]
        for offset in (0, 12):
            body = {"more_like": ["circle/red.png"], "rerank": True, "offset": offset}
            assert_problem(await http.post("/search/text", json=body), 422, "rerank")


@pytest.mark.parametrize(
    "method_name", ["dcar", "dcar+", "block-adapters+", "query-prompts"]
)
async def test_a_model_without_a_second_stage_does_not_rerank(
    method_name: str,
    tmp_path: Path,
    gallery: Path,
    tiny_model: Path,
) -> None:
    """Nor does one whose second stage validation turned off."""
    model = DCAR(
        load_backbone(BackboneSource(str(tiny_model))), find_method(method_name).config
    )
    model.rerank_weight = 0
    save_checkpoint(model, tmp_path / "checkpoint")
    rebuild(
        gallery,
        tmp_path / "checkpoint",
        tmp_path / "index",
        workers=0,
        progress=False,
    )
    async with opened(tmp_path / "index") as http:
        body = {"query": "red", "rerank": True}
        detail = assert_problem(
            await http.post("/search/text", json=body),
            409,
            "rerank",
        )["detail"]
        assert detail.startswith(
            "This model cannot re-rank: it has no second stage, or validation turned it"
            " off. "
        )
        assert "train a model with `dcar train --method query-prompts`" in detail
        response = await http.post(
            "/search/text", json={"query": "red", "explain": True, "k": 1}
        )
        explained = response.json()
        assert "words" not in explained["results"][0]["explanation"], (
            "a single word cannot be left out"
        )


@pytest.mark.slow
async def test_reranking_without_images_is_refused(
    tmp_path: Path,
    gallery: Path,
    reranking_checkpoint: Path,
) -> None:
    changing = Path(shutil.copytree(gallery, tmp_path / "gallery"))
    rebuild(
        changing,
        reranking_checkpoint,
        tmp_path / "index",
        workers=0,
        progress=False,
    )
    body = {"query": "red", "rerank": True, "k": 24}
    (changing / "circle/red.png").unlink()
    async with opened(tmp_path / "index", rerank_depth=24) as http:
        response = await http.post("/search/text", json=body | {"explain": True})
        results = response.json()["results"]
        assert ["rerank_score" in result for result in results] == [True] * 23 + [False]
        assert results[-1]["caption"] == "a red circle"
        alone = {
            "query": "red",
            "filter": {"caption": ["a red circle", "a blue circle"]},
            "explain": True,
        }
        response = await http.post("/search/text", json=alone)
        results = response.json()["results"]
        assert {r["caption"]: "explanation" in r for r in results} == {
            "a red circle": False,
            "a blue circle": True,
        }
        shutil.copy(gallery / "circle/red.png", changing / "circle/red.png")
        for asked, field in (
            (body | {"explain": True}, "rerank_score"),
            (alone, "explanation"),
        ):
            response = await http.post("/search/text", json=asked)
            results = response.json()["results"]
            assert all(field in result for result in results[:2]), (
                "a missing image is looked for again"
            )
        assert len(results) == 2
        shutil.rmtree(changing)
        assert (
            "none of them"
            in assert_problem(
                await http.post("/search/text", json=alone | {"k": 3}), 409
            )["detail"]
        )
    async with opened(tmp_path / "index") as http:
        assert (
            "none of them"
            in assert_problem(await http.post("/search/text", json=body), 409)["detail"]
        )
        response = await http.post("/search/text", json=body | {"rerank": False})
        assert response.status_code == 200


async def test_explanations_match_falls_of_the_score(
    built_index: Path,
    gallery: Path,
    encoder: Encoder,
) -> None:
    async with opened(built_index, explain_results=2) as http:
        client = Client(http)
        body = await client.text(query="a red square", k=4, explain=True)
        assert ["explanation" in result for result in body["results"]] == [
            True,
            True,
            False,
            False,
        ]
        first = body["results"][0]
        relevance = np.array(first["explanation"]["relevance"])
        assert relevance.shape == (4, 4), "32 pixels, patches of 8"
        assert first["explanation"]["fit"] == "fill", (
            "this model squeezes images into its square"
        )

        response = await http.get(f"/items/{first['id'].replace('/', '%2F')}")
        item = response.json()
        pixels = encoder.preprocess(gallery / item["metadata"]["file_name"])
        hidden = pixels.copy()
        hidden[:, 8:16, 24:32] = 255
        whole, without = encoder.encode_pixels(np.stack([pixels, hidden]))
        text = encoder.encode_text(["a red square"])[0]
        np.testing.assert_allclose(
            relevance[1, 3],
            text @ whole - text @ without,
            atol=1e-3,
        )
        shorter = encoder.encode_text(["red square", "a square", "a red"])
        words = first["explanation"]["words"]
        assert [word["word"] for word in words] == ["a", "red", "square"]
        np.testing.assert_allclose(
            [word["effect"] for word in words],
            text @ whole - shorter @ whole,
            atol=2e-3,
        )
        by_image = await client.image(
            (gallery / "circle/blue.png").read_bytes(),
            k="1",
            explain="true",
        )
        assert "words" not in by_image
        assert by_image["results"][0]["explanation"].keys() == {"relevance", "fit"}
        assert np.ptp(by_image["results"][0]["explanation"]["relevance"]) > 0.001


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("  red \t apple\n", "red apple"),
        ("cafe\u0301", "café"),
        ("a\x00b\x07c", "abc"),
        ("a\u200bb\u202ec", "abc"),
        ("cafe\u200b\u0301", "café"),
        ("a\u00a0b\u3000c", "a b c"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("a < b", "a < b"),
        ("\x00\n", ""),
    ],
)
def test_normalized_texts_have_no_invisible_characters(
    given: str, expected: str
) -> None:
    assert normalize_text(given) == expected
    assert normalize_text(expected) == expected


async def test_a_text_query_visits_the_documented_modules_alone(
    built_index: Path,
) -> None:
    """Those of the table in docs/architecture.md, whose functions it calls in any
    thread; at most fifteen.
    """
    root = Path(__file__).parents[2]
    visited = set[str]()
    is_counted = False
    table = (
        (root / "docs/architecture.md")
        .read_text(encoding="utf-8")
        .partition("## The walk of a query")[2]
    )
    documented = set(
        re.findall(r"`(\w+/\S+py)`", table.partition("\n\nBeside them")[0])
    )

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if (
            is_counted
            and event == "call"
            and file.is_relative_to(root)
            and frame.f_code.co_name != "<module>"
        ):
            visited.add(file.relative_to(root).as_posix())

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        async with opened(built_index, runtime="openvino", poll_s=0) as client:
            await client.post("/search/text", json={"query": "warm up"})
            is_counted = True
            for body in (
                {"query": "a red square"},
                {"query": "a blue one", "hybrid": True},
            ):
                response = await client.post("/search/text", json=body)
                assert len(response.json()["results"]) == 10
            is_counted = False
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    assert {
        name
        for name in visited
        if name.startswith(("app/", "dcar_core/", "index_jobs/"))
    } == documented
    assert len(documented) <= 15
