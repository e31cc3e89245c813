"""Decoding of strangers' files in processes with limits on memory and processor
seconds.

- A small file can take gigabytes or minutes in a decoder, or crash it. Beyond a limit
  this image alone fails: the worker refuses the memory (RLIMIT_DATA), or is ended by a
  timer of its processor time (ITIMER_PROF) or, after `WALL` times the seconds, by one
  of the clock (ITIMER_REAL), and replaced.
- Only the header of a file decides how much it may take, and it is read within the same
  limits.
- A worker imports Pillow and NumPy, takes 0.15 s to start, and ends when its input
  ends, as with this process.
- Images go through pipes, beside JSON: the name of a function with its options, and
  what it says. Nothing is pickled.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dcar_core.images.decoding import MAX_PIXELS, OpenedImage, require_size
from dcar_core.images.formats import ALL_FORMATS, ImageFormat
from dcar_core.util.errors import ImageError, ImageFault

WALL = 5  # a worker may wait for a core this many times as long as it may compute
_LENGTHS = struct.Struct("<QQ")
_EXIT_S = 5.0
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    # keeps the memory of small images, which halves the time of a JPEG
    "MALLOC_MMAP_THRESHOLD_": str(8 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20),
}
# the event loop, which every request needs, takes the processor from a decoder
_NICE = 5
_IDLE_BYTES = 48 * 2**20  # of a worker without an image, as RLIMIT_DATA counts them

Convert = Callable[[OpenedImage], NDArray[np.uint8] | bytes]


@dataclass(frozen=True)
class Limits:
    """What one image may take.

    memory: bytes beside those of the idle process. seconds, seconds_per_pixel: of
    processor time. expected: an image that is expected to take more bytes is not
    decoded: `LargeImageError`.
    """

    memory: int
    seconds: float = 1.0
    seconds_per_pixel: float = 1e-7
    max_pixels: int = MAX_PIXELS
    formats: Set[ImageFormat] = ALL_FORMATS
    expected: int | None = None

    def of(self, pixels: int) -> float:
        """Return the seconds that an image of so many pixels may take."""
        return self.seconds + self.seconds_per_pixel * pixels


class Decoded(NamedTuple):
    """A converted image, width and height of its file when upright, and
    `OpenedImage.taken`.
    """

    result: Any
    width: int
    height: int
    taken: str


class LargeImageError(Exception):
    """The image is expected to take more memory than `Limits.expected`."""


class DecodeWorker:
    """One process that decodes one image at a time, for one thread at a time. It starts
    when it is first needed.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._in_use = threading.Lock()
        self._is_closed = False

    def start(self) -> None:
        """Start the process, unless it runs. It is ready a little later."""
        with self._in_use:
            self._start()

    def _start(self) -> None:
        # killed from outside while it was idle
        if self.process is not None and self.process.poll() is not None:
            self._stop()
        if self.process is None and not self._is_closed:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    (
                        f"import sys; sys.path[:] = {sys.path!r}\nfrom {__name__}"
                        " import work; work()"
                    ),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | _ENVIRONMENT,
            )
            if self._is_closed:  # `close` came meanwhile, and did not see this process
                self.process.kill()

    def close(self) -> None:
        """End the process, whatever it does. A thread that waits for it gets an
        ImageError.
        """
        self._is_closed = True
        if self.process is not None:
            self.process.kill()
        with self._in_use:
            self._stop()

    def run(self, convert: Convert, data: bytes, limits: Limits) -> Decoded:
        """Apply `convert`, a function of a module without heavy imports, to an image
        file.

        It may be a `partial` of one, with keywords that JSON holds. Raise ImageError if
        the file cannot be read, or takes more than its limits; LargeImageError: see
        `Limits`.
        """
        job = _to_json(convert, limits)
        status: int | None = -signal.SIGKILL
        with self._in_use:
            self._start()
            process = self.process
            try:
                if process is not None:
                    _write(
                        process.stdin,
                        _LENGTHS.pack(len(job), len(data)) + job,
                        data,
                    )
                    return _answer(process.stdout)
            except (ImageError, LargeImageError):
                raise
            except (OSError, EOFError):
                status = self._stop()
                self._start()  # the next image need not wait
            except BaseException:
                # half of an answer may be left, which the next image must not get
                if process is not None:
                    process.kill()
                self._stop()
                raise
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            raise ImageError("refused: decoding it takes too long", ImageFault.HOSTILE)
        if status != -signal.SIGKILL:
            raise ImageError("refused: it ends its decoder", ImageFault.HOSTILE)
        raise ImageError(
            "its decoder was killed, perhaps out of memory; try again",
            ImageFault.UNREADABLE,
        )

    def _stop(self) -> int | None:
        process = self.process
        self.process = None
        if process is None:
            return None
        # closes its pipes, into one of which nothing more can be written
        with contextlib.suppress(OSError), process:
            try:
                process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.returncode


