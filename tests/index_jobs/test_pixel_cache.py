"""The cache of decoded images: hits, misses, and failures that cost only time."""

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.images import ImageSource
from dcar_core.images.workers import Decoded
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import DcarError
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.gallery.storage import ImageLocation
from index_jobs.store.versions import open_current
from tests.support.encoding import encode, vectors_of
from tests.support.versions import Build

OPTIONS: dict[str, Any] = {"workers": 0, "max_failed": 0.5}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images that this process decodes."""
    calls: list[int] = []
    whole = Preprocess.__call__

    def counting(self: Preprocess, source: ImageSource) -> np.ndarray:
        calls.append(1)
        return whole(self, source)

    monkeypatch.setattr(Preprocess, "__call__", counting)
    return calls


def test_image_is_decoded_once(
    gallery: Path, encoder: Encoder, other_checkpoint: Path, tmp_path: Path, decoded: list[int]
) -> None:
    broken = gallery / "circle" / "blue.png"
    broken.write_bytes(broken.read_bytes()[:60])
    cache = PixelCache(tmp_path / "cache", encoder.preprocess)
    plain = encode(gallery, encoder, tmp_path / "a", **OPTIONS)
    assert len(decoded) == 24
    first = encode(gallery, encoder, tmp_path / "b", cache, **OPTIONS)
    assert len(decoded) == 48
    again = encode(gallery, encoder, tmp_path / "c", cache, **OPTIONS)
    assert len(decoded) == 49  # a failure is not kept
    retrained = Encoder.load(other_checkpoint, device="cpu")
    other = encode(gallery, retrained, tmp_path / "d", PixelCache(tmp_path / "cache", retrained.preprocess), **OPTIONS)
    assert len(decoded) == 50
    np.testing.assert_array_equal(vectors_of(first), vectors_of(plain))
    np.testing.assert_array_equal(vectors_of(again), vectors_of(plain))
    assert again.images["size"].tolist() == [[48, 48]] * 23
    np.testing.assert_array_equal(vectors_of(other), vectors_of(encode(gallery, retrained, tmp_path / "e", **OPTIONS)))
    assert plain.failed == first.failed == again.failed


def test_another_preprocessing_has_its_own_cache(
    gallery: Path, encoder: Encoder, tiny_checkpoint: Path, tmp_path: Path, decoded: list[int]
) -> None:
    exact = Encoder.load(tiny_checkpoint, device="cpu", exact=True)
    for model, work in ((encoder, "a"), (exact, "b")):
        encode(gallery, model, tmp_path / work, PixelCache(tmp_path / "cache", model.preprocess), **OPTIONS)
    assert len(decoded) == 48
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 2


@pytest.mark.slow
def test_worker_processes_share_the_cache(gallery: Path, encoder: Encoder, tmp_path: Path, decoded: list[int]) -> None:
    cache = PixelCache(tmp_path / "cache", encoder.preprocess)
    first = encode(gallery, encoder, tmp_path / "a", cache, workers=2)
    assert decoded == []  # the workers did it
    again = encode(gallery, encoder, tmp_path / "b", cache, **OPTIONS)
    assert decoded == []
    np.testing.assert_array_equal(vectors_of(first), vectors_of(again))


def test_entry_of_the_wrong_length_is_decoded_again(
    gallery: Path, encoder: Encoder, tmp_path: Path, decoded: list[int]
) -> None:
    cache = PixelCache(tmp_path / "cache", encoder.preprocess)
    encode(gallery, encoder, tmp_path / "a", cache, **OPTIONS)
    with closing(sqlite3.connect(cache.path)) as connection, connection:
        connection.execute("UPDATE pixels SET value = x'00' WHERE rowid = 1")
    assert len(encode(gallery, encoder, tmp_path / "b", cache, **OPTIONS)) == 24
    assert len(decoded) == 25


def test_damaged_cache_is_bypassed_with_a_warning(
    gallery: Path, encoder: Encoder, tmp_path: Path, decoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    cache = PixelCache(tmp_path / "cache", encoder.preprocess)
    with sqlite3.connect(cache.path) as connection:
        connection.execute("DROP TABLE pixels")
    connection.close()
    assert len(encode(gallery, encoder, tmp_path / "a", cache, **OPTIONS)) == 24
    assert len(decoded) == 24
    assert "cannot be read (no such table: pixels); images are decoded instead" in caplog.text
    assert "cannot be written" in caplog.text


def test_unusable_cache_is_an_error_before_encoding(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DcarError, match=r"the pixel cache .* cannot be used"):
        PixelCache(tmp_path / "file", encoder.preprocess)
    cache = PixelCache(tmp_path / "cache", encoder.preprocess)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(DcarError, match=r"file is not a database; delete it or name another"):
        PixelCache(tmp_path / "cache", encoder.preprocess)
    assert cache.path.exists()


def test_rebuild_uses_the_cache_and_lists_duplicates(
    build: Build, gallery: Path, tmp_path: Path, decoded: list[int]
) -> None:
    shutil.copy(gallery / "circle" / "red.png", gallery / "circle" / "zz again.png")
    settings = {"pixel_cache": tmp_path / "cache", "workers": 0}
    summary = build(gallery, out=tmp_path / "a", **settings)
    assert len(decoded) == 25
    build(gallery, out=tmp_path / "b", **settings)
    assert len(decoded) == 25
    assert summary.duplicates == 1
    artifact = open_current(tmp_path / "a")
    (line,) = (artifact.path / "duplicates.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["name"], found["same_as"]["name"]) == ("circle/zz again.png", "circle/red.png")
    assert artifact.row_of(found["same_as"]["id"]) == 5


def test_exact_pixels_make_a_new_version(build: Build, tmp_path: Path) -> None:
    def run(exact: bool) -> tuple[int, bool, int]:
        summary = build(exact=exact)
        return summary.version, open_current(tmp_path / "index").manifest.spec.exact, summary.encoded

    assert [run(False), run(True), run(True)] == [(1, False, 24), (2, True, 24), (2, True, 0)]
    assert run(False) == (3, False, 24), "vectors of exact pixels are not those of others"


def test_image_of_another_place_or_version_is_not_cached(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path, Preprocess(2, (0.5,) * 3, (0.5,) * 3))
    place, pixel = ImageLocation(0, "a.tar", 512, 100, 7), np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    cache.put("/root", {place: Decoded(pixel, 40, 30)})
    found = cache.get("/root", [replace(place, row=5)])[5]
    np.testing.assert_array_equal(found.result, pixel)
    assert found[1:] == (40, 30)
    for other in ({"location": "b.tar"}, {"offset": 0}, {"size": 99}, {"version": 8}):
        assert cache.get("/root", [replace(place, **other)]) == {}
    assert cache.get("/elsewhere", [place]) == {}
