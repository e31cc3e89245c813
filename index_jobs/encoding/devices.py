"""Forward passes on one device or on several, results in the order of the windows.

- Every GPU of the machine is used unless one is named; each has its own copy of the model.
- A GPU has two threads, so that one window is on its way while another is computed. A CPU computes in the job's own
  thread: its cores are taken either way.
- Windows are dealt in turn and are the same however many devices there are, so the vectors are too.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dcar_core.model.preprocess import Preprocess
from dcar_core.runtimes.protocol import Runtime
from dcar_core.util.arrays import Floats
from index_jobs.encoding.decode import DecodedWindow

if TYPE_CHECKING:
    from dcar_core import Encoder


class ImageEncoder(Protocol):
    """What encoding needs of `dcar_core.Encoder`."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def preprocess(self) -> Preprocess: ...
    @property
    def runtime(self) -> Runtime: ...
    def encode_pixels(self, pixels: NDArray[np.uint8]) -> Floats: ...


def load_replicas(checkpoint: Path, device: str, *, exact: bool = False, runtime: str = "torch") -> list["Encoder"]:
    """The lanes of `encode_windows`: an encoder for each device, twice where it is a GPU; all on one kind of runtime.

    Args:
        device: "auto" for every GPU, or what else there is; or devices by name with commas between: cuda:0,cuda:1.
        exact: pictures to pixels as open_clip does it, bit for bit.
        runtime: what runs the encoder, as `Encoder.load` takes it.

    Raises:
        CheckpointError, ModelError: the model or the runtime cannot be loaded, or a device is not there.
    """
    import torch

    from dcar_core import Encoder

    names = [name.strip() for name in device.split(",")]
    if names == ["auto"] and torch.cuda.is_available():
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if runtime == "auto" and len({name.partition(":")[0] for name in names}) > 1:
        runtime = "torch"  # which runs on all of them
    encoders = list[Encoder]()
    for name in names:
        encoder = Encoder.load(checkpoint, device=name, exact=exact, runtime=runtime)
        if not exact:  # by PyTorch whatever the runtime, so that all have the same pixels
            encoder.preprocess = encoder.preprocess.fast(torch=True)
        encoders.append(encoder)
        runtime = encoders[0].runtime.name  # what "auto" took for the first
    return encoders + [encoder for encoder, name in zip(encoders, names, strict=True) if name.startswith("cuda")]


def encode_windows(
    windows: Iterator[DecodedWindow], lanes: Sequence[ImageEncoder]
) -> Generator[tuple[DecodedWindow, Floats], None, None]:
    """Each window with its vectors, float32 (m, E), in order; at most two windows a lane are in flight."""
    if len(lanes) == 1:
        for window in windows:
            yield window, _vectors(lanes[0], window)
        return
    pending: deque[tuple[DecodedWindow, Future[Floats]]] = deque()
    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="forward")) for _ in lanes]
        for number, window in enumerate(windows):
            lane = number % len(lanes)
            pending.append((window, threads[lane].submit(_vectors, lanes[lane], window)))
            if len(pending) >= 2 * len(lanes):
                first, future = pending.popleft()
                yield first, future.result()
        for last, future in pending:
            yield last, future.result()


def _vectors(encoder: ImageEncoder, window: DecodedWindow) -> Floats:
    return encoder.encode_pixels(window.pixels) if len(window.pixels) else np.empty((0, encoder.dim), np.float32)
