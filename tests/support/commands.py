"""Commands of this project in processes of their own, forked from one that has imported
everything.

- Importing PyTorch and open_clip takes 5 s of CPU, most of what a command on tiny data
  takes. Here it is paid once.
- A process is a real one, and can be killed. Those that it starts by `multiprocessing`
  are forked from the same server.
- Tests about imports, or about the interpreter's own start, use `subprocess` instead.
"""

import atexit
import io
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

PRELOADED = ["tests.support.preloaded"]
PIPE = "a pipe"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Command:
    """A running `python -m MODULE ARGUMENTS`, `python -c CODE ARGUMENTS`, or `python
    SCRIPT ARGUMENTS` for a path.

    stdout, stderr: PIPE, or the path of a file to write to.
    file_size: the size in bytes that no file may exceed.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        stdout: str | Path = PIPE,
        stderr: str | Path = PIPE,
        file_size: int | None = None,
        directory: Path = ROOT,
    ) -> None:
        pipes = [
            _context.Pipe(duplex=False) if target == PIPE else None
            for target in (stdout, stderr)
        ]
        streams = [
            pipe[1] if pipe else target
            for pipe, target in zip(pipes, (stdout, stderr), strict=True)
        ]
        given = (
            str(program),
            list(map(str, arguments)),
            {**os.environ, **(environment or {})},
        )
        self._process = _context.Process(
            target=_execute, args=(*given, streams, file_size, directory)
        )
        self._process.start()
        self.stdout, self.stderr = map(_reader, pipes)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that ended the process, or None while it
        runs.
        """
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end, kill the process after `timeout` seconds, and return its
        exit status.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Read both streams to their ends, wait, and return them."""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            out = pool.submit(self.stdout.read)
            errors = pool.submit(self.stderr.read)
            self.wait(timeout)
            return out.result(), errors.result()

    def close(self) -> None:
        """Close the streams that are read."""
        self.stdout.close()
        self.stderr.close()


def run(
    program: str | Path,
    *arguments: object,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; options as for `Command`."""
    command = Command(program, *arguments, **options)
    out, errors = command.communicate()
    return subprocess.CompletedProcess(
        [str(program), *map(str, arguments)],
        command.wait(),
        out,
        errors,
    )


def dcar(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the `dcar` command to its end; options as for `Command`."""
    return run("app.cli", *arguments, **options)


def _reader(
    pipe: tuple[Connection, Connection] | None,
) -> io.TextIOWrapper | io.StringIO:
    """Close the process's end of a pipe here, and open the other one."""
    if pipe is None:
        return io.StringIO()
    pipe[1].close()
    with pipe[0]:
        return io.TextIOWrapper(io.FileIO(os.dup(pipe[0].fileno())), encoding="utf-8")


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
        if isinstance(stream, Connection):
            opened = stream.fileno()
        else:
            opened = os.open(stream, os.O_WRONLY)
        os.dup2(opened, number)
        stream.close() if isinstance(stream, Connection) else os.close(opened)
    sys.stdout, sys.stderr = (_stream(number) for number in (1, 2))
    code = arguments.pop(0) if program == "-c" else None
    sys.argv = [program, *arguments]
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        if code is not None:
            exec(code, {"__name__": "__main__"})
        elif Path(program).suffix == ".py":
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            # it runs as __main__, and was imported before
            sys.modules.pop(program, None)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _stream(number: int) -> io.TextIOWrapper:
    """Open a standard stream as the interpreter does at its start."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(number, "w", closefd=False)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    errors = "backslashreplace" if number == 2 else "strict"
    buffer: Any = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding,
        errors,
        line_buffering=number == 2,
        write_through=unbuffered,
    )
