"""Searches posted to a service in memory, and the same thing computed by hand."""

from typing import Any

import httpx
import numpy as np
from pydantic import TypeAdapter

from app.search.results import SearchResponse

VALID = TypeAdapter(SearchResponse)


class Client:
    """Posts searches and checks the form of what comes back."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def text(self, **body: Any) -> dict[str, Any]:
        answer = await self.client.post("/search/text", json=body)
        assert answer.status_code == 200, answer.text
        VALID.validate_python(answer.json(), strict=True)
        return dict(answer.json())

    async def image(self, data: bytes, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post(
            "/search/image",
            files={"file": data},
            data=fields,
        )
        assert answer.status_code == 200, answer.text
        VALID.validate_python(answer.json(), strict=True)
        return dict(answer.json())


def ids(body: dict[str, Any]) -> list[str]:
    return [result["id"] for result in body["results"]]


def close(body: dict[str, Any], wanted: list[tuple[str, float]]) -> None:
    """float16 in the cache moves a score by up to 1e-3, so close neighbours may change
    places.
    """
    assert len(body["results"]) == len(wanted)
    np.testing.assert_allclose(
        [r["score"] for r in body["results"]],
        [s for _, s in wanted],
        atol=2e-3,
    )
    score_of = dict(wanted)
    np.testing.assert_allclose(
        [r["score"] for r in body["results"]],
        [score_of[i] for i in ids(body)],
        atol=2e-3,
    )
