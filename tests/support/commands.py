"""Commands of this project in processes of their own, forked from one that has imported everything.

- Importing PyTorch and open_clip takes 5 s of CPU, most of what a command on tiny data takes. Here it is paid once.
- A process is a real one: its streams may be closed, full or pipes, and it can be killed. Those that it starts by
  `multiprocessing` are forked from the same server.
- Tests about imports, or about the interpreter's own start, use `subprocess` instead.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Thread
from typing import Any

from tests.support.paths import ROOT

PRELOADED = ["tests.support.preloaded"]
PIPE, UNREAD = "a pipe", "a pipe without a reader"

_context: ForkServerContext = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Command:
    """A running `python -m MODULE ARGUMENTS`, `python -c CODE ARGUMENTS`, or `python SCRIPT ARGUMENTS` for a path.

    stdout, stderr: PIPE, UNREAD, the path of a file to write to, or None for a closed stream.
    file_size: the size in bytes that no file may exceed.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        stdout: str | Path | None = PIPE,
        stderr: str | Path | None = PIPE,
        file_size: int | None = None,
        directory: Path = ROOT,
    ) -> None:
        readers, streams = [], []
        for given in (stdout, stderr):
            reader, writer = _context.Pipe(duplex=False) if given in (PIPE, UNREAD) else (None, given)
            if reader and given == UNREAD:
                reader.close()
                reader = None
            readers.append(reader)
            streams.append(writer)
        environment = {**os.environ, **(environment or {})}
        self._process = _context.Process(
            target=_execute, args=(str(program), list(map(str, arguments)), environment, streams, file_size, directory)
        )
        self._process.start()
        for writer in streams:
            if isinstance(writer, Connection):
                writer.close()
        self.stdout, self.stderr = (
            io.TextIOWrapper(io.FileIO(os.dup(reader.fileno())), encoding="utf-8") if reader else io.StringIO()
            for reader in readers
        )
        for reader in readers:
            if reader:
                reader.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that ended the process, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end, kill the process after `timeout` seconds, and return its exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Read both streams to their ends, wait, and return them."""
        read: dict[str, str] = {}
        threads = [
            Thread(target=lambda name=name, stream=stream: read.update({name: stream.read()}))
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr))
        ]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        finally:
            for thread in threads:
                thread.join()
            self.close()
        return read["stdout"], read["stderr"]

    def close(self) -> None:
        """Close the streams that are read."""
        self.stdout.close()
        self.stderr.close()


def run(program: str | Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; options as for `Command`."""
    command = Command(program, *arguments, **options)
    out, errors = command.communicate()
    return subprocess.CompletedProcess([str(program), *map(str, arguments)], command.wait(), out, errors)


def dcar(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the `dcar` command to its end; options as for `Command`."""
    return run("app.cli", *arguments, **options)


def _execute(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    streams: list[Any],
    file_size: int | None,
    directory: Path,
) -> None:
    """Become the command: in the forked process."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]  # it would start another
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # open to the end
    for number, stream in ((1, streams[0]), (2, streams[1])):
        if stream is None:
            os.close(number)
            continue
        opened = stream.fileno() if isinstance(stream, Connection) else os.open(stream, os.O_WRONLY)
        os.dup2(opened, number)
        stream.close() if isinstance(stream, Connection) else os.close(opened)
    sys.stdout = _stream(1) if streams[0] is not None else None
    sys.stderr = _stream(2) if streams[1] is not None else None
    code = arguments.pop(0) if program == "-c" else None
    sys.argv = [program, *arguments]
    if file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        if code is not None:
            exec(code, {"__name__": "__main__"})
        elif Path(program).suffix == ".py":
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            sys.modules.pop(program, None)  # it runs as __main__, and was imported before
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _stream(number: int) -> io.TextIOWrapper:
    """Open a standard stream as the interpreter does at its start."""
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(number, "w", closefd=False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace" if number == 2 else "strict",
        line_buffering=number == 2,
        write_through=unbuffered,
    )
