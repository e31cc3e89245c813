"""Encoding with a real model: order, failures and their kinds, resuming, corrupted
shards.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.encoder.graphs import TorchRuntime
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError, DataError, ImageFault
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.encode import EncodedGallery, load_replicas
from index_jobs.gallery.locations import ImageLocation
from index_jobs.gallery.scan import scan
from tests.support.encoding import cut, encode, flip, vectors_of
from tests.support.images import png


class Counting(Encoder):
    """A real encoder that counts its forward passes and can fail in one."""

    def __init__(self, encoder: Encoder, die_at: int | None = None) -> None:
        super().__init__(encoder.state, encoder.model, encoder.runtime)
        self.die_at = die_at
        self.calls = 0

    def image_features(self, pixels: NDArray[np.uint8]) -> Floats:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        return super().image_features(pixels)


def test_interrupted_run_ends_in_the_same_bits_in_order(
    encoder: Encoder,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    def run(model: Counting, work: str, workers: int = 0) -> EncodedGallery:
        return encode(tiny_gallery, model, tmp_path / work, workers=workers)

    undisturbed = run(Counting(encoder), "a", workers=2)
    paths = [
        tiny_gallery / name for name in scan(tiny_gallery).table["name"].to_pylist()
    ]
    np.testing.assert_allclose(
        vectors_of(undisturbed),
        encoder.encode_images(paths),
        atol=1e-5,
    )
    np.testing.assert_array_equal(undisturbed.rows(), np.arange(24))
    assert undisturbed.encoded == 24
    assert undisturbed.resumed == 0
    assert undisturbed.failed == []
    with pytest.raises(KeyboardInterrupt):
        run(Counting(encoder, die_at=4), "b")
    for resumed, calls in ((8, 4), (24, 0)):
        model = Counting(encoder)
        again = run(model, "b")
        assert again.resumed == resumed
        assert again.encoded == 24 - resumed
        assert model.calls == calls
        np.testing.assert_array_equal(vectors_of(again), vectors_of(undisturbed))


def test_vectors_of_two_runtimes_never_mix(
    encoder: Encoder,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    runtime = TorchRuntime(encoder.model)
    runtime.name = "rounding"
    other = Encoder(encoder.state, encoder.model, runtime)
    for model, resumed in (
        (encoder, 0),
        (other, 0),
        (encoder, 24),
    ):
        assert encode(tiny_gallery, model, tmp_path).resumed == resumed


def test_broken_images_are_listed_and_others_keep_their_rows(
    encoder: Encoder,
    gallery: Path,
    tmp_path: Path,
) -> None:
    """Also where a whole shard, of circles, has no image that can be read."""
    whole = encode(gallery, encoder, tmp_path / "a")
    circles = sorted((gallery / "circle").glob("*.png"))
    broken = {f"circle/{path.name}" for path in circles} | {"square/blue.png"}
    for name in broken:
        (gallery / name).write_bytes(b"this is no picture")
    encoded = encode(
        gallery,
        encoder,
        tmp_path / "b",
        max_failed=0.5,
        batch_size=3,
        shard_rows=6,
    )
    names = scan(gallery).table["name"].to_pylist()
    assert {names[failure.row] for failure in encoded.failed} == {*broken}
    expected = [row for row, name in enumerate(names) if name not in broken]
    assert encoded.rows().tolist() == expected
    np.testing.assert_allclose(
        vectors_of(encoded),
        vectors_of(whole)[expected],
        atol=1e-5,
    )


def test_too_many_broken_images_stop_the_job_early(
    encoder: Encoder,
    gallery: Path,
    tmp_path: Path,
) -> None:
    for path in (gallery / "circle").glob("*.png"):
        path.write_bytes(b"")
    model = Counting(encoder)
    with pytest.raises(DataError) as caught:
        encode(
            gallery,
            model,
            tmp_path / "w",
            max_failed=0.1,
            batch_size=2,
            shard_rows=2,
        )
    message = str(caught.value)
    assert "4 of 24 failed, at most 10.0% may" in message
    assert message.count("the file is empty") == 3
    assert model.calls == 0
    (listed,) = (tmp_path / "w").rglob("failed.jsonl")
    assert str(listed) in message
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["name"] for line in lines] == [
        f"circle/{c}.png" for c in ("black", "blue", "green", "orange")
    ]


@pytest.mark.parametrize(
    "harm", [flip, cut, lambda path: path.write_bytes(b""), Path.unlink]
)
def test_corrupted_shard_is_named_and_repaired_by_deleting_it(
    encoder: Encoder,
    tiny_gallery: Path,
    tmp_path: Path,
    harm: Callable[[Path], None],
) -> None:
    def run() -> EncodedGallery:
        return encode(tiny_gallery, encoder, tmp_path)

    first = vectors_of(run()).copy()
    (path,) = tmp_path.rglob("000001.npz")
    harm(path)
    if path.exists():
        with pytest.raises(
            ArtifactError,
            match=r"000001\.npz is corrupted: .*; delete it and run the same command",
        ):
            run()
        path.unlink()
    again = run()
    assert again.encoded == 8
    assert again.resumed == 16
    np.testing.assert_array_equal(vectors_of(again), first)


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        (("gone.png", -1, 0), ImageFault.MISSING),
        (("short.png", 5, 20), ImageFault.UNREADABLE),
        (("folder.png", -1, 0), ImageFault.UNREADABLE),
        (("huge.jpg", -1, 0), ImageFault.TOO_LARGE),
        (("huge.jpg", 512, 2**40 - 1024), ImageFault.TOO_LARGE),
        (("http://127.0.0.1:9/huge.jpg", -1, 2**40), ImageFault.TOO_LARGE),
    ],
)
def test_unreadable_or_huge_file_fails_alone(
    place: tuple[str, int, int],
    fault: ImageFault,
    tmp_path: Path,
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "short.png").write_bytes(b"x" * 10)
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)  # sparse
    (tmp_path / "good.png").write_bytes(png())
    window = [ImageLocation(0, *place), ImageLocation(1, "good.png", -1, 0)]
    (decoded,) = decode_windows(
        str(tmp_path),
        iter([window]),
        Preprocess(1, (0.5,) * 3, (0.5,) * 3),
        0,
    )
    (failure,) = decoded.failed
    assert failure.row == 0
    assert failure.fault == fault
    assert len(decoded.pixels) == 1


class Together(Encoder):
    """A real encoder whose forward passes go on only when two are under way."""

    barrier = threading.Barrier(2)

    def image_features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.barrier.wait(20)
        return super().image_features(pixels)


def test_two_devices_at_once_give_the_bits_of_one(
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    (gallery / "circle" / "blue.png").write_bytes(b"")
    one, two = load_replicas(tiny_checkpoint, "cpu,cpu")
    assert one is not two
    together: list[Encoder] = [
        Together(model.state, model.model, model.runtime) for model in (one, two)
    ]
    alone, both = (
        encode(
            gallery,
            encoders,
            tmp_path / f"{len(encoders)}",
            batch_size=3,
            shard_rows=6,
            max_failed=0.5,
        )
        for encoders in ([one], together)
    )
    np.testing.assert_array_equal(vectors_of(alone), vectors_of(both))
    assert alone.failed == both.failed
    assert len(alone) == 23


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_vectors(
    tiny_gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    def run(device: str) -> NDArray[np.float32]:
        return vectors_of(
            encode(
                tiny_gallery,
                load_replicas(tiny_checkpoint, device),
                tmp_path / device,
            )
        )

    assert len(load_replicas(tiny_checkpoint, "auto")) == 2 * torch.cuda.device_count()
    on_cpu = run("cpu")
    on_gpu = run("auto")
    # float16 has three bits more than bfloat16
    assert (on_cpu * on_gpu).sum(1).min() > 0.999
