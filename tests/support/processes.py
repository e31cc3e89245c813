"""Processes, threads and ports."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseServer
from typing import Self


def without_pytorch(folder: Path) -> dict[str, str]:
    """Return the variables with which Python, and its children, find no PyTorch; a file
    is put into `folder`.
    """
    names = ("torch", "torchvision", "timm", "open_clip", "transformers")
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
    )
    return {"PYTHONPATH": str(folder)}


def children_of(pid: int) -> list[int]:
    """Return every process that descends from pid."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(
                stat.read_text().rsplit(")", 1)[1].split()[1]
            )
        except OSError:
            continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def is_alive(pid: int) -> bool:
    """True while the process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def answering(server: BaseServer) -> Iterator[None]:
    """Let a server of the standard library answer in a thread, which sees within 10 ms
    that it is to end.
    """
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class ServerProcess:
    """A server on loopback, in a process of its own while it is entered, or between
    `start` and `stop`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def responds(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("AWS_")
        }
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while not self.responds():
            if time.monotonic() > end:
                self.stop()
                raise AssertionError(f"{self._command[0]} does not start")
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """Kill the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
