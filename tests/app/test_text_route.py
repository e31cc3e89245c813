"""The route of text searches takes the request directly; it must behave like FastAPI's other routes."""

from pathlib import Path

import pytest

from app.core.metrics import CONTENT_TYPE
from tests.support.service import opened

PATHS = ["/search/text", "/collections/other/search/text"]


@pytest.mark.parametrize("path", PATHS)
async def test_text_route_is_matched_counted_and_documented_like_the_others(built_index: Path, path: str) -> None:
    template = path.replace("other", "{collection}")
    async with opened(built_index, collections={"other": built_index}, poll_s=0) as client:
        found = (await client.post(path, json={"query": "a red square", "k": 2})).json()
        prefix = path.removesuffix("/search/text")
        assert all(each["image_url"].startswith(f"{prefix}/items/") for each in found["results"])
        for method in ("GET", "PUT", "HEAD"):
            refused = await client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        metrics = (await client.get("/metrics", headers={"accept": CONTENT_TYPE})).text
        assert f'dcar_request_seconds_count{{route="{template}",status="200"}} 1.0' in metrics
        operation = (await client.get("/openapi.json")).json()["paths"][template]["post"]
        assert "application/json" in operation["requestBody"]["content"]
        names = [each["name"] for each in operation.get("parameters", [])]
        assert names == (["collection"] if "{" in template else [])


async def test_text_search_in_an_unknown_collection_is_answered_404(built_index: Path) -> None:
    async with opened(built_index) as client:
        assert (await client.post("/collections/nobody/search/text", json={"query": "x"})).status_code == 404
