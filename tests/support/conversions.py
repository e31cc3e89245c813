"""Conversions of images that misbehave, for decoding processes, which import this
module.
"""

import os
import signal
import time

from dcar_core.images import OpenedImage


def sleep(opened: OpenedImage) -> bytes:
    """Take as many tenths of a second as the image is wide."""
    time.sleep(opened.width / 10)
    return b"slept"


def wait(opened: OpenedImage) -> bytes:
    """Never return, and take no processor time."""
    time.sleep(600)
    return b""


def spin(opened: OpenedImage) -> bytes:
    while True:
        pass


def fill(opened: OpenedImage) -> bytes:
    return bytes(200 * 2**20)


def crash(opened: OpenedImage) -> bytes:
    """End the process as a fault of a decoder does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return b""


def vanish(opened: OpenedImage) -> bytes:
    """End the process as the system does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def fail(opened: OpenedImage) -> bytes:
    """Raise an error that no decoder is known to raise."""
    raise ZeroDivisionError("in a decoder")
