"""Entry points of commands: errors that the user can fix as one line on stderr, and standard streams that survive.

They may be closed, full, or of another encoding.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from dcar_core.util.errors import DcarError, requires_pytorch
from dcar_core.util.files import DISK_ERRORS

if TYPE_CHECKING:
    from tqdm import tqdm

_INTERRUPTED = 130
_RESUME = "run the same command again to resume a job or a training"


def run_command(command: Callable[[], object]) -> int:
    """Run a command line and return its exit status.

    Errors of `DcarError` and files that cannot be used become one line; any other exception is a bug and passes.
    """
    _prepare_streams()
    if os.getpid() == 1:  # of a container: the kernel ignores signals to this process that have no handler
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        try:
            with requires_pytorch("this command"):
                command()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _report(f"interrupted; {_RESUME}")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except DcarError as error:
        _report(str(error))
        return error.exit_code
    except OSError as error:
        if not error.strerror or (error.filename is None and error.errno not in DISK_ERRORS):
            raise
        _report(_describe(error))
        return 1
    return 0


def show_progress(*, quiet: bool = False) -> None:
    """Let the packages name what they do on stderr, so that no command is silent for long."""
    for package in ("dcar_core", "index_jobs"):
        logging.getLogger(package).setLevel(logging.WARNING if quiet else logging.INFO)


def progress_bar(total: int, label: str, unit: str, *, is_shown: bool = True, **options: Any) -> "tqdm[NoReturn]":
    """Return a bar on stderr; a log file has a line every ten seconds. options: further ones of tqdm."""
    from tqdm import tqdm

    pause = 0.5 if sys.stderr and sys.stderr.isatty() else 10
    is_hidden = not is_shown or sys.stderr is None
    return tqdm(total=total, desc=label, unit=unit, disable=is_hidden, mininterval=pause, dynamic_ncols=True, **options)


def dump_json(value: Any) -> str:
    """Return JSON for stdout, in ASCII if stdout cannot show all of Unicode."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    return json.dumps(value, ensure_ascii=not unicode)


class _LogFormatter(logging.Formatter):
    """Formats progress as the bare message, and warnings and errors with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


class _Stream:
    """A standard stream. Write errors of stderr are ignored, such as those of a progress bar on a full disk."""

    def __init__(self, stream: TextIO, is_output: bool) -> None:
        self._stream, self._is_output = stream, is_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text != "":  # libraries test a stream with an empty text and ignore every error
            self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, operation: Callable[[], object]) -> None:
        """Raise one clear error for stdout. A pipe without a reader is an ordinary end."""
        try:
            operation()
        except OSError as error:
            if not self._is_output:
                return
            with contextlib.suppress(OSError):  # Python flushes once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise DcarError(f"the output cannot be written: {error.strerror or error}") from None


def _prepare_streams() -> None:
    """Make the streams of a command safe to write to."""
    for descriptor in range(3):  # another file would take the place of a closed one, and child processes write to it
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # open to the end
            os.set_inheritable(stream.fileno(), True)  # as standard streams are, on which child processes rely
            setattr(sys, name, stream)
        elif not isinstance(stream, _Stream):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Stream(stream, name == "stdout"))
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        sys.stderr.write("WARNING: file names are not read as UTF-8 here; set PYTHONUTF8=1 or LC_ALL=C.UTF-8\n")


def _describe(error: OSError) -> str:
    path = error.filename2 or error.filename
    message = f"{path}: {error.strerror}" if path else str(error.strerror)
    return f"{message}; completed files are unchanged, {_RESUME}" if error.errno in DISK_ERRORS else message


def _report(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
