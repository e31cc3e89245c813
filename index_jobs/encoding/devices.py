"""The encoders of a gallery, and forward passes on one or several devices in the order of the windows.

- Every GPU of the machine is used unless one is named, and each holds a copy of the model. A GPU has two replicas, so
  that one window is transferred while another is computed. A CPU computes in the job's own thread.
- Windows do not depend on the number of devices, so the vectors do not either.
- Vectors of two runtimes differ in their last digits, so their shards are kept apart.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcar_core import Encoder
from dcar_core.encoder.runtimes import AUTO
from dcar_core.util.arrays import Floats
from dcar_core.util.machine import is_installed
from index_jobs.encoding.decode import DecodedWindow, map_ahead
from index_jobs.encoding.shards import FailedImage, Images


class EncodedWindow(NamedTuple):
    """The images of a window that can be read, their features, float32 (m, E), and the others."""

    images: Images
    features: Floats
    failed: tuple[FailedImage, ...]


def load_replicas(checkpoint: Path, device: str, *, exact: bool = False, runtime: str = "torch") -> list[Encoder]:
    """Load an encoder for each device, twice for a GPU, all on one runtime.

    Args:
        device: "auto" for every GPU or else the CPU; or device names with commas between them: cuda:0,cuda:1.
        exact: preprocess images as open_clip does, bit for bit.
        runtime: the encoder's runtime, as `Encoder.load` takes it.
    """
    names = [name.strip() for name in device.split(",")]
    if names == ["auto"] and is_installed("torch"):
        import torch

        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or names
    if runtime == AUTO and len({name.partition(":")[0] for name in names}) > 1:
        runtime = "torch"  # runs on all of them
    encoders = list[Encoder]()
    for name in names:
        encoder = Encoder.load(checkpoint, device=name, exact=exact, runtime=runtime)
        if not exact:  # PyTorch, if it is installed, resizes on every runtime, so the pixels are the same
            encoder.preprocess = encoder.preprocess.fast(torch=True)
        encoders.append(encoder)
        runtime = encoders[0].runtime.name  # "auto" has chosen
    return encoders + [encoder for encoder, name in zip(encoders, names, strict=True) if name.startswith("cuda")]


def encode_windows(
    windows: Iterator[DecodedWindow], replicas: Sequence[Encoder]
) -> Generator[EncodedWindow, None, None]:
    """Yield each window with its features, in order; at most two windows per replica are under way."""

    def encode(encoder: Encoder, window: DecodedWindow) -> EncodedWindow:
        has_images = len(window.pixels) > 0
        features = encoder.image_features(window.pixels) if has_images else np.empty((0, encoder.dim), np.float32)
        return EncodedWindow(window.images, features, window.failed)

    if len(replicas) == 1:
        yield from (encode(replicas[0], window) for window in windows)
        return
    turns, mine = iter(replicas), threading.local()

    def take_replica() -> None:
        mine.encoder = next(turns)

    with ThreadPoolExecutor(len(replicas), "forward", take_replica) as threads:
        yield from map_ahead(threads, lambda each: encode(mine.encoder, each), windows, 2 * len(replicas) - 1)
