"""`Index`, the engine in this process: it searches as the service does."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.search import Index
from app.search.errors import InvalidQueryError, ItemNotFoundError
from dcar_core.util.errors import ImageError
from tests.support.images import png
from tests.support.searches import close
from tests.support.service import opened


async def test_index_answers_as_the_service_does(reranking_index: Path, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    options, crop = {"query": "a red square", "rerank": True}, {"x": 0, "y": 0, "width": 0.5, "height": 1}
    async with opened(reranking_index) as client:
        reranked = await client.post("/search/text", json=options)
        form = {"query": "circle", "crop": json.dumps(crop)}
        cropped = await client.post("/search/image", files={"file": png("red")}, data=form)
    index = Index.open(reranking_index, device="cpu")
    answers: list[tuple[Any, httpx.Response]] = [(index.search(**options), reranked)]
    for image in (png("red"), tmp_path / "red.png", str(tmp_path / "red.png")):
        answers.append((index.search("circle", image=image, crop=crop), cropped))
    own, scores = {"took_ms", "cached", "results"}, {"score", "text_score", "rerank_score", "explanation"}
    for found, answer in answers:
        body = answer.json()
        close(body, [(each["id"], each["score"]) for each in found["results"]])
        for one, other in zip(found["results"], body["results"], strict=True):
            assert one.keys() == other.keys()
            assert {k: one[k] for k in one.keys() - scores} == {k: other[k] for k in other.keys() - scores}
        assert {k: found[k] for k in found.keys() - own} == {k: body[k] for k in body.keys() - own}


def test_wrong_options_and_images_are_errors_that_name_them(built_index: Path, tmp_path: Path) -> None:
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
    with pytest.raises(InvalidQueryError, match=r"limit: unknown option; there are: .*, k, "):
        opened_index.search("red", limit=3)
    with pytest.raises(ItemNotFoundError):
        opened_index.search(more_like=["nothing"])
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        opened_index.search(image=tmp_path / "none.png")
    with pytest.raises(ImageError):
        opened_index.search(image=b"no image")
