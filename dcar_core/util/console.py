"""Standard streams as commands find them: closed, full, or of another encoding. None of that is to cost the work.

Only the standard library is imported.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from dcar_core.util.errors import DcarError


class _Wrapped:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Unheard(_Wrapped):
    """stderr: what cannot be written there, such as a progress bar on a full disk, is not."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Output(_Wrapped):
    """stdout: what cannot be written is one clear error; a pipe whose reader is gone is an ordinary end."""

    def write(self, text: str) -> int:
        if text == "":  # as libraries try whether a stream takes text, and pass over every error
            return 0
        with self._told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):  # Python writes what is left once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise DcarError(f"the output cannot be written: {error.strerror or error}") from None


def prepare_streams() -> None:
    """Make the streams of a command safe to write to. Called once, by its entry point."""
    for name, kind in (("stdout", _Output), ("stderr", _Unheard)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  # open to the end
        elif not isinstance(stream, _Wrapped):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, kind(stream))
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        sys.stderr.write("WARNING: names of files are not read as UTF-8 here; set PYTHONUTF8=1 or LC_ALL=C.UTF-8\n")


def json_text(value: Any) -> str:
    """JSON for stdout, in plain ASCII where that cannot show all of Unicode."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    return json.dumps(value, ensure_ascii=not unicode)
