"""Entry points: run a command line, and report an error that the user can fix as one line on stderr."""

import logging
import sys
from collections.abc import Callable

from dcar_core.util.console import prepare_streams
from dcar_core.util.errors import DcarError
from dcar_core.util.files import DISK_ERRORS

_INTERRUPTED = 130
_RESUME = "run the same command again to resume a job or a training"


class _LogFormatter(logging.Formatter):
    """Formats progress as the bare message, and warnings and errors with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


def run_command(command: Callable[[], object]) -> int:
    """Run a command line and return its exit status.

    Errors of `DcarError` and files that cannot be used become one line; any other exception is a bug and passes.
    """
    prepare_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        try:
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


def _describe(error: OSError) -> str:
    path = error.filename2 or error.filename
    message = f"{path}: {error.strerror}" if path else str(error.strerror)
    return f"{message}; completed files are unchanged, {_RESUME}" if error.errno in DISK_ERRORS else message


def _report(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
