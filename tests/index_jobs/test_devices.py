"""Several devices give the vectors of one."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.util.arrays import Pixels
from index_jobs.encoding.decode import DecodedWindow
from index_jobs.encoding.devices import encode_windows, load_replicas
from index_jobs.encoding.shards import IMAGE
from tests.support.encoding import encode, vectors_of


def test_two_devices_give_the_bits_of_one(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    gallery_path = Path(shutil.copytree(tiny_gallery, tmp_path / "g", copy_function=shutil.copy2))
    (gallery_path / "circle" / "blue.png").write_bytes(b"")
    replicas = load_replicas(tiny_checkpoint, "cpu,cpu")
    assert len(replicas) == 2
    assert replicas[0] is not replicas[1]

    one, two = (
        encode(gallery_path, encoders, tmp_path / work, batch_size=3, shard_rows=6, max_failed=0.5)
        for encoders, work in ((replicas[:1], "a"), (replicas, "b"))
    )
    np.testing.assert_array_equal(vectors_of(one), vectors_of(two))
    assert one.failed == two.failed
    assert len(one) == 23


class Barrier(Encoder):
    """A real encoder whose forward passes go on only when as many are under way as there are replicas."""

    barrier: threading.Barrier

    def image_features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.barrier.wait(20)
        return super().image_features(pixels)


def decoded(pixels: Pixels, number: int = 0) -> DecodedWindow:
    return DecodedWindow(pixels, np.array([(number, 0, 0, (0, 0))], IMAGE), ())


def windows(count: int, taken: list[int]) -> Iterator[DecodedWindow]:
    for number in range(count):
        taken.append(number)
        pixels = np.full((1, 3, 32, 32), number, np.uint8)
        yield decoded(pixels, number)


def test_devices_work_concurrently_and_in_order(tiny_checkpoint: Path) -> None:
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    replicas = [Barrier(encoder.state, encoder.model, encoder.runtime) for _ in range(2)]
    replicas[0].barrier = replicas[1].barrier = threading.Barrier(2)
    taken: list[int] = []
    expected = encoder.encode_pixels(np.stack([window.pixels[0] for window in windows(8, [])]))
    for number, window in enumerate(encode_windows(windows(8, taken), replicas)):
        assert window.images["row"] == number
        np.testing.assert_allclose(window.features[0], expected[number], atol=1e-5)
        assert len(taken) <= number + 5  # decoded windows do not pile up


def test_a_failing_device_ends_the_job(tiny_checkpoint: Path) -> None:
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    wrong = decoded(np.zeros((1, 3, 7, 7), np.uint8))
    with pytest.raises(RuntimeError):
        list(encode_windows(iter([*windows(3, []), wrong]), [encoder, encoder]))


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_vectors(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def run(device: str) -> NDArray[np.float32]:
        return vectors_of(encode(tiny_gallery, load_replicas(tiny_checkpoint, device), tmp_path / device))

    assert len(load_replicas(tiny_checkpoint, "auto")) == 2 * torch.cuda.device_count()
    on_cpu, on_gpu = run("cpu"), run("auto")
    assert (on_cpu * on_gpu).sum(1).min() > 0.999  # float16 has three bits more than bfloat16
