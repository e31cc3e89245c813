"""Decode images to pixels ahead of the encoder, in processes with limits.

- The unit of work is a window: the images of one forward pass. Windows come back in
  order, and a bounded number of them is in flight, so memory does not grow with the
  gallery.
- Each thread reads files and has a decoding process: see `dcar_core.images.workers`.
  These end with the job.
- A broken image adds a reason to the result and raises no exception, and so does one
  that ends its process.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from dcar_core.images import MAX_PIXELS, OpenedImage
from dcar_core.images.workers import Decoded, DecodeWorker, Limits
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Pixels
from dcar_core.util.errors import ImageError, ImageFault
from dcar_core.util.machine import available_cores
from index_jobs.encoding.shards import IMAGE, Images
from index_jobs.gallery.locations import ImageLocation, read_images

Value = TypeVar("Value")
Result = TypeVar("Result")
# of one image of a gallery
LIMITS = Limits(memory=24 * MAX_PIXELS, seconds=5, seconds_per_pixel=5e-7)
_MAX_THREADS = 4  # threads keep up to this many cores busy
_IMAGES_PER_WORKER = 100  # a process takes as long to start as to decode these
_WINDOWS_AHEAD = 2  # windows in flight beyond those being decoded


class FailedImage(NamedTuple):
    """An image without a vector. row: of the gallery."""

    row: int
    reason: str
    fault: ImageFault


class DecodedWindow(NamedTuple):
    """The images of a window that can be read, as pixels, uint8 (m, 3, S, S), and as
    records, and the others.
    """

    pixels: Pixels
    images: Images
    failed: tuple[FailedImage, ...]


def worker_count(workers: int | None, images: int) -> int:
    """Return the number of decoding processes; 0 decodes in threads of this process,
    without limits.

    Args:
        workers: the requested number. None chooses by the images and the cores, of
            which more than four keep one free.
    """
    if workers is not None:
        return workers
    cores = available_cores()
    return min(
        cores if cores <= _MAX_THREADS else cores - 1, 1 + images // _IMAGES_PER_WORKER
    )


def decode_windows(
    root: str,
    windows: Iterable[Sequence[ImageLocation]],
    preprocess: Preprocess,
    workers: int,
) -> Generator[DecodedWindow, None, None]:
    """Decode the windows of a gallery in order, with `workers` from `worker_count`."""
    processes = [DecodeWorker() for _ in range(workers)]
    turns = iter(processes)
    mine = threading.local()

    def take_worker() -> None:
        mine.worker = next(turns, None)

    parallel = workers or min(_MAX_THREADS, available_cores())
    threads = ThreadPoolExecutor(parallel, "decode", take_worker)
    try:
        yield from map_ahead(
            threads,
            lambda window: _decode_window(root, window, preprocess, mine.worker),
            windows,
            _WINDOWS_AHEAD + parallel,
        )
    finally:
        for process in processes:
            process.close()
        threads.shutdown(cancel_futures=True)


def map_ahead(
    threads: ThreadPoolExecutor,
    function: Callable[[Value], Result],
    values: Iterable[Value],
    ahead: int,
) -> Iterator[Result]:
    """Yield the results of a function in the order of the values; at most so many more
    are under way.
    """
    pending: deque[Future[Result]] = deque()
    for value in values:
        pending.append(threads.submit(function, value))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _decode_window(
    root: str,
    locations: Sequence[ImageLocation],
    preprocess: Preprocess,
    worker: DecodeWorker | None,
) -> DecodedWindow:
    """Read and decode the images of a window."""
    stacked = []
    records = []
    failed = []
    for location, data in zip(locations, read_images(root, locations), strict=True):
        image = _decode_image(location.row, data, preprocess, worker)
        if isinstance(image, FailedImage):
            failed.append(image)
        else:
            stacked.append(image.result)
            size = image.width, image.height
            records.append((location.row, location.location_hash, size, image.taken))
    pixels = np.stack(stacked) if stacked else np.empty((0, 3, 0, 0), np.uint8)
    return DecodedWindow(pixels, np.array(records, IMAGE), tuple(failed))


def _decode_image(
    row: int,
    data: bytes | Exception,
    preprocess: Preprocess,
    worker: DecodeWorker | None,
) -> Decoded | FailedImage:
    if isinstance(data, FileNotFoundError):
        return FailedImage(row, "no such file", ImageFault.MISSING)
    if isinstance(data, ImageError):
        return FailedImage(row, str(data), data.fault)
    if isinstance(data, Exception):
        if isinstance(data, OSError):
            reason = str(data)
        else:
            reason = f"{type(data).__name__}: {data}"
        return FailedImage(
            row,
            getattr(data, "strerror", None) or reason,
            ImageFault.UNREADABLE,
        )
    try:
        if worker is None:
            opened = OpenedImage(data)
            return Decoded(preprocess(opened), *opened.upright_size, opened.taken)
        decoded = worker.run(preprocess.decoder(), data, LIMITS)
        return decoded._replace(result=preprocess.finish(decoded.result))
    except ImageError as error:
        return FailedImage(row, str(error), error.fault)
    except Exception as error:
        # an unforeseen decoder error fails one image, not the job
        return FailedImage(row, f"{type(error).__name__}: {error}", ImageFault.BROKEN)
