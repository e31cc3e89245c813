"""Kinds of failures in shards: broken images and failed reads."""

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar_core.images import open_image
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import ImageError, ImageFault
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.encoding_state import any_readable
from index_jobs.encoding.shards import FailedImage, ShardStore
from index_jobs.gallery import storage
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import ImageLocation

PREPROCESS = Preprocess(1, (0.5,) * 3, (0.5,) * 3)


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"no picture", encoded("PNG")[:300], encoded("JPEG")[:300], encoded("GIF")[:40]])
def test_files_that_are_no_images_fail_permanently(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(data)
    assert not caught.value.fault.is_temporary


def test_images_that_are_too_large_fail_permanently() -> None:
    with pytest.raises(ImageError) as caught:
        open_image(encoded("PNG"), max_pixels=100)
    assert not caught.value.fault.is_temporary


def cut(path: Path) -> ImageLocation:
    path.write_bytes(b"x" * 10)
    return ImageLocation(0, path.name, 5, 20)


def folder(path: Path) -> ImageLocation:
    path.mkdir()
    return ImageLocation(0, path.name, -1, 0)


@pytest.mark.parametrize(
    "made",
    [
        lambda path: ImageLocation(0, path.name, -1, 0),
        cut,
        folder,
        lambda path: ImageLocation(0, f"file://{path}", -1, 0),
    ],
)
def test_unreadable_files_fail_temporarily(made: Callable[[Path], ImageLocation], tmp_path: Path) -> None:
    windows = iter([[made(tmp_path / "picture.png")]])
    ((decoded),) = decode_windows(str(tmp_path), windows, PREPROCESS, 0)
    (failure,) = decoded.failed
    assert failure.fault.is_temporary


@pytest.mark.parametrize("form", ["file", "member", "listed"])
def test_a_huge_file_is_one_failed_image_and_is_not_read(form: str, tmp_path: Path) -> None:
    huge, size = tmp_path / "huge.jpg", 2**40
    with huge.open("wb") as file:
        file.truncate(size)  # sparse
    (tmp_path / "good.png").write_bytes(encoded("PNG"))
    place = {
        "file": ImageLocation(0, huge.name, -1, 0),
        "member": ImageLocation(0, huge.name, 512, size - 1024),
        "listed": ImageLocation(0, "http://127.0.0.1:9/huge.jpg", -1, size),
    }[form]
    windows = iter([[place, ImageLocation(1, "good.png", -1, 0)]])
    (decoded,) = decode_windows(str(tmp_path), windows, PREPROCESS, 0)
    assert decoded.failed == (FailedImage(0, "a file of more than 1 GiB", ImageFault.TOO_LARGE),)
    assert len(decoded.pixels) == 1


def test_a_file_beyond_the_memory_is_a_failed_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MAX_BYTES", 2**62)
    with (tmp_path / "huge.jpg").open("wb") as file:
        try:
            file.truncate(2**50)  # sparse, and more than a process can address
        except OSError:
            pytest.skip("this file system has no files of that size")
    windows = iter([[ImageLocation(0, "huge.jpg", -1, 0)]])
    (decoded,) = decode_windows(str(tmp_path), windows, PREPROCESS, 0)
    assert decoded.failed == (FailedImage(0, "too little memory to read it", ImageFault.UNREADABLE),)


def test_reopened_shard_counts_as_incomplete(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, image_key="f", runtime="torch", pixels={}, signature="s", count=3, dim=2, batch=2,
                       rows=2)  # fmt: skip
    one, size = np.zeros(1, np.uint64), np.array([[40, 30]], np.int32)
    store.save(0, np.zeros((1, 2), np.float32), [FailedImage(1, "no such file", ImageFault.MISSING)], one, one, size)
    store.save(1, np.zeros((1, 2), np.float32), [], one, one, size)
    shard = store.load(0)
    assert shard is not None
    assert shard.unread == [1]
    assert shard.sizes.tolist() == [[40, 30]]
    assert shard.failed == (FailedImage(1, "no such file", ImageFault.MISSING),)
    store.reopen(0)
    assert store.load(0) is None
    assert store.load(1) is not None
    assert store.stored_rows() == 1


def missing(*rows: int) -> list[FailedImage]:
    return [FailedImage(row, "no such file", ImageFault.MISSING) for row in rows]


def test_one_readable_image_is_enough(tiny_gallery: Path, tmp_path: Path) -> None:
    gallery = scan(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    for row, left in ((0, True), (1, False)):
        (tmp_path / "gallery" / gallery.table["name"][row].as_py()).unlink()
        assert any_readable(gallery, missing(0, 1), time.monotonic() + 60) == left


def test_a_file_that_was_no_image_must_be_decoded_to_count_as_readable(tiny_gallery: Path, tmp_path: Path) -> None:
    gallery = scan(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    path = tmp_path / "gallery" / gallery.table["name"][0].as_py()
    failed, whole = FailedImage(0, "", ImageFault.BROKEN), path.read_bytes()
    for data in (whole[:-30], b"<html>back in 5 minutes</html>"):
        path.write_bytes(data)
        assert any_readable(gallery, missing(0), time.monotonic() + 60)
        assert not any_readable(gallery, [failed], time.monotonic() + 60)
    path.write_bytes(whole)
    assert any_readable(gallery, [failed], time.monotonic() + 60)


def test_probing_for_readable_images_is_limited_in_time(tiny_gallery: Path) -> None:
    """A silent host costs its time-out for each request."""
    gallery = scan(tiny_gallery)
    assert any_readable(gallery, missing(0, 1), time.monotonic() + 60)
    assert not any_readable(gallery, missing(0, 1), time.monotonic())


def test_failures_of_older_shards_are_retried_and_sizes_unknown(tmp_path: Path) -> None:
    """Older shards say the reason of a failure alone, and no sizes."""
    store = ShardStore(tmp_path, image_key="f", runtime="torch", pixels={}, signature="s", count=2, dim=2, batch=2,
                       rows=2)  # fmt: skip
    one, size = np.zeros(1, np.uint64), np.array([[40, 30]], np.int32)
    failure = FailedImage(1, "not an image", ImageFault.NOT_AN_IMAGE)
    store.save(0, np.zeros((1, 2), np.float32), [failure], one, one, size)
    note = store.path / "000000.json"
    values = json.loads(note.read_text())
    del values["sizes"]
    values["failed"] = [failure[:2] for failure in values["failed"]]
    note.write_text(json.dumps(values))
    shard = store.load(0)
    assert shard is not None
    assert shard.unread == [1]
    assert shard.sizes.tolist() == [[0, 0]]
