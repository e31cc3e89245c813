"""Encoding with a real model: order, failures and their kinds, resuming, corrupted shards."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dcar_core import Encoder
from dcar_core.model.preprocess import Preprocess
from dcar_core.runtimes.graphs import TorchRuntime
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, DataError, ImageFault
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.encode import EncodedGallery
from index_jobs.encoding.shards import IMAGE, FailedImage, ShardStore
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import ImageLocation
from index_jobs.spec import BuildOptions
from tests.support.conversions import CrashOfWidth49
from tests.support.encoding import cut, encode, flip, vectors_of
from tests.support.images import png
from tests.support.processes import children_of


class Counting(Encoder):
    """A real encoder that counts its forward passes and can fail in one."""

    def __init__(self, encoder: Encoder, die_at: int | None = None) -> None:
        super().__init__(encoder.state, encoder.model, encoder.runtime)
        self.die_at, self.calls = die_at, 0

    def image_features(self, pixels: NDArray[np.uint8]) -> Floats:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        return super().image_features(pixels)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_vectors_are_the_encoders_own_in_gallery_order(
    encoder: Encoder, tiny_gallery: Path, tmp_path: Path, workers: int
) -> None:
    encoded = encode(tiny_gallery, encoder, tmp_path, workers=workers, batch_size=5, shard_rows=10)
    paths = [tiny_gallery / name for name in scan(tiny_gallery).table["name"].to_pylist()]
    np.testing.assert_allclose(vectors_of(encoded), encoder.encode_images(paths), atol=1e-5)
    np.testing.assert_array_equal(encoded.rows(), np.arange(24))
    assert [len(shard.vectors()) for shard in encoded.shards] == [10, 10, 4]
    assert (encoded.encoded, encoded.resumed, encoded.failed) == (24, 0, [])


def test_interrupted_run_goes_on_to_the_same_bits(encoder: Encoder, tiny_gallery: Path, tmp_path: Path) -> None:
    def run(model: Counting, work: str) -> EncodedGallery:
        return encode(tiny_gallery, model, tmp_path / work, workers=0)

    undisturbed = run(Counting(encoder), "a")
    with pytest.raises(KeyboardInterrupt):
        run(Counting(encoder, die_at=4), "b")
    second = Counting(encoder)
    resumed = run(second, "b")
    assert (resumed.resumed, resumed.encoded, second.calls) == (8, 16, 4)
    np.testing.assert_array_equal(vectors_of(resumed), vectors_of(undisturbed))
    third = Counting(encoder)
    assert run(third, "b").resumed == 24
    assert third.calls == 0


class Rounding(TorchRuntime):
    """Stands for another runtime, whose vectors differ in their last digits."""

    def image(self, pixels: Pixels, inputs: tuple[Floats, ...]) -> Floats:
        return super().image(pixels, inputs).astype(np.float16).astype(np.float32)


def test_vectors_of_two_runtimes_never_mix(encoder: Encoder, tiny_gallery: Path, tmp_path: Path) -> None:
    runtime = Rounding(encoder.model)
    runtime.name = "rounding"
    other = Encoder(encoder.state, encoder.model, runtime)

    def run(model: Counting, work: str) -> EncodedGallery:
        return encode(tiny_gallery, model, tmp_path / work)

    with pytest.raises(KeyboardInterrupt):
        run(Counting(encoder, die_at=4), "a")
    resumed = run(Counting(other), "a")
    assert resumed.resumed == 0
    alone = vectors_of(run(Counting(other), "b"))
    np.testing.assert_array_equal(vectors_of(resumed), alone)
    assert (alone != vectors_of(run(Counting(encoder), "c"))).any(1).all()  # or the test shows nothing
    assert run(Counting(encoder), "a").resumed == 8  # nothing that was made is lost either


def test_broken_images_are_listed_and_the_others_keep_their_rows(
    encoder: Encoder, gallery: Path, tmp_path: Path
) -> None:
    whole = encode(gallery, encoder, tmp_path / "a")
    broken = {"circle/black.png": b"", "square/blue.png": b"this is no picture"}
    broken["cross/red.png"] = (gallery / "cross/red.png").read_bytes()[:60]
    for name, content in broken.items():
        (gallery / name).write_bytes(content)
    encoded = encode(gallery, encoder, tmp_path / "b", max_failed=0.2)
    names = scan(gallery).table["name"].to_pylist()
    assert {names[failure.row] for failure in encoded.failed} == set(broken)
    assert all(failure.reason for failure in encoded.failed)
    expected = [row for row, name in enumerate(names) if name not in broken]
    assert encoded.rows().tolist() == expected
    np.testing.assert_allclose(vectors_of(encoded), vectors_of(whole)[expected], atol=1e-5)
    again = encode(gallery, encoder, tmp_path / "b", max_failed=0.2)
    assert (again.resumed, again.failed) == (24, encoded.failed)


def test_window_and_shard_without_a_readable_image_are_accepted(
    encoder: Encoder, gallery: Path, tmp_path: Path
) -> None:
    for path in (gallery / "circle").glob("*.png"):
        path.unlink()
        path.symlink_to("nowhere.png")
    encoded = encode(gallery, encoder, tmp_path / "w", max_failed=0.5, batch_size=3, shard_rows=6)
    assert encoded.rows().tolist() == list(range(6, 24))
    assert {failure.reason for failure in encoded.failed} == {"no such file"}


def test_too_many_broken_images_stop_the_job_early(encoder: Encoder, gallery: Path, tmp_path: Path) -> None:
    for path in (gallery / "circle").glob("*.png"):
        path.write_bytes(b"")
    model = Counting(encoder)
    with pytest.raises(DataError) as caught:
        encode(gallery, model, tmp_path / "w", max_failed=0.1, batch_size=2, shard_rows=2)
    message = str(caught.value)
    assert "4 of 24 failed, at most 10.0% may" in message
    assert message.count("the file is empty") == 3
    assert model.calls == 0
    (listed,) = (tmp_path / "w").rglob("failed.jsonl")
    assert str(listed) in message
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"circle/{c}.png" for c in ("black", "blue", "green", "orange")]
    with pytest.raises(DataError, match=r"too few images"):  # what an earlier run found counts as well
        encode(gallery, model, tmp_path / "w", max_failed=0.1, batch_size=2, shard_rows=2)


def test_no_readable_image_is_an_error_whatever_max_failed_is(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no image of .* can be read: 1 of 1 failed"):
        encode(tmp_path / "g", encoder, tmp_path / "w", max_failed=1.0)


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.write_bytes(b""), Path.unlink])
def test_corrupted_shard_is_named_and_repaired_by_deleting_it(
    encoder: Encoder, tiny_gallery: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    def run() -> EncodedGallery:
        return encode(tiny_gallery, encoder, tmp_path)

    first = vectors_of(run()).copy()
    (path,) = tmp_path.rglob("000001.npz")
    harm(path)
    if path.exists():
        with pytest.raises(ArtifactError, match=r"000001\.npz is corrupted: .*; delete it and run the same command"):
            run()
        path.unlink()
    again = run()
    assert (again.encoded, again.resumed) == (8, 16)
    np.testing.assert_array_equal(vectors_of(again), first)


@pytest.mark.slow
def test_an_image_that_ends_its_worker_fails_alone(tiny_gallery: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gallery / "circle" / "red.png", tmp_path / "good.png")
    Image.new("RGB", (49, 3)).save(tmp_path / "bad.png")
    names = ["good.png", "bad.png", "good.png"]
    window = [ImageLocation(row, name, -1, 0) for row, name in enumerate(names)]
    preprocess = CrashOfWidth49(16, (0.5,) * 3, (0.5,) * 3)
    (result,) = decode_windows(str(tmp_path), iter([window]), preprocess, 1)
    assert result.failed == ((1, "refused: it ends its decoder", ImageFault.HOSTILE),)
    expected = Preprocess(16, (0.5,) * 3, (0.5,) * 3)(tmp_path / "good.png")
    np.testing.assert_array_equal(result.pixels, [expected, expected])


@pytest.mark.slow
def test_no_worker_outlives_its_job(encoder: Encoder, tiny_gallery: Path) -> None:
    others = {*children_of(os.getpid())}
    windows = ([ImageLocation(row, "circle/red.png", -1, 0)] for row in range(100))
    decoded = decode_windows(str(tiny_gallery), windows, encoder.preprocess, 2)
    next(decoded)
    assert len({*children_of(os.getpid())} - others) == 2
    decoded.close()
    assert {*children_of(os.getpid())} <= others


def test_a_mended_image_is_to_do_for_every_worker(encoder: Encoder, gallery: Path, tmp_path: Path) -> None:
    """A worker on another machine skips the shards that are complete."""
    image = gallery / "circle" / "black.png"
    content = image.read_bytes()
    image.unlink()
    image.symlink_to(tmp_path / "later.png")
    encode(gallery, encoder, tmp_path / "work", max_failed=0.5)
    (tmp_path / "later.png").write_bytes(content)
    options = BuildOptions(batch_size=4, shard_rows=8)
    state = EncodedGallery(scan(gallery), encoder, tmp_path / "work", options)
    assert (state.todo, state.encoded) == ([0], 1)
    assert state.store.load(0).missing == [0]


PREPROCESS = Preprocess(1, (0.5,) * 3, (0.5,) * 3)


def truncated(path: Path) -> ImageLocation:
    path.write_bytes(b"x" * 10)
    return ImageLocation(0, path.name, 5, 20)


def folder(path: Path) -> ImageLocation:
    path.mkdir()
    return ImageLocation(0, path.name, -1, 0)


@pytest.mark.parametrize(
    "made",
    [
        lambda path: ImageLocation(0, path.name, -1, 0),
        truncated,
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


def test_a_shard_lacks_the_rows_that_have_neither_vector_nor_failure(
    encoder: Encoder, tiny_gallery: Path, tmp_path: Path
) -> None:
    store = ShardStore(scan(tiny_gallery), encoder, tmp_path, BuildOptions(batch_size=20, shard_rows=20))
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