def _to_json(convert: Convert, limits: Limits) -> bytes:
    function, options = (
        (convert.func, convert.keywords)
        if isinstance(convert, partial)
        else (convert, {})
    )
    name = function.__module__, function.__name__
    return json.dumps(
        [name, options, asdict(limits) | {"formats": sorted(limits.formats)}]
    ).encode()


def _from_json(job: bytearray) -> tuple[Convert, Limits]:
    (module, name), options, limits = json.loads(job)
    limits["formats"] = frozenset(map(ImageFormat, limits["formats"]))
    return partial(getattr(import_module(module), name), **options), Limits(**limits)


def _write(pipe: IO[bytes] | None, *parts: bytes | memoryview) -> None:
    assert pipe is not None
    pipe.writelines(parts)
    pipe.flush()


def read_exactly(pipe: IO[bytes] | None, size: int) -> bytearray:
    data = bytearray(size)
    if pipe.readinto(data) != size:  # type: ignore[union-attr]
        raise EOFError
    return data


def _answer(pipe: IO[bytes] | None) -> Decoded:
    head, size = _LENGTHS.unpack(read_exactly(pipe, _LENGTHS.size))
    answer = json.loads(read_exactly(pipe, head))
    if not answer:
        raise LargeImageError
    if "reason" in answer:
        raise ImageError(answer["reason"], ImageFault(answer["fault"]))
    content = read_exactly(pipe, size)
    shape = answer["shape"]
    if shape is None:
        return Decoded(bytes(content), *answer["about"])
    pixels = np.frombuffer(content, np.uint8).reshape(shape)
    return Decoded(pixels, *answer["about"])


def work() -> None:
    """Decode images from standard input to standard output, until the input ends; this
    and below run in the worker.
    """
    import warnings

    from PIL import AvifImagePlugin

    os.nice(_NICE)
    requests = os.fdopen(0, "rb")
    answers = os.fdopen(os.dup(1), "wb")
    for stream in (1, 2):  # decoders write to both
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent decides
        signal.signal(name, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with contextlib.suppress(EOFError, OSError):
        while True:
            job_size, data_size = _LENGTHS.unpack(read_exactly(requests, _LENGTHS.size))
            # of the parent; the file comes after it
            convert, limits = _from_json(read_exactly(requests, job_size))
            answer, payload = _decode(convert, requests.read(data_size), limits)
            head = json.dumps(answer).encode()
            _write(answers, _LENGTHS.pack(len(head), len(payload)) + head, payload)


def _decode(
    convert: Convert,
    data: bytes,
    limits: Limits,
) -> tuple[dict[str, Any], memoryview]:
    nothing = memoryview(b"")
    opened = None
    with contextlib.suppress(ValueError, OSError):  # a lower limit of the user
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (_IDLE_BYTES + limits.memory, hard))
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL * limits.of(limits.max_pixels))
    try:
        opened = OpenedImage(data, limits.formats)
        require_size(opened, limits.max_pixels)
        if limits.expected is not None and opened.memory > limits.expected:
            return {}, nothing
        signal.setitimer(signal.ITIMER_PROF, limits.of(opened.width * opened.height))
        result = convert(opened)
        about = *opened.upright_size, opened.taken
        if isinstance(result, bytes):
            return {"shape": None, "about": about}, memoryview(result)
        return {"shape": result.shape, "about": about}, result.data.cast("B")
    except (ImageError, MemoryError) as error:
        fault = error.fault if isinstance(error, ImageError) else ImageFault.HOSTILE
        if (
            fault == ImageFault.BROKEN
            and opened is not None
            and opened.memory > limits.memory
        ):
            # the decoder does not say that it was refused the memory
            fault = ImageFault.TOO_LARGE
        elif isinstance(error, ImageError):
            return {"reason": str(error), "fault": fault}, nothing
        return {
            "reason": f"refused: decoding it takes more than {limits.memory >> 20} MiB",
            "fault": fault,
        }, nothing
    except Exception as error:
        return {
            "reason": f"{type(error).__name__}: {error}",
            "fault": ImageFault.BROKEN,
        }, nothing
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
