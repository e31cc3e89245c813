"""A run's curve for people and programs: log.csv always, TensorBoard's event files with the extra."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcar_core.util.errors import MissingExtraError
from dcar_core.util.files import atomic_writer

CSV = "log.csv"


def write_csv(directory: Path, history: Sequence[dict[str, Any]]) -> None:
    """log.csv, a line for every epoch; written whole, so that a run that went on has no line twice."""
    if not history:
        return
    directory.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(history)
    with atomic_writer(directory / CSV) as file:
        file.write(text.getvalue().encode())


class TensorBoard:
    """Scalars for `tensorboard --logdir`; events after `epoch` that a killed run left are purged.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, epoch: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("a TensorBoard log", "tensorboard") from error
        self._writer = SummaryWriter(str(directory), purge_step=epoch + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "epoch" and isinstance(value, int | float):
                group = "validation" if "_r" in name else "training"
                self._writer.add_scalar(f"{group}/{name}", value, line["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
