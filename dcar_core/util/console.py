"""Standard streams that survive being closed, full, or of another encoding, without what libraries log twice.

Imports only the standard library.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from dcar_core.util.errors import DcarError


class _WrappedStream:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _TolerantStderr(_WrappedStream):
    """stderr that ignores write errors, such as those of a progress bar on a full disk."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _CheckedStdout(_WrappedStream):
    """stdout that turns a write error into one clear error. A pipe without a reader is an ordinary end."""

    def write(self, text: str) -> int:
        if text == "":  # libraries test a stream this way and ignore every error
            return 0
        with self._translated_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._translated_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):  # Python flushes once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise DcarError(f"the output cannot be written: {error.strerror or error}") from None


def prepare_streams() -> None:
    """Make the streams of a command safe to write to. Called once, by its entry point."""
    for descriptor in range(3):  # another file would take the place of a closed one, and child processes write to it
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, kind in (("stdout", _CheckedStdout), ("stderr", _TolerantStderr)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # open to the end
            os.set_inheritable(
                stream.fileno(), True
            )  # as standard streams are: processes rely on the first descriptors
            setattr(sys, name, stream)
        elif not isinstance(stream, _WrappedStream):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, kind(stream))
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        sys.stderr.write("WARNING: file names are not read as UTF-8 here; set PYTHONUTF8=1 or LC_ALL=C.UTF-8\n")


def dump_json(value: Any) -> str:
    """Return JSON for stdout, in ASCII if stdout cannot show all of Unicode."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    return json.dumps(value, ensure_ascii=not unicode)


@contextlib.contextmanager
def errors_raised_only() -> Iterator[None]:
    """Drop what open_clip logs as an error: it goes to the root logger, and the exception says the same."""

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logging.getLogger().addFilter(is_no_error)  # records of other loggers do not pass it
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_no_error)
