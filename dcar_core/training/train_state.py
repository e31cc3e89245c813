"""The files of a training run: the state from which a killed run resumes, and the learning curve.

- The state is written to a temporary name, flushed and renamed, so a killed run leaves either the last or the previous
  one. It loads without executing code (`weights_only`).
- The curve is log.csv, and TensorBoard event files with the extra `tensorboard`.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcar_core.training.finished import STATE_FILE
from dcar_core.util.errors import MissingExtraError, TrainingError
from dcar_core.util.files import csv_text, write_bytes

LOG_FILE = "log.csv"
_FORMAT: dict[str, Any] = {"state format": 2}


def save_state(directory: Path, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write the state of a run. identity: the settings, data and weights that determine it."""
    directory.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch.save reports a full disk as an internal error, so write the file ourselves
    torch.save({"identity": {**_FORMAT, **identity}, **content}, buffer)
    write_bytes(directory / STATE_FILE, buffer.getbuffer())


def load_state(directory: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return what `save_state` wrote; None without a state.

    Raises:
        TrainingError: the file belongs to a run with other settings, data or weights; the message names them.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    try:
        content = dict(torch.load(path, map_location=device, weights_only=True))
        found, wanted = content.pop("identity"), {**_FORMAT, **identity}
    except Exception as error:  # torch raises many types for a file that it did not write
        raise TrainingError(f"{path} is not a training state ({type(error).__name__}); delete it") from error
    different = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    if different:
        raise TrainingError(
            f"{directory} holds an unfinished run with another {', '.join(different)}; finish it with the same "
            f"command, choose another --out, or discard it with --restart"
        )
    return content


def delete_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)


def write_csv(directory: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write log.csv with one row an epoch. The file is rewritten each time, so a resumed run has no duplicate rows."""
    write_bytes(directory / LOG_FILE, csv_text(history[0], *(record.values() for record in history)).encode())


@contextmanager
def tensorboard_log(directory: Path | None, epoch: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes an epoch's record for `tensorboard --logdir`; without a directory, nothing.

    Events after `epoch`, left by a killed run, are purged.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """
    if directory is None:
        yield lambda record: None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("a TensorBoard log", "tensorboard") from error

    def write(record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "epoch" and isinstance(value, int | float):
                group = "validation" if "_r" in name else "training"
                writer.add_scalar(f"{group}/{name}", value, record["epoch"])
        writer.flush()

    with SummaryWriter(str(directory), purge_step=epoch + 1) as writer:
        yield write
