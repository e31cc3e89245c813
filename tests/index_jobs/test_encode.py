"""Encoding: order, failures, resuming, corrupted shards; always with a real model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dcar_core import Encoder
from dcar_core.images import OpenedImage
from dcar_core.model.preprocess import Preprocess
from dcar_core.runtimes.torch_runtime import TorchRuntime
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError, DataError, ImageFault
from index_jobs.encoding.decode import decode_windows, worker_count
from index_jobs.encoding.encode import encode_gallery
from index_jobs.encoding.encoding_state import EncodedGallery, EncodingState
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import ImageLocation
from index_jobs.spec import BuildOptions, IndexSpec
from tests.support.conversions import CrashOfWidth49
from tests.support.processes import children_of


def _options(max_failed: float = IndexSpec.max_failed, **options: Any) -> BuildOptions:
    return BuildOptions.of({"max_failed": max_failed, "progress": False, **options})


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return Encoder.load(tiny_checkpoint, device="cpu")


@pytest.fixture
def gallery_path(tiny_gallery: Path, tmp_path: Path) -> Path:
    """A copy to break things in."""
    return Path(shutil.copytree(tiny_gallery, tmp_path / "gallery", copy_function=shutil.copy2))


def vectors_of(encoded: EncodedGallery) -> Floats:
    return np.concatenate(list(encoded.blocks()))


class Counting(Encoder):
    """A real encoder that counts its forward passes and can fail in one."""

    def __init__(self, encoder: Encoder, die_at: int | None = None) -> None:
        super().__init__(encoder.state, encoder.loaded, encoder.runtime)
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
    gallery = scan(tiny_gallery)
    encoded = encode_gallery(
        gallery, [encoder], tmp_path, BuildOptions(workers=workers, batch_size=5, shard_rows=10, progress=False)
    )
    paths = [tiny_gallery / name for name in gallery.table["name"].to_pylist()]
    np.testing.assert_allclose(vectors_of(encoded), encoder.encode_images(paths), atol=1e-5)
    np.testing.assert_array_equal(encoded.rows(), np.arange(24))
    assert [len(shard.vectors()) for shard in encoded.shards] == [10, 10, 4]
    assert (encoded.encoded, encoded.resumed, encoded.failed) == (24, 0, [])


def test_interrupted_run_goes_on_to_the_same_bits(encoder: Encoder, tiny_gallery: Path, tmp_path: Path) -> None:
    gallery = scan(tiny_gallery)

    def run(model: Counting, work: str) -> EncodedGallery:
        return encode_gallery(
            gallery, [model], tmp_path / work, BuildOptions(workers=0, batch_size=4, shard_rows=8, progress=False)
        )

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


def test_changed_image_or_model_is_encoded_anew(
    encoder: Encoder, other_checkpoint: Path, gallery_path: Path, tmp_path: Path
) -> None:
    def resumed(model: Encoder = encoder, batch: int = 4) -> int:
        return encode_gallery(
            scan(gallery_path), [model], tmp_path / "w", BuildOptions(batch_size=batch, shard_rows=8, progress=False)
        ).resumed

    assert resumed() == 0
    assert resumed() == 24
    assert resumed(Encoder.load(other_checkpoint, device="cpu")) == 0
    assert resumed(batch=8) == 24, "as another gallery's are"
    Image.new("RGB", (48, 48), "pink").save(gallery_path / "circle" / "red.png")
    assert resumed() == 23


def test_vectors_of_two_runtimes_never_mix(encoder: Encoder, tiny_gallery: Path, tmp_path: Path) -> None:
    runtime = TorchRuntime("torch-bf16", *encoder.loaded.graphs(), torch.bfloat16)
    other = Encoder(encoder.state, encoder.loaded, runtime)

    def run(model: Counting, work: str) -> EncodedGallery:
        return encode_gallery(scan(tiny_gallery), [model], tmp_path / work, _options(batch_size=4, shard_rows=8))

    with pytest.raises(KeyboardInterrupt):
        run(Counting(encoder, die_at=4), "a")
    resumed = run(Counting(other), "a")
    assert resumed.resumed == 0
    alone = vectors_of(run(Counting(other), "b"))
    np.testing.assert_array_equal(vectors_of(resumed), alone)
    assert (alone != vectors_of(run(Counting(encoder), "c"))).any(1).all()  # or the test shows nothing
    assert run(Counting(encoder), "a").resumed == 8  # nothing that was made is lost either


def seen() -> Image.Image:
    """Large enough to be decoded at a reduced scale; no side and no corner is like another."""
    picture = Image.new("RGB", (640, 480), "white")
    for box, color in {(0, 0, 320, 160): "navy", (320, 0, 640, 320): "orange", (0, 320, 200, 480): "gray"}.items():
        picture.paste(color, box)
    return picture


def made(how: str, path: Path) -> Path:
    """Return one image in the formats of cameras, scanners and printers."""
    picture, turned = seen(), Image.Exif()
    turned[0x0112] = 6  # to be seen, it is to be turned by 90 degrees
    if how == "turned":
        picture.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=turned, quality=95)
    elif how == "cmyk":
        picture.convert("CMYK").save(path, "JPEG", quality=95)
    elif how == "16 bit":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path, "PNG")
    elif how == "palette":
        picture.quantize(8).save(path, "PNG")
    elif how == "alpha":
        alpha = Image.fromarray((np.asarray(picture).min(-1) < 255).astype(np.uint8) * 255)
        clear = Image.composite(picture, Image.new("RGB", picture.size, "black"), alpha)  # black where nothing is seen
        clear.putalpha(alpha)
        clear.save(path, "PNG")
    return path


@pytest.mark.parametrize("how", ["turned", "cmyk", "16 bit", "palette", "alpha"])
@pytest.mark.parametrize("exact", [False, True])
def test_images_are_decoded_as_people_see_them(how: str, exact: bool, encoder: Encoder, tmp_path: Path) -> None:
    preprocess = encoder.model.backbone.preprocess if exact else encoder.preprocess
    path = made(how, tmp_path / "picture")
    (decoded,) = decode_windows(str(tmp_path), iter([[ImageLocation(0, path.name, -1, 0)]]), preprocess, 0)
    wanted = preprocess(seen().convert("L").convert("RGB") if how == "16 bit" else seen())
    assert decoded.failed == ()
    assert np.abs(decoded.pixels[0].astype(int) - wanted).mean() < 4  # of 255; JPEG is not exact
    upside = preprocess(seen().rotate(180))
    assert np.abs(upside.astype(int) - wanted).mean() > 20  # or the test shows nothing


def break_picture(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no picture")
    elif how == "dangling link":
        path.unlink()
        path.symlink_to("nowhere.png")
    else:
        path.unlink()
        path.mkdir()


def test_broken_images_are_listed_and_the_others_keep_their_rows(
    encoder: Encoder, gallery_path: Path, tmp_path: Path
) -> None:
    whole = encode_gallery(scan(gallery_path), [encoder], tmp_path / "a", _options(batch_size=4, shard_rows=8))
    broken = {"circle/black.png": "empty", "cross/red.png": "truncated", "square/blue.png": "text"}
    for name, how in broken.items():
        break_picture(gallery_path / name, how)
    gallery = scan(gallery_path)
    encoded = encode_gallery(
        gallery,
        [encoder],
        tmp_path / "b",
        _options(0.2, batch_size=4, shard_rows=8),
    )
    names = gallery.table["name"].to_pylist()
    assert {names[failure.row] for failure in encoded.failed} == set(broken)
    assert all(failure.reason for failure in encoded.failed)
    expected = [row for row, name in enumerate(names) if name not in broken]
    assert encoded.rows().tolist() == expected
    np.testing.assert_allclose(vectors_of(encoded), vectors_of(whole)[expected], atol=1e-5)
    again = encode_gallery(
        gallery,
        [encoder],
        tmp_path / "b",
        _options(0.2, batch_size=4, shard_rows=8),
    )
    assert (again.resumed, again.failed) == (24, encoded.failed)


def test_window_and_shard_without_a_readable_image_are_accepted(
    encoder: Encoder, gallery_path: Path, tmp_path: Path
) -> None:
    for path in (gallery_path / "circle").glob("*.png"):
        break_picture(path, "dangling link")
    encoded = encode_gallery(
        scan(gallery_path),
        [encoder],
        tmp_path / "w",
        _options(0.5, batch_size=3, shard_rows=6),
    )
    assert encoded.rows().tolist() == list(range(6, 24))
    assert {failure.reason for failure in encoded.failed} == {"no such file"}


def test_too_many_broken_images_stop_the_job_early(encoder: Encoder, gallery_path: Path, tmp_path: Path) -> None:
    for path in (gallery_path / "circle").glob("*.png"):
        break_picture(path, "empty")
    model = Counting(encoder)
    with pytest.raises(DataError) as caught:
        encode_gallery(
            scan(gallery_path),
            [model],
            tmp_path / "w",
            _options(0.1, batch_size=2, shard_rows=2),
        )
    message = str(caught.value)
    assert "4 of 24 failed, at most 10.0% may" in message
    assert message.count("the file is empty") == 3
    assert model.calls == 0
    (listed,) = (tmp_path / "w").rglob("failed.jsonl")
    assert str(listed) in message
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"circle/{c}.png" for c in ("black", "blue", "green", "orange")]
    with pytest.raises(DataError, match=r"too few images"):  # what an earlier run found counts as well
        encode_gallery(
            scan(gallery_path),
            [model],
            tmp_path / "w",
            _options(0.1, batch_size=2, shard_rows=2),
        )


def test_no_readable_image_is_an_error_whatever_max_failed_is(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no image of .* can be read: 1 of 1 failed"):
        encode_gallery(
            scan(tmp_path / "g"),
            [encoder],
            tmp_path / "w",
            _options(1.0),
        )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_corrupted_shard_is_named_and_repaired_by_deleting_it(
    encoder: Encoder, tiny_gallery: Path, tmp_path: Path, suffix: str, harm: Callable[[Path], None]
) -> None:
    def run() -> EncodedGallery:
        return encode_gallery(scan(tiny_gallery), [encoder], tmp_path, _options(batch_size=4, shard_rows=8))

    first = vectors_of(run()).copy()
    (path,) = tmp_path.rglob(f"000001{suffix}")
    harm(path)
    if (suffix, harm) == (".json", Path.unlink):  # without its JSON, a shard is one that was never finished
        assert run().resumed == 16
        return
    if (suffix, harm) == (".json", flip):
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ArtifactError, match=r"000001\.npy is corrupted; delete it and 000001\.json"):
        run()
    path.with_suffix(".npy").unlink(missing_ok=True)
    path.with_suffix(".json").unlink()
    again = run()
    assert again.encoded == 8
    np.testing.assert_array_equal(vectors_of(again), first)


def test_progress_shows_rate_and_failures(
    encoder: Encoder, gallery_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_picture(gallery_path / "circle" / "black.png", "empty")
    encode_gallery(scan(gallery_path), [encoder], tmp_path / "w", BuildOptions(batch_size=4))
    out, err = capsys.readouterr()
    assert out == ""
    assert "24/24" in err
    assert "img/s" in err
    assert "1 failed" in err


def test_worker_count_follows_gallery_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index_jobs.encoding.decode.available_cores", lambda: 16)
    assert worker_count(None, 99) == 1
    assert worker_count(None, 500) == 6
    assert worker_count(None, 2000) == 15
    assert worker_count(3, 1) == 3
    monkeypatch.setattr("index_jobs.encoding.decode.available_cores", lambda: 4)
    assert worker_count(None, 2000) == 4
    with pytest.raises(ValueError, match="not -1"):
        worker_count(-1, 10)


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


def surprise(image: OpenedImage) -> NDArray[np.uint8]:
    raise ZeroDivisionError("in a decoder")


def test_unexpected_error_in_a_decoder_is_a_failed_image(tiny_gallery: Path) -> None:
    windows = iter([[ImageLocation(5, "circle/red.png", -1, 0)]])
    (result,) = decode_windows(str(tiny_gallery), windows, surprise, 0)  # type: ignore[arg-type]
    assert result.failed == ((5, "ZeroDivisionError: in a decoder", ImageFault.BROKEN),)


@pytest.mark.slow
def test_no_worker_outlives_its_job(encoder: Encoder, tiny_gallery: Path) -> None:
    others = {*children_of(os.getpid())}
    windows = ([ImageLocation(row, "circle/red.png", -1, 0)] for row in range(100))
    decoded = decode_windows(str(tiny_gallery), windows, encoder.preprocess, 2)
    next(decoded)
    assert len({*children_of(os.getpid())} - others) == 2
    decoded.close()
    assert {*children_of(os.getpid())} <= others


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"shard_rows": 0}, {"max_failed": 1.5}])
def test_wrong_settings_are_named(
    encoder: Encoder, tiny_gallery: Path, tmp_path: Path, wrong: dict[str, float]
) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        encode_gallery(scan(tiny_gallery), [encoder], tmp_path, BuildOptions.of(wrong))


def test_a_mended_shard_is_to_do_for_every_worker(encoder: Encoder, gallery_path: Path, tmp_path: Path) -> None:
    """A worker on another machine skips the shards that the store has."""
    options = _options(0.5, batch_size=4, shard_rows=8)
    image = gallery_path / "circle" / "black.png"
    content = image.read_bytes()
    image.unlink()
    image.symlink_to("later.png")
    gallery = scan(gallery_path)
    encode_gallery(gallery, [encoder], tmp_path, options)
    image.with_name("later.png").write_bytes(content)
    state = EncodingState(gallery, encoder, tmp_path, options, encoder.runtime.name)
    assert state.todo == [0]
    assert state.store.load(0) is None
