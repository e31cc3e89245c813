"""Several devices give the vectors of one; a GPU gives the CPU's within tolerance."""

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
from dcar_core.util.errors import ModelError
from index_jobs.encoding.decode import DecodedWindow
from index_jobs.encoding.devices import encode_windows, load_replicas
from index_jobs.encoding.encode import encode_gallery
from index_jobs.gallery.scan import scan
from index_jobs.spec import BuildOptions, IndexSpec


def test_two_devices_give_the_bits_of_one(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    gallery_path = Path(shutil.copytree(tiny_gallery, tmp_path / "g", copy_function=shutil.copy2))
    (gallery_path / "circle" / "blue.png").write_bytes(b"")
    replicas = load_replicas(tiny_checkpoint, "cpu,cpu")
    assert len(replicas) == 2
    assert replicas[0] is not replicas[1]

    def run(encoders: list[Encoder], work: str) -> tuple[NDArray[np.float32], object]:
        encoded = encode_gallery(
            scan(gallery_path),
            encoders,
            tmp_path / work,
            BuildOptions(batch_size=3, shard_rows=6, spec=IndexSpec(max_failed=0.5), progress=False),
        )
        return np.concatenate(list(encoded.blocks())), encoded.failed

    one, two = run(replicas[:1], "a"), run(replicas, "b")
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1] == two[1]
    assert len(one[0]) == 23


class Barrier(Encoder):
    """A real encoder whose forward passes go on only when as many are under way as there are replicas."""

    barrier: threading.Barrier

    def image_features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.barrier.wait(20)
        return super().image_features(pixels)


def decoded(pixels: Pixels) -> DecodedWindow:
    return DecodedWindow(pixels, (), np.zeros(1, np.uint64), np.zeros((1, 2), np.int32), 1)


def windows(count: int, taken: list[int]) -> Iterator[DecodedWindow]:
    for number in range(count):
        taken.append(number)
        pixels = np.full((1, 3, 32, 32), number, np.uint8)
        yield decoded(pixels)


def test_devices_work_concurrently_and_in_order(tiny_checkpoint: Path) -> None:
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    replicas = [Barrier(encoder.state, encoder.loaded, encoder.runtime) for _ in range(2)]
    replicas[0].barrier = replicas[1].barrier = threading.Barrier(2)
    taken: list[int] = []
    expected = encoder.encode_pixels(np.stack([window.pixels[0] for window in windows(8, [])]))
    for number, (window, vectors) in enumerate(encode_windows(windows(8, taken), replicas)):
        assert window.pixels[0, 0, 0, 0] == number
        np.testing.assert_allclose(vectors[0], expected[number], atol=1e-5)
        assert len(taken) <= number + 5  # decoded windows do not pile up


def test_a_failing_device_ends_the_job(tiny_checkpoint: Path) -> None:
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    wrong = decoded(np.zeros((1, 3, 7, 7), np.uint8))
    with pytest.raises(RuntimeError):
        list(encode_windows(iter([*windows(3, []), wrong]), [encoder, encoder]))


def test_missing_device_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="no device 'cuda:99'"):
        load_replicas(tiny_checkpoint, "cpu,cuda:99")


def test_half_precision_stays_close(tiny_checkpoint: Path) -> None:
    """Autocast as on a GPU, here on the CPU in its half precision."""
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.encode_pixels(pixels)
    full = encoder.encode_pixels(pixels)
    assert np.abs((half * full).sum(1) - 1).max() < 0.01  # of random weights; half's length is rounded as well
    assert not np.array_equal(half, full)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_vectors(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def run(device: str) -> NDArray[np.float32]:
        replicas = load_replicas(tiny_checkpoint, device)
        encoded = encode_gallery(
            scan(tiny_gallery), replicas, tmp_path / device, BuildOptions(batch_size=4, shard_rows=8, progress=False)
        )
        return np.concatenate(list(encoded.blocks()))

    assert len(load_replicas(tiny_checkpoint, "auto")) == 2 * torch.cuda.device_count()
    on_cpu, on_gpu = run("cpu"), run("auto")
    assert (on_cpu * on_gpu).sum(1).min() > 0.999  # float16 has three bits more than bfloat16
