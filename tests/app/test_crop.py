"""`crop`: a search with a part of the query image."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.responses import assert_problem
from tests.support.service import opened

LEFT = {"x": 0, "y": 0, "width": 0.5, "height": 1}


def file_of(image: Image.Image, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def two_halves() -> Image.Image:
    image = Image.new("RGB", (80, 40), "blue")
    image.paste("red", (0, 0, 40, 40))
    return image


async def test_a_crop_is_searched_like_the_part_alone(built_index: Path) -> None:
    whole, half = file_of(two_halves()), file_of(Image.new("RGB", (40, 40), "red"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: the upper half is the left one of the stored file
    turned = file_of(two_halves().transpose(Image.Transpose.ROTATE_90), exif=exif)
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
async def test_an_invalid_crop_is_refused_by_name(built_index: Path, crop: Any, field: str) -> None:
    async with opened(built_index) as client:
        files = {"file": file_of(two_halves())}
        assert_problem(await client.post("/search/image", files=files, data={"crop": json.dumps(crop)}), 422, field)


async def test_a_crop_needs_an_image(built_index: Path) -> None:
    async with opened(built_index) as client:
        assert_problem(await client.post("/search/text", json={"query": "red", "crop": LEFT}), 422, "crop")
