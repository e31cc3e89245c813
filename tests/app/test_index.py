"""`Index`, the engine in this process: it searches as the service does."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.search import Index
from app.search.errors import InvalidQueryError, ItemNotFoundError
from dcar_core.util.errors import ImageError
from tests.support.images import png
from tests.support.searches import close
from tests.support.service import ServiceClient, opened


@pytest.fixture(scope="module")
def opened_index(built_index: Path) -> Index:
    return Index.open(built_index, device="cpu")


async def test_index_reranks_as_the_service_does(reranking_index: Path) -> None:
    options: dict[str, Any] = {"query": "a red square", "rerank": True}
    async with opened(reranking_index) as client:
        answer = await client.post("/search/text", json=options)
    _compare(Index.open(reranking_index, device="cpu").search(**options), answer)


async def test_index_searches_by_image_as_the_service_does(
    started: ServiceClient, opened_index: Index, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    crop = {"x": 0, "y": 0, "width": 0.5, "height": 1}
    body = {"query": "circle", "crop": '{"x": 0, "y": 0, "width": 0.5, "height": 1}'}
    answer = await started.post("/search/image", files={"file": png("red")}, data=body)
    for image in (png("red"), tmp_path / "red.png", str(tmp_path / "red.png")):
        _compare(opened_index.search("circle", image=image, crop=crop), answer)


def _compare(results: Any, answer: httpx.Response) -> None:
    body = answer.json()
    assert answer.status_code == 200, body
    close(body, [(each["id"], each["score"]) for each in results["results"]])
    own, scores = {"took_ms", "cached", "results"}, {"score", "text_score", "rerank_score", "explanation"}
    for one, other in zip(results["results"], body["results"], strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k not in scores} == {k: v for k, v in other.items() if k not in scores}
    assert {k: v for k, v in results.items() if k not in own} == {k: v for k, v in body.items() if k not in own}


def test_wrong_options_and_images_are_errors_that_name_them(opened_index: Index, tmp_path: Path) -> None:
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
    with pytest.raises(InvalidQueryError, match=r"limit: unknown option; there are: .*, k, "):
        opened_index.search("red", limit=3)
    with pytest.raises(ItemNotFoundError):
        opened_index.search(more_like=["nothing"])
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        opened_index.search(image=tmp_path / "none.png")
    with pytest.raises(ImageError):
        opened_index.search(image=b"no image")
