"""Pictures to pixels, ahead of the encoder, in worker processes or in threads of this process.

- The unit of work is a window: the pictures of one forward pass. Windows come back in order, a bounded number of
  them in flight, so memory does not grow with the gallery.
- Workers are spawned, not forked (torch and faiss have threads by then), import no more than they resize with, and end
  with the job, also when it is killed.
- Pillow and PyTorch let go of the interpreter lock while they decode and resize. So threads do for a small gallery,
  which would be done before a process has started, and for a few cores, where they are faster (on 2 cores by a tenth
  for JPEGs of 640 pixels, by a third for PNGs of 72): nothing is sent between processes.
- A broken picture is a reason in the result, never an exception.
- Each picture's pixels are hashed on the way, so that the same picture under two names can be told afterwards.
"""

import hashlib
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.cpu_features import available_cores
from dcar_core.util.errors import DcarError, ImageError
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.gallery.storage import ImageLocation, read_images

Preprocess = Callable[[bytes], NDArray[np.uint8]]
SMALL_GALLERY = 2_000  # below, threads are done before worker processes have started
_THREADS = 4  # up to so many cores, threads keep them busy
_AHEAD = 2  # windows in flight beyond those that the workers are at


@dataclass(frozen=True)
class Window:
    """The pictures of one forward pass."""

    root: str
    places: tuple[ImageLocation, ...]


@dataclass(frozen=True)
class DecodedWindow:
    """A decoded window: pixels uint8 (m, 3, S, S) of the readable pictures in order; (row, reason) of the others.

    digests: hashes of the pixels, uint64 (m,). size: of the window.
    """

    pixels: NDArray[np.uint8]
    failed: tuple[tuple[int, str], ...]
    digests: NDArray[np.uint64]
    size: int


def worker_count(workers: int | None, pictures: int) -> int:
    """Worker processes to start: what was asked for; else none for a small gallery or few cores, or all cores but one.

    Raises:
        ValueError: a negative number.
    """
    if workers is not None:
        if workers < 0:
            raise ValueError(f"workers must be 0 (in this process) or more, not {workers}")
        return workers
    return 0 if pictures < SMALL_GALLERY or available_cores() <= _THREADS else available_cores() - 1


def decode_windows(
    windows: Iterator[Window], preprocess: Preprocess, workers: int, cache: PixelCache | None = None
) -> Generator[DecodedWindow, None, None]:
    """Decode windows in order; workers as from `worker_count`.

    Raises:
        DcarError: a worker process died, for example for want of memory.
    """
    decoder = Decoder(preprocess, cache)
    pool, parallel = _pool(decoder, workers)
    run = _decode_here if workers else decoder
    pending: deque[Future[DecodedWindow]] = deque()
    try:
        for window in windows:
            pending.append(pool.submit(run, window))
            if len(pending) > _AHEAD + parallel:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DcarError(
            "a decoding worker died, perhaps for want of memory; run again with fewer --workers (0 decodes in the "
            "job's own process); whole shards are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(decoder: "Decoder", workers: int) -> tuple[Executor, int]:
    if workers == 0:
        threads = min(_THREADS, available_cores())
        return ThreadPoolExecutor(threads, thread_name_prefix="decode"), threads
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(decoder,)), workers


@dataclass(frozen=True)
class Decoder:
    """A window's bytes to its pixels, by way of the cache where there is one."""

    preprocess: Preprocess
    cache: PixelCache | None = None

    def __call__(self, window: Window) -> DecodedWindow:
        pixels = self.cache.get(window.root, window.places) if self.cache else {}
        missing = [place for place in window.places if place.row not in pixels]
        fresh: dict[ImageLocation, NDArray[np.uint8]] = {}
        failed = []
        for place, data in zip(missing, read_images(window.root, missing), strict=True):
            try:
                if isinstance(data, Exception):
                    raise data
                pixels[place.row] = fresh[place] = self.preprocess(data)
            except ImageError as error:
                failed.append((place.row, str(error)))
            except FileNotFoundError:
                failed.append((place.row, "no such file"))
            except OSError as error:
                failed.append((place.row, error.strerror or str(error)))
            except Exception as error:  # a decoder's own surprise must not cost the other pictures
                failed.append((place.row, f"{type(error).__name__}: {error}"))
        if self.cache and fresh:
            self.cache.put(window.root, fresh)
        stacked = np.stack([pixels[row] for row in sorted(pixels)]) if pixels else np.empty((0, 3, 0, 0), np.uint8)
        digests = [int.from_bytes(hashlib.blake2b(picture.data, digest_size=8).digest()) for picture in stacked]
        return DecodedWindow(stacked, tuple(failed), np.array(digests, np.uint64), len(window.places))


_worker: Decoder | None = None  # one for each worker process, so that it is sent once


def _start_worker(decoder: Decoder) -> None:
    global _worker
    _worker = decoder
    warnings.simplefilter("ignore")  # Pillow's remarks on single pictures
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the job's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A killed job cannot stop its workers, and they would wait for work forever."""
    parent.join()
    os._exit(1)


def _decode_here(window: Window) -> DecodedWindow:
    assert _worker is not None
    return _worker(window)
