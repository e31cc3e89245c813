"""Kinds of failures in shards: broken images and failed reads."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import ImageFault
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.encode import any_readable
from index_jobs.encoding.shards import IMAGE, FailedImage, ShardStore
from index_jobs.gallery import storage
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import ImageLocation
from index_jobs.spec import BuildOptions
from tests.support.images import png

PREPROCESS = Preprocess(1, (0.5,) * 3, (0.5,) * 3)


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
    (tmp_path / "good.png").write_bytes(png())
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


def test_a_shard_lacks_the_rows_that_have_neither_vector_nor_failure(
    encoder: Encoder, tiny_gallery: Path, tmp_path: Path
) -> None:
    store = ShardStore(scan(tiny_gallery), encoder, "torch", tmp_path, BuildOptions(batch_size=20, shard_rows=20))
    assert (len(store), store.load(0).missing, store.load(1).missing) == (2, [*range(20)], [*range(20, 24)])
    images = np.array([(9, 2**63 + 7, 2**64 - 1, (40, 30)), (3, 1, 2, (0, 0))], IMAGE)
    vectors = np.stack([np.full(encoder.dim, row, np.float32) for row in (9, 3)])
    store.extend(0, [(images[:1], vectors[:1])], missing(*range(10, 20)))
    store.extend(0, [(images[1:], vectors[1:])], missing(5))
    shard = store.load(0)
    assert (shard.span, shard.failed) == (range(20), tuple(missing(5, *range(10, 20))))
    assert shard.missing == [0, 1, 2, 4, 6, 7, 8]
    np.testing.assert_array_equal(shard.images, images[::-1])
    np.testing.assert_array_equal(shard.vectors(), vectors[::-1])
    assert store.stored_rows() == 20


def missing(*rows: int) -> list[FailedImage]:
    return [FailedImage(row, "no such file", ImageFault.MISSING) for row in rows]


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
