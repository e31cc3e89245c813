"""What the search page needs beside the API: thumbnails, the gallery in an order, familiar words."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.core.thumbnail_cache import ThumbnailCache
from index_jobs.rebuild import rebuild
from tests.support.service import ALICE, KEYS, ODD_ID, ServiceClient, bearer, opened

PNG = b"\x89PNG\r\n\x1a\n"
WEBP = {"Accept": "image/avif,image/webp,*/*"}


def photo(path: Path, mode: str = "RGB", **options: Any) -> None:
    """Save a photo of 12 megapixels. As in nature, finer details have less contrast."""
    image = Image.new("L", (4000, 3000))
    for width, share in ((8, 1.0), (32, 0.5), (128, 0.35), (512, 0.2), (2000, 0.1)):
        octave = Image.effect_noise((width, width * 3 // 4), 90).resize(image.size, Image.Resampling.BICUBIC)
        image = Image.blend(image, octave, share)
    Image.merge("RGB", [image, image.transpose(Image.Transpose.ROTATE_180), image]).convert(mode).save(path, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """An index of photos as phones, scanners and printers make them, with prices."""
    gallery = tmp_path_factory.mktemp("photos") / "gallery"
    gallery.mkdir()
    upright = Image.Exif()
    upright[274] = 6  # the camera was turned
    photo(gallery / "phone.jpg", quality=92, exif=upright)
    photo(gallery / "print.jpg", "CMYK", quality=90)
    photo(gallery / "scan.tif", compression="tiff_deflate")
    (gallery / "metadata.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"file_name": "phone.jpg", "caption": "a blue lamp", "category": "lamps", "price": 30},
                {"file_name": "print.jpg", "caption": "Éclair", "category": "cakes", "price": 4},
                {"file_name": "scan.tif", "caption": "赤いりんご", "category": "cakes"},
            )
        )
    )
    rebuild(gallery, tiny_checkpoint, gallery.parent / "index", workers=0, progress=False)
    return gallery.parent / "index"


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Any]:
    return {"thumbnail_cache": tmp_path / "thumbnails"}


async def ids(client: ServiceClient, **query: Any) -> list[str]:
    response = await client.get("/browse", params=query)
    assert response.status_code == 200, response.text
    return [Path(item["metadata"]["file_name"]).stem for item in response.json()["items"]]


async def item_id(client: ServiceClient, name: str) -> str:
    items = (await client.get("/items")).json()["items"]
    return next(item["id"] for item in items if item["metadata"]["file_name"] == name)


async def test_thumbnails_are_small_and_upright(photos: Path, cache: dict[str, Any]) -> None:
    async with opened(photos, **cache) as client:
        for name, size in (("phone.jpg", (288, 384)), ("print.jpg", (384, 288)), ("scan.tif", (384, 288))):
            url = f"/items/{await item_id(client, name)}/image?size=384"
            response = await client.get(url, headers=WEBP)
            assert response.headers["content-type"] == "image/webp"
            assert "accept" in response.headers["vary"].lower()
            image = Image.open(io.BytesIO(response.content))
            assert (image.size, image.mode) == (size, "RGB"), name
            assert len(response.content) < 1_000_000 / 24, "24 photos take less than 1 MB"
            fallback = await client.get(url)
            assert fallback.headers["content-type"] == "image/jpeg"
            assert fallback.headers["etag"] != response.headers["etag"]
            again = await client.get(url, headers={**WEBP, "If-None-Match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")


async def test_small_drawings_are_sent_as_they_are(built_index: Path, cache: dict[str, Any]) -> None:
    async with opened(built_index, **cache) as client:
        thumbnail = await client.get("/items/circle%2Fred.png/image?size=192", headers=WEBP)
        assert thumbnail.headers["content-type"] == "image/png"
        assert (await client.get("/items/%C3%A9t%C3%A9%20%231%3F%2F100%252F.png/image?size=192")).status_code == 200
        assert ODD_ID


async def test_sizes_are_limited_and_broken_images_are_not_found(
    index: Path, gallery: Path, cache: dict[str, Any]
) -> None:
    async with opened(index, **cache) as client:
        refused = await client.get("/items/circle%2Fred.png/image?size=999")
        assert refused.status_code == 422
        assert "size" in refused.json()["detail"]
        assert (await client.get("/items/unknown/image?size=192")).status_code == 404
        path = gallery / "circle" / "green.png"
        content, times = path.read_bytes(), path.stat()
        try:
            path.write_bytes(content[:60])
            broken = await client.get("/items/circle%2Fgreen.png/image?size=384")
            assert broken.status_code == 404
            path.unlink()
            path.symlink_to("/etc/hostname")
            outside = await client.get("/items/circle%2Fgreen.png/image?size=384")
            assert outside.status_code == 404
        finally:
            path.unlink()
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def test_a_changed_image_gets_a_new_thumbnail(photos: Path, cache: dict[str, Any]) -> None:
    async with opened(photos, **cache) as client:
        url = f"/items/{await item_id(client, 'print.jpg')}/image?size=192"
        first = await client.get(url)
        files = [path for path in cache["thumbnail_cache"].rglob("*") if path.is_file()]
        assert [path.read_bytes() for path in files] == [first.content]
        assert (await client.get(url)).content == first.content
        path = photos.parent / "gallery" / "print.jpg"
        content = path.read_bytes()
        try:
            Image.new("RGB", (900, 600), "red").save(path)
            changed = await client.get(url)
            assert changed.headers["etag"] != first.headers["etag"]
            assert Image.open(io.BytesIO(changed.content)).size == (192, 128)
        finally:
            path.write_bytes(content)


def test_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = ThumbnailCache(tmp_path, 10_000)
    for number in range(9):
        cache.put(f"{number:032}_192.webp", PNG.ljust(1_000))
        os.utime(tmp_path / "00" / f"{number:032}_192.webp", (number, number))
    assert cache.get(f"{0:032}_192.webp") == PNG.ljust(1_000)  # the oldest becomes the newest
    for number in range(9, 12):
        cache.put(f"{number:032}_192.webp", PNG.ljust(1_000))
    kept = {int(path.name[:32]) for path in tmp_path.rglob("*.webp")}
    assert {0, 9, 10, 11} <= kept
    assert not {1, 2} & kept
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.webp")) <= 10_000
    (tmp_path / "00" / f"{11:032}_192.webp").write_bytes(b"damaged")
    assert cache.get(f"{11:032}_192.webp") is None
    cache.put("big", PNG.ljust(9_500))
    assert cache.get("big") is None


def test_cache_without_a_disk_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = ThumbnailCache(tmp_path / "file" / "below", 10_000)
    for name in ("one", "two"):
        cache.put(name, PNG)
        assert cache.get(name) is None
    assert len(caplog.records) == 1, "one warning"
    off = ThumbnailCache(tmp_path / "off", 0)
    off.put("one", PNG)
    assert off.get("one") is None
    assert not (tmp_path / "off").exists()


async def test_browsing_filters_and_sorts(photos: Path) -> None:
    async with opened(photos) as client:
        body = (await client.get("/browse")).json()
        assert body["count"] == 3
        assert body["categories"] == [{"value": "cakes", "count": 2}, {"value": "lamps", "count": 1}]
        assert {"name": "price", "is_number": True} in body["fields"]
        assert await ids(client, sort="price") == ["print", "phone", "scan"], "an item without a price is last"
        assert await ids(client, sort="-price") == ["phone", "print", "scan"]
        assert await ids(client, sort="price", k=1, offset=1) == ["phone"]
        assert await ids(client, sort="caption", category="cakes") == ["print", "scan"]
        for query in ({"sort": "gone"}, {"sort": "attributes"}, {"k": 0}, {"k": 1000}, {"unknown": 1}):
            assert (await client.get("/browse", params=query)).status_code == 422


async def test_words_of_captions_are_familiar(photos: Path) -> None:
    async with opened(photos) as client:
        for text, known in {
            "blue lamps": 1.0,  # singular or plural
            "a lamp with an éclair": 1.0,
            "りんご": 1.0,
            "weinende Katze": 0.0,
            "猫": 0.0,
            "blue gnu": 0.5,
            "a": 1.0,  # no word that says anything
        }.items():
            body = (await client.get("/words", params={"q": text})).json()
            assert body == {"known": known, "strong_score": None}, text


async def test_routes_of_the_page_need_the_key(photos: Path) -> None:
    async with opened(photos, **KEYS) as client:
        paths = ("/browse", "/words?q=red", f"/items/{'x' * 8}/image?size=192")
        for path in paths:
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/browse", headers=bearer(ALICE))).status_code == 200
        documented = (await client.get("/openapi.json")).json()["paths"]
        assert "/browse" not in documented
