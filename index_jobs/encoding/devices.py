"""Forward passes on one or several devices, with results in the order of the windows.

- Every GPU of the machine is used unless one is named, and each holds a copy of the model.
- A GPU has two replicas, so that one window is transferred while another is computed. A CPU computes in the job's own
  thread.
- Windows are assigned in turn. They do not depend on the number of devices, so the vectors do not either.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dcar_core import Encoder
from dcar_core.util.arrays import Floats
from index_jobs.encoding.decode import DecodedWindow


def load_replicas(checkpoint: Path, device: str, *, exact: bool = False, runtime: str = "torch") -> list[Encoder]:
    """Load an encoder for each device, twice for a GPU, all on one runtime.

    Args:
        device: "auto" for every GPU or else the CPU; or device names with commas between them: cuda:0,cuda:1.
        exact: preprocess images as open_clip does, bit for bit.
        runtime: the encoder's runtime, as `Encoder.load` takes it.
    """
    import torch

    names = [name.strip() for name in device.split(",")]
    if names == ["auto"] and torch.cuda.is_available():
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if runtime == "auto" and len({name.partition(":")[0] for name in names}) > 1:
        runtime = "torch"  # runs on all of them
    encoders = list[Encoder]()
    for name in names:
        encoder = Encoder.load(checkpoint, device=name, exact=exact, runtime=runtime)
        if not exact:  # PyTorch resizes on every runtime, so the pixels are the same
            encoder.preprocess = encoder.preprocess.fast(torch=True)
        encoders.append(encoder)
        runtime = encoders[0].runtime.name  # "auto" has chosen
    return encoders + [encoder for encoder, name in zip(encoders, names, strict=True) if name.startswith("cuda")]


def encode_windows(
    windows: Iterator[DecodedWindow], replicas: Sequence[Encoder]
) -> Generator[tuple[DecodedWindow, Floats], None, None]:
    """Yield each window with its features, float32 (m, E), in order; at most two windows per replica are in flight."""
    if len(replicas) == 1:
        for window in windows:
            yield window, _encode(replicas[0], window)
        return
    pending: deque[tuple[DecodedWindow, Future[Floats]]] = deque()
    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="forward")) for _ in replicas]
        for number, window in enumerate(windows):
            turn = number % len(replicas)
            pending.append((window, threads[turn].submit(_encode, replicas[turn], window)))
            if len(pending) >= 2 * len(replicas):
                first, future = pending.popleft()
                yield first, future.result()
        for last, future in pending:
            yield last, future.result()


def _encode(encoder: Encoder, window: DecodedWindow) -> Floats:
    return encoder.image_features(window.pixels) if len(window.pixels) else np.empty((0, encoder.dim), np.float32)
