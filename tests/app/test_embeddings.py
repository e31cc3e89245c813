"""POST /v1/embeddings: OpenAI's shape, the vectors of searches, and bad input."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dcar_client.models import EmbeddingsResponse

from dcar_core import Encoder
from tests.support.images import png
from tests.support.responses import assert_problem
from tests.support.service import ALICE, BOB, KEYS, ServiceClient, bearer, opened

IMAGE = base64.b64encode(png("red")).decode()


async def test_texts_and_images_have_the_vectors_of_searches(
    started: ServiceClient, encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    texts = encoder.encode_text(["a red circle", "cafe"])
    image = encoder.encode_images([tmp_path / "red.png"])[0]
    given: list[Any] = ["  a red  circle", {"image": IMAGE}, "cafe", {"image": f"data:image/png;base64,{IMAGE}"}]
    response = await started.post("/v1/embeddings", json={"input": given, "user": "someone"})
    found = EmbeddingsResponse.model_validate(response.json())
    assert (found.object, found.model, found.fingerprint) == ("list", "index", encoder.fingerprint)
    assert [each.index for each in found.data] == [0, 1, 2, 3]
    expected = np.array([texts[0], image, texts[1], image])
    np.testing.assert_allclose(np.array([each.embedding for each in found.data], np.float64), expected, atol=1e-6)
    body = {"input": "cafe", "encoding_format": "base64", "model": "index", "dimensions": encoder.dim}
    (packed,) = (await started.post("/v1/embeddings", json=body)).json()["data"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"), expected[2], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "status", "field"),
    [
        ({}, 422, "input"),
        ({"input": []}, 422, "input"),
        ({"input": None}, 422, "input.0"),
        ({"input": [[1, 2, 3]]}, 422, "input.0"),
        ({"input": ["red", 5]}, 422, "input.1"),
        ({"input": ["red", " "]}, 422, "input.1"),
        ({"input": ["red"] * 33}, 422, "input"),
        ({"input": "x" * 1001}, 422, "input.0"),
        ({"input": {"image": ""}}, 422, "input.0.image"),
        ({"input": {"image": "no base64!"}}, 422, "input.0.image"),
        ({"input": ["red", {"image": base64.b64encode(b"no image").decode()}]}, 422, "input.1.image"),
        ({"input": {"image": base64.b64encode(png("red") + bytes(20_000)).decode()}}, 413, "input.0.image"),
        ({"input": {"image": IMAGE, "url": "http://x"}}, 422, "input.0.url"),
        ({"input": "red", "dimensions": 8}, 422, "dimensions"),
        ({"input": "red", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "red", "model": "text-embedding-3-small"}, 404, "model"),
        ({"input": "red", "modell": "index"}, 422, "modell"),
    ],
)
async def test_invalid_input_is_refused_by_name(
    started: ServiceClient, given: dict[str, Any], status: int, field: str
) -> None:
    assert_problem(await started.post("/v1/embeddings", json=given), status, field)


async def test_a_body_beyond_the_upload_limit_is_refused(built_index: Path) -> None:
    async with opened(built_index, max_upload_bytes=20_000, max_queries=1) as client:
        response = await client.post("/v1/embeddings", json={"input": {"image": "A" * 100_000}})
        assert_problem(response, 413, "body")


async def test_keys_and_rates_apply_each_input_counts_and_very_many_values_are_refused_unparsed(
    built_index: Path,
) -> None:
    async with opened(built_index, **KEYS, rate_limit="5/minute") as client:
        many, headers = b'{"user": [' + b"0," * 600_000 + b"0]}", {"Content-Type": "application/json", **bearer(BOB)}
        for path in ("/v1/embeddings", "/search/batch"):
            assert_problem(await client.post(path, content=many, headers=headers), 413, "body")
        body = {"input": ["red", "blue", "green"]}
        assert (await client.post("/v1/embeddings", json=body)).status_code == 401
        assert (await client.post("/v1/embeddings", json=body, headers=bearer(ALICE))).status_code == 200
        refused = await client.post("/v1/embeddings", json=body, headers=bearer(ALICE))
        assert_problem(refused, 429)
