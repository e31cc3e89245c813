"""Decoding in processes with limits: bombs, crashes, orphans, and pixels that equal those of this process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcar_core.images import open_image, workers
from dcar_core.images.decoding import OpenedImage, make_thumbnail
from dcar_core.images.formats import WEB_FORMATS
from dcar_core.images.workers import DecodeWorker, LargeImageError, Limits
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import ImageError, ImageFault
from tests.support import conversions
from tests.support import hostile_images as hostile
from tests.support.images import encoded
from tests.support.processes import children_of, is_alive

FAST = Preprocess(32, (0.5,) * 3, (0.5,) * 3).fast()
LIMITS = Limits(64 * 2**20, seconds=0.5, seconds_per_pixel=0.0)
PNG = encoded(Image.new("RGB", (5, 3), "red"))

needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="the system does not limit the memory of a process")

BOMBS = {
    "scans": lambda: hostile.jpeg_with_scans(10_000),
    "exif segments": lambda: hostile.jpeg_with_segments(100_000),
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "png text": lambda: hostile.png_with_chunks(1_000_000, b"tEXt", b""),
    "png profile": lambda: hostile.png_with_profile(200_000_000),
    "gif comment": lambda: hostile.gif_with_comment_blocks(5_000_000),
    "avif frame": lambda: hostile.avif_of_frame(16_000, 16_000),
    "tiff tile": lambda: hostile.tiff_with_tile(37_000),
    "pixels": lambda: hostile.png_of_size(60_000, 60_000),
    "canvas": lambda: encoded(Image.new("RGB", (7_900, 7_900)), "WEBP"),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[DecodeWorker]:
    with closing(DecodeWorker()) as worker:
        yield worker


def refusal(worker: DecodeWorker, convert: Callable[[OpenedImage], bytes], data: bytes = PNG) -> tuple[ImageFault, str]:
    with pytest.raises(ImageError) as caught:
        worker.run(convert, data, LIMITS)
    return caught.value.fault, str(caught.value)


def process_of(worker: DecodeWorker) -> int:
    worker.start()
    assert worker.process is not None
    return worker.process.pid


@pytest.mark.slow
@needs_limits
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_the_limits(name: str, worker: DecodeWorker) -> None:
    used = os.times()
    with pytest.raises(ImageError) as caught:
        worker.run(FAST.decoder(), BOMBS[name](), LIMITS)
    assert caught.value.fault in {ImageFault.HOSTILE, ImageFault.TOO_LARGE, ImageFault.BROKEN}
    assert os.times().children_user - used.children_user < 2, "of processor time, with the start of a process"
    status = Path(f"/proc/{process_of(worker)}/status").read_text()
    assert int(status.split("VmHWM:")[1].split()[0]) < 200 * 2**10, "KB"
    assert worker.run(FAST.decoder(), PNG, LIMITS)[1:] == (5, 3), "the next image is not affected"


@pytest.mark.slow
def test_mutants_of_every_format_are_decoded_or_refused(worker: DecodeWorker) -> None:
    before, refused = process_of(worker), 0
    for data in hostile.mutants(140):
        try:
            worker.run(FAST.decoder(), data, LIMITS)
        except ImageError:
            refused += 1
    assert 40 < refused < 140
    assert process_of(worker) == before, "none of them ends the process"


def test_pixels_sizes_and_thumbnails_are_those_of_this_process(worker: DecodeWorker) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.effect_noise((300, 200), 80).convert("RGB"), "JPEG", exif=exif)
    pixels, *size = worker.run(FAST.decoder(), data, LIMITS)
    np.testing.assert_array_equal(pixels, FAST(data))
    assert size == [200, 300] == [*open_image(data).size]
    thumbnail = partial(make_thumbnail, side=64, thumbnail_format="jpeg")
    assert worker.run(thumbnail, data, LIMITS).result == thumbnail(OpenedImage(data))


def test_what_this_process_would_say_is_said(worker: DecodeWorker) -> None:
    limits = Limits(64 * 2**20, max_pixels=14, formats=WEB_FORMATS)
    for data, fault, reason in (
        (PNG, ImageFault.TOO_LARGE, "5 x 3 pixels; at most 14 are accepted"),
        (PNG[:-20], ImageFault.BROKEN, "broken or truncated"),
        (encoded(Image.new("L", (2, 2)), "TIFF"), ImageFault.UNSUPPORTED, "TIFF images are not accepted here"),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            worker.run(FAST.decoder(), data, limits if fault != ImageFault.BROKEN else LIMITS)
        assert caught.value.fault == fault
    with pytest.raises(LargeImageError):
        worker.run(FAST.decoder(), PNG, Limits(64 * 2**20, expected=5 * 15 - 1))
    assert worker.run(FAST.decoder(), PNG, Limits(64 * 2**20, expected=5 * 15))[1:] == (5, 3)


@needs_limits
@pytest.mark.parametrize(
    ("convert", "fault", "says"),
    [
        (conversions.spin, ImageFault.HOSTILE, "refused: decoding it takes too long"),
        (conversions.fill, ImageFault.HOSTILE, "refused: decoding it takes more than 64 MiB"),
        (conversions.crash, ImageFault.HOSTILE, "refused: it ends its decoder"),
        (conversions.fail, ImageFault.BROKEN, "ZeroDivisionError: in a decoder"),
        (conversions.vanish, ImageFault.UNREADABLE, "its decoder was killed, perhaps out of memory; try again"),
    ],
)
def test_a_conversion_that_misbehaves_fails_one_image(
    worker: DecodeWorker, convert: Callable[[OpenedImage], bytes], fault: ImageFault, says: str
) -> None:
    before = process_of(worker)
    assert refusal(worker, convert) == (fault, says)
    assert (process_of(worker) == before) == (convert in {conversions.fill, conversions.fail})
    assert worker.run(FAST.decoder(), PNG, LIMITS)[1:] == (5, 3)


def test_half_an_answer_is_never_that_of_the_next_image(worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = workers.read_exactly, list[int]()

    def fails_once(pipe: Any, size: int) -> bytearray:
        sizes.append(size)
        if len(sizes) == 3:  # the lengths, the words, and now the pixels
            raise MemoryError
        return read(pipe, size)

    monkeypatch.setattr(workers, "read_exactly", fails_once)
    with pytest.raises(MemoryError):
        worker.run(FAST.decoder(), PNG, LIMITS)
    blue = encoded(Image.new("RGB", (4, 4), "blue"))
    np.testing.assert_array_equal(worker.run(FAST.decoder(), blue, LIMITS).result, FAST(blue))


def test_a_process_that_hangs_is_ended_by_the_clock_and_one_that_was_killed_replaced(worker: DecodeWorker) -> None:
    with pytest.raises(ImageError, match="refused: decoding it takes too long"):
        worker.run(conversions.wait, PNG, replace(LIMITS, seconds=0.1))
    os.kill(process_of(worker), signal.SIGKILL)
    time.sleep(0.1)
    assert worker.run(FAST.decoder(), PNG, LIMITS)[1:] == (5, 3)


def test_closing_ends_a_process_at_work() -> None:
    worker = DecodeWorker()
    process = process_of(worker)
    thread = threading.Thread(target=refusal, args=(worker, conversions.wait))
    thread.start()
    time.sleep(0.5)
    worker.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not is_alive(process)
    assert refusal(worker, conversions.sleep)[0] == ImageFault.UNREADABLE


def test_closing_ends_a_process_that_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, start, is_starting = DecodeWorker(), subprocess.Popen, threading.Event()

    def start_slowly(*given: Any, **options: Any) -> Any:
        is_starting.set()
        time.sleep(0.5)
        return start(*given, **options)

    monkeypatch.setattr(subprocess, "Popen", start_slowly)
    thread = threading.Thread(target=refusal, args=(worker, conversions.wait))
    thread.start()
    assert is_starting.wait(10)
    began = time.monotonic()
    worker.close()
    thread.join()
    assert time.monotonic() - began < 8, "before the deadline of the image"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_worker_ends_with_a_killed_parent_and_needs_no_torch() -> None:
    code = "from tests.support.conversions import *; from dcar_core.images.workers import *; import sys, time\n"
    code += "worker = DecodeWorker(); worker.start(); print(flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    (child,) = children_of(parent.pid)
    while b"numpy" not in (mapped := Path(f"/proc/{child}/maps").read_bytes()):
        time.sleep(0.05)
    assert b"torch" not in mapped
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while is_alive(child):
        time.sleep(0.05)
