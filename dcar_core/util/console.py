"""Entry points of commands: errors that the user can fix as one line on stderr, and
progress.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from dcar_core.util.errors import DcarError, requires_pytorch
from dcar_core.util.files import DISK_ERRORS

if TYPE_CHECKING:
    from tqdm import tqdm

_INTERRUPTED = 130
_RESUME = "run the same command again to resume a job or a training"


def run_command(command: Callable[[], object]) -> int:
    """Run a command line and return its exit status.

    Errors of `DcarError` and files that cannot be used become one line; any other
    exception is a bug and passes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # what its encoding does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    # of a container: the kernel ignores signals to this process that have no handler
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # it has a handler of its own
    logging.getLogger("huggingface_hub").propagate = False
    try:
        with requires_pytorch("this command"):
            command()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _report(f"interrupted; {_RESUME}")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except DcarError as error:
        _report(str(error))
        return error.exit_code
    except OSError as error:
        if not error.strerror or (
            error.filename is None and error.errno not in DISK_ERRORS
        ):
            raise
        path = error.filename2 or error.filename
        if error.errno in DISK_ERRORS:
            hint = f"; completed files are unchanged, {_RESUME}"
        else:
            hint = ""
        _report(f"{f'{path}: ' if path else ''}{error.strerror}{hint}")
        return 1
    return 0


def show_progress(*, quiet: bool = False) -> None:
    """Let the packages name what they do on stderr, so that no command is silent for
    long.
    """
    for package in ("dcar_core", "index_jobs"):
        logging.getLogger(package).setLevel(logging.WARNING if quiet else logging.INFO)


def progress_bar(
    total: int,
    label: str,
    unit: str,
    *,
    is_shown: bool = True,
    **options: Any,
) -> "tqdm[NoReturn]":
    """Return a bar on stderr; a log file has a line every ten seconds. options: further
    ones of tqdm.
    """
    from tqdm import tqdm

    pause = 0.5 if sys.stderr.isatty() else 10
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        disable=not is_shown,
        mininterval=pause,
        dynamic_ncols=True,
        **options,
    )


class _LogFormatter(logging.Formatter):
    """Formats progress as the bare message, and warnings and errors with their
    level.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno <= logging.INFO:
            return message
        return f"{record.levelname.lower()}: {message}"


def _report(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
