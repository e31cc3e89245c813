"""What the search page needs beside the API: thumbnails, fields to sort and filter by,
groups.
"""

import io
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from dcar_core.images.workers import Convert, Decoded, DecodeWorker, Limits
from dcar_core.model.backbone import BackboneSource
from dcar_core.model.catalogue import languages_of
from dcar_core.model.checkpoint import save_zero_shot
from index_jobs.index.index_version import IndexVersion
from index_jobs.rebuild import rebuild
from tests.support.files import write_jsonl
from tests.support.images import draw, encoded, exif_of
from tests.support.responses import assert_problem
from tests.support.service import ODD_ID, ServiceClient, opened

WEBP = {"Accept": "image/avif,image/webp,*/*"}


def photo() -> Image.Image:
    """Return a photo of 3 megapixels. As in nature, finer details have less
    contrast.
    """
    image = Image.new("L", (2000, 1500))
    for width, share in (
        (8, 1.0),
        (32, 0.5),
        (128, 0.35),
        (512, 0.2),
        (1000, 0.1),
    ):
        octave = Image.effect_noise((width, width * 3 // 4), 90).resize(
            image.size, Image.Resampling.BICUBIC
        )
        image = Image.blend(image, octave, share)
    return Image.merge(
        "RGB", [image, image.transpose(Image.Transpose.ROTATE_180), image]
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """An index of photos as phones, scanners and printers make them, with prices."""
    gallery = tmp_path_factory.mktemp("photos") / "gallery"
    gallery.mkdir()
    upright = Image.Exif()
    upright[274] = 6  # the camera was turned
    image = photo()
    image.save(gallery / "phone.jpg", quality=92, exif=upright)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("CMYK").save(
        gallery / "print.jpg", quality=90
    )
    image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(
        gallery / "scan.tif", compression="tiff_deflate"
    )
    write_jsonl(
        gallery / "metadata.jsonl",
        {
            "file_name": "phone.jpg",
            "caption": "a blue lamp",
            "category": "lamps",
            "price": 30,
        },
        {
            "file_name": "print.jpg",
            "caption": "Éclair",
            "category": "cakes",
            "price": 4,
        },
        {"file_name": "scan.tif", "caption": "赤いりんご", "category": "cakes"},
    )
    rebuild(
        gallery,
        tiny_checkpoint,
        gallery.parent / "index",
        workers=0,
        progress=False,
    )
    return gallery.parent / "index"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """The module of the function and the file of each job of the decoding processes."""
    run = DecodeWorker.run
    jobs = list[tuple[str, bytes]]()

    def recorded(
        worker: DecodeWorker,
        convert: Convert,
        data: bytes,
        limits: Limits,
    ) -> Decoded:
        jobs.append((getattr(convert, "func", convert).__module__, data))
        return run(worker, convert, data, limits)

    monkeypatch.setattr(DecodeWorker, "run", recorded)
    return jobs


async def item_id(client: ServiceClient, name: str) -> str:
    response = await client.get("/items")
    items = response.json()["items"]
    return next(item["id"] for item in items if item["metadata"]["file_name"] == name)


@pytest.mark.slow
async def test_thumbnails_are_small_and_upright(
    photos: Path, decoded: list[tuple[str, bytes]]
) -> None:
    async with opened(photos) as client:
        for name, size in (
            ("phone.jpg", (288, 384)),
            ("print.jpg", (384, 288)),
            ("scan.tif", (384, 288)),
        ):
            url = f"/items/{await item_id(client, name)}/image?size=384"
            response = await client.get(url, headers=WEBP)
            assert response.headers["content-type"] == "image/webp"
            assert "accept" in response.headers["vary"].lower()
            image = Image.open(io.BytesIO(response.content))
            assert (image.size, image.mode) == (size, "RGB"), name
            assert len(response.content) < 1_000_000 / 24, (
                "24 photos take less than 1 MB"
            )
            fallback = await client.get(url)
            assert fallback.status_code == 200, fallback.text
            assert fallback.headers["content-type"] == "image/jpeg"
            assert fallback.headers["etag"] != response.headers["etag"]
            again = await client.get(
                url, headers={**WEBP, "If-None-Match": response.headers["etag"]}
            )
            assert again.status_code == 304
            assert again.content == b""
    assert decoded
    assert not [name for name, _ in decoded if name.startswith("app.")], (
        "a decoding process would import the service"
    )


async def test_heic_photos_are_searched_and_shown(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "gallery").mkdir()
    for color in ("red", "blue"):
        path = tmp_path / "gallery" / f"{color}.heic"
        Image.new("RGB", (400, 300), color).save(path, quality=90)
    rebuild(
        tmp_path / "gallery",
        tiny_checkpoint,
        tmp_path / "index",
        workers=0,
        progress=False,
    )
    async with opened(tmp_path / "index") as client:
        files = {"file": ("photo.heic", path.read_bytes(), "image/heic")}
        found = await client.post(
            "/search/image",
            files=files,
            data={"fields": "file_name"},
        )
        best = found.json()["results"][0]
        assert best["metadata"]["file_name"] == "blue.heic"
        assert best["score"] > 0.999
        for headers, kind in ((WEBP, "webp"), ({}, "jpeg")):
            thumbnail = await client.get(
                f"{best['image_url']}?size=192", headers=headers
            )
            assert thumbnail.status_code == 200, thumbnail.text
            assert thumbnail.headers["content-type"] == f"image/{kind}"
            image = Image.open(io.BytesIO(thumbnail.content)).convert("RGB")
            assert image.size == (192, 144)
            red, _, blue = np.asarray(image)[72, 96]
            assert blue > 200 > 60 > red


@pytest.mark.slow
async def test_cmyk_and_tiff_are_query_images_where_they_are_allowed(
    photos: Path,
) -> None:
    gallery = photos.parent / "gallery"
    async with opened(photos) as client:
        files = {"file": (gallery / "print.jpg").read_bytes()}
        response = await client.post("/search/image", files=files)
        best = response.json()["results"][0]
        assert best["caption"] == "Éclair"
        assert best["score"] > 0.999
        scan = {"file": encoded(Image.new("RGB", (40, 40), "red"), "TIFF")}
        refused = await client.post("/search/image", files=scan)
        assert refused.status_code == 422
        assert "tiff" in refused.json()["detail"].lower()
    async with opened(photos, image_formats=("tiff",)) as client:
        response = await client.post("/search/image", files=scan)
        assert response.status_code == 200


async def test_small_drawings_are_sent_as_they_are(started: ServiceClient) -> None:
    thumbnail = await started.get(
        "/items/circle%2Fred.png/image?size=192", headers=WEBP
    )
    assert thumbnail.status_code == 200, thumbnail.text
    assert thumbnail.headers["content-type"] == "image/png"
    response = await started.get(f"/items/{quote(ODD_ID, safe='')}/image?size=192")
    assert response.status_code == 200
    assert_problem(
        await started.get("/items/circle%2Fred.png/image?size=999"),
        422,
        "size",
    )
    assert_problem(await started.get("/items/unknown/image?size=192"), 404, "id")


async def test_a_changed_image_gets_a_new_thumbnail(
    photos: Path, decoded: list[tuple[str, bytes]]
) -> None:
    path = photos.parent / "gallery" / "print.jpg"
    content = path.read_bytes()
    async with opened(photos) as client:
        url = f"/items/{await item_id(client, 'print.jpg')}/image?size=192"
        first = await client.get(url)
        response = await client.get(url)
        assert response.content == first.content
        assert [data for _, data in decoded] == [content], "it is made once"
        try:
            Image.new("RGB", (900, 600), "red").save(path)
            changed = await client.get(url)
            assert changed.headers["etag"] != first.headers["etag"]
            assert Image.open(io.BytesIO(changed.content)).size == (192, 128)
        finally:
            path.write_bytes(content)


async def test_columns_are_not_read_in_the_event_loop(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list[str]()
    column = IndexVersion.column

    def in_thread(opened: IndexVersion, name: str, *rows: Any) -> Any:
        names.append(name)
        assert threading.current_thread() is not threading.main_thread()
        return column(opened, name, *rows)

    monkeypatch.setattr(IndexVersion, "column", in_thread)
    for path in ("/items?sort=price", "/ui/catalogue"):
        async with opened(photos) as client:
            response = await client.get(path)
            body = response.json()
    assert {"name": "price", "is_number": True} in body["fields"]
    assert names == ["price"]


async def test_pictures_are_sorted_and_filtered_by_when_they_were_taken(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (gallery := tmp_path / "gallery").mkdir()
    for number, year in enumerate((2023, 2024, 2024, 2022)):
        exif = exif_of(f"{year}:07:0{number + 1} 10:20:30")
        draw("red", "circle", 48 + number).save(gallery / f"{number}.jpg", exif=exif)
    draw("red", "circle").save(gallery / "none.jpg")
    # it wins
    write_jsonl(
        gallery / "metadata.jsonl",
        {"file_name": "3.jpg", "taken": "2023-01-31T00:00:00"},
    )
    rebuild(gallery, tiny_checkpoint, tmp_path / "index", workers=1, progress=False)
    async with opened(tmp_path / "index") as client:
        response = await client.get("/items", params={"sort": "-taken"})
        items = response.json()["items"]
        assert [item["metadata"].get("taken") for item in items] == [
            "2024-07-03T10:20:30",
            "2024-07-02T10:20:30",
            "2023-07-01T10:20:30",
            "2023-01-31T00:00:00",
            None,
        ]
        years = [
            {"value": {"gte": f"{year}", "lt": f"{year + 1}"}, "count": 2}
            for year in (2024, 2023)
        ]
        response = await client.get("/ui/facets")
        assert response.json()["facets"] == [{"name": "taken", "values": years}]
        filter = json.dumps({"taken": years[1]["value"]})
        response = await client.get("/items", params={"filter": filter})
        assert response.json()["count"] == 2


async def test_facets_are_fields_that_few_values_divide(started: ServiceClient) -> None:
    async def counted(**filter: str) -> dict[str, dict[str, int]]:
        response = await started.get(
            "/ui/facets", params={"filter": json.dumps(filter)}
        )
        assert response.status_code == 200, response.text
        facets = response.json()["facets"]
        return {
            facet["name"]: {value["value"]: value["count"] for value in facet["values"]}
            for facet in facets
        }

    everything = await counted()
    assert list(everything) == [
        "category",
        "color",
    ], "no field whose values are all different"
    assert set(everything["category"].values()) == {6}
    assert set(everything["color"].values()) == {4}
    red = await counted(color="red")
    assert red["color"] == everything["color"], (
        "another value of the same field can be chosen"
    )
    assert set(red["category"].values()) == {1}
    for wrong in ("{", '{"brand": "x"}', "[1]"):
        assert (
            await started.get("/ui/facets", params={"filter": wrong})
        ).status_code == 422


async def test_gallery_shows_each_group_once(products: Path) -> None:
    async with opened(products) as client:
        response = await client.get("/items", params={"sort": "caption", "k": 4})
        body = response.json()
        assert body["count"] == 6
        assert body["next_offset"] == 4
        assert [item["caption"] for item in body["items"]][:2] == [
            "a black circle",
            "a blue circle",
        ]
        assert body["items"][0]["group"] == {"value": "black", "count": 4}
        some = {"filter": json.dumps({"category": ["cross", "square"]})}
        assert {
            item["group"]["count"]
            for item in (await client.get("/items", params=some)).json()["items"]
        } == {2}
        response = await client.get("/ui/facets")
        facets = response.json()["facets"]
        assert [
            (each["name"], {value["count"] for value in each["values"]})
            for each in facets
        ] == [("category", {6})]
        response = await client.get("/ui/catalogue")
        about = response.json()
        assert (
            about
            | {
                "group_field": "color",
                "has_words": True,
                "hybrid_by_default": True,
                "max_k": 200,
            }
            == about
        )


async def test_what_a_model_knows_is_told(
    tiny_model: Path,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    note = "This model knows emoji, not photos."
    save_zero_shot(BackboneSource(str(tiny_model)), tmp_path / "checkpoint", note)
    rebuild(
        tiny_gallery,
        tmp_path / "checkpoint",
        tmp_path / "index",
        workers=0,
        progress=False,
    )
    async with opened(tmp_path / "index") as client:
        response = await client.get("/ui/catalogue")
        about = response.json()
        assert (about["model_note"], about["languages"]) == (
            note,
            "",
        ), "a model of a directory"
        response = await client.get("/readyz")
        assert response.json()["model_note"] == note
    names = [
        "ViT-B-32-quickgelu",
        "xlm-roberta-base-ViT-B-32",
        "hf-hub:timm/ViT-B-16-SigLIP",
    ]
    assert [languages_of(name) for name in names] == ["English", "many", ""]
