"""The learning curve of a run: log.csv, and TensorBoard event files with the extra `tensorboard`."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcar_core.util.errors import MissingExtraError
from dcar_core.util.files import atomic_writer

LOG_FILE = "log.csv"


def write_csv(directory: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write log.csv with one row an epoch. The file is rewritten each time, so a resumed run has no duplicate rows."""
    directory.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_writer(directory / LOG_FILE) as file:
        file.write(text.getvalue().encode())


class TensorBoard:
    """Scalars for `tensorboard --logdir`. Events after `epoch`, left by a killed run, are purged.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, epoch: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("a TensorBoard log", "tensorboard") from error
        self._writer = SummaryWriter(str(directory), purge_step=epoch + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "epoch" and isinstance(value, int | float):
                group = "validation" if "_r" in name else "training"
                self._writer.add_scalar(f"{group}/{name}", value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
