"""Images as queries: with a part of the image (`crop`), and in a batch."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.images import encoded
from tests.support.responses import assert_problem
from tests.support.service import ServiceClient, opened

LEFT = {"x": 0, "y": 0, "width": 0.5, "height": 1}


def two_halves() -> Image.Image:
    image = Image.new("RGB", (80, 40), "blue")
    image.paste("red", (0, 0, 40, 40))
    return image


async def test_a_crop_is_searched_like_the_part_alone(built_index: Path) -> None:
    whole, half = encoded(two_halves()), encoded(Image.new("RGB", (40, 40), "red"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: the upper half is the left one of the stored file
    turned = encoded(two_halves().transpose(Image.Transpose.ROTATE_90), exif=exif)
    async with opened(built_index) as client:

        async def scores(data: bytes, crop: dict[str, Any] | None = None) -> Any:
            form = {"k": "24"} if crop is None else {"k": "24", "crop": json.dumps(crop)}
            return (await client.post("/search/image", files={"file": data}, data=form)).json()

        part = (await scores(half))["results"]
        cropped = await scores(whole, LEFT)
        assert (cropped["results"], cropped["cached"]) == (part, False)
        assert (await scores(whole, LEFT))["cached"]
        assert (await scores(turned, LEFT))["results"] == part
        assert (await scores(whole))["results"] != part, "the whole image has a key of its own"
        assert (await scores(whole, {"x": 0.1, "y": 0.2, "width": 1e-9, "height": 1e-9}))["results"], "one pixel"


@pytest.mark.parametrize(
    ("crop", "field"),
    [
        ({"x": 0.6, "y": 0, "width": 0.5, "height": 1}, "crop"),
        ({"x": 0, "y": 0, "width": 0, "height": 1}, "crop.width"),
        ({"x": -0.1, "y": 0, "width": 0.5, "height": 1}, "crop.x"),
        ({"x": "0", "y": 0, "width": 0.5, "height": 1}, "crop.x"),
        ({"x": 0, "y": 0, "width": 0.5}, "crop.height"),
        ({**LEFT, "z": 1}, "crop.z"),
        ([0, 0, 1, 1], "crop"),
        ("left", "crop"),
    ],
)
async def test_an_invalid_crop_is_refused_by_name(started: ServiceClient, crop: Any, field: str) -> None:
    files = {"file": encoded(two_halves())}
    assert_problem(await started.post("/search/image", files=files, data={"crop": json.dumps(crop)}), 422, field)


async def test_a_batch_searches_with_texts_and_images(started: ServiceClient) -> None:
    image = base64.b64encode(encoded(two_halves())).decode()
    queries: list[dict[str, Any]] = [
        {"query": "red", "k": 5},
        {"image": image, "k": 5},
        {"image": f"data:image/png;base64,{image}", "query": "circle", "crop": LEFT, "k": 5},
    ]
    answers = (await started.post("/search/batch", json={"queries": queries})).json()["answers"]
    text = await started.post("/search/text", json=queries[0])
    file = {"file": encoded(two_halves())}
    whole = await started.post("/search/image", files=file, data={"k": "5"})
    both = await started.post("/search/image", files=file, data={"k": "5", "query": "circle", "crop": json.dumps(LEFT)})
    for answer, alone in zip(answers, (text, whole, both), strict=True):
        assert [each["id"] for each in answer["results"]] == [each["id"] for each in alone.json()["results"]]


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ({"image": "no base64!"}, 422, "queries.1.image"),
        ({"image": base64.b64encode(b"no image").decode()}, 422, "queries.1.image"),
        ({"image": base64.b64encode(bytes(20_001)).decode()}, 413, "queries.1.image"),
        ({"image": ""}, 422, "queries.1.image"),
        ({"image": None}, 422, "queries.1.query"),
    ],
)
async def test_an_invalid_image_of_a_batch_is_refused_by_name(
    started: ServiceClient, query: dict[str, Any], status: int, field: str
) -> None:
    response = await started.post("/search/batch", json={"queries": [{"query": "red"}, query]})
    assert_problem(response, status, field)
