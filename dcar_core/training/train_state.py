"""The files of a training run: the state from which a killed run resumes, and the learning curve.

- The file holds everything that the next step depends on: trainables, optimizer, torch's random state, the position in
  the epoch, and the best epoch so far. The order of an epoch's pairs follows from the seed and the epoch alone.
- It is written to a temporary name, flushed and renamed, so a killed run leaves either the last or the previous state.
- It loads without executing code (`weights_only`).
- The curve is log.csv, and TensorBoard event files with the extra `tensorboard`.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcar_core.model.config import QueryWeights
from dcar_core.model.dcar import DCAR
from dcar_core.training.validation import Recall
from dcar_core.util.errors import MissingExtraError, TrainingError
from dcar_core.util.files import atomic_writer

STATE_FILE, LOG_FILE = "state.pt", "log.csv"
_FORMAT = 2


@dataclass
class TrainProgress:
    """The position of a run and its best epoch.

    epoch: number of finished epochs. step, losses: finished batches of the current epoch.
    history: one record for each finished epoch.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = 0
    best_recall: Recall = field(default_factory=dict)
    best_query: QueryWeights = "none"
    history: list[dict[str, Any]] = field(default_factory=list)


class TrainStateFile:
    """The state file of one run; without a directory nothing is saved.

    identity: the settings, data and weights that determine the run.
    """

    def __init__(self, directory: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = directory / STATE_FILE if directory is not None else None
        self._identity = {"state format": _FORMAT, **identity}

    def save(
        self,
        model: DCAR,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        progress: TrainProgress,
        best_weights: Mapping[str, Tensor],
    ) -> None:
        if self._path is None:
            return
        content = {
            "identity": self._identity,
            "trainables": {name: p.detach() for name, p in model.trainables()},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "progress": asdict(progress),
            "best_weights": dict(best_weights),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch.save reports a full disk as an internal error, so write the file ourselves
        torch.save(content, buffer)
        with atomic_writer(self._path) as file:
            file.write(buffer.getbuffer())

    def restore(
        self, model: DCAR, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> tuple[TrainProgress, dict[str, Tensor]] | None:
        """Restore model, optimizer, scaler and random state in place.

        Returns:
            The progress and the weights of the best epoch; None without a state.

        Raises:
            TrainingError: the file belongs to a run with other settings, data or weights; the message names them.
        """
        if self._path is None or not self._path.is_file():
            return None
        try:
            content = torch.load(self._path, map_location=model.backbone.device, weights_only=True)
            identity = content["identity"]
        except Exception as error:  # torch raises many types for a file that it did not write
            raise TrainingError(f"{self._path} is not a training state ({type(error).__name__}); delete it") from error
        if identity != self._identity:
            keys = sorted(identity.keys() | self._identity.keys())
            different = [key for key in keys if identity.get(key) != self._identity.get(key)]
            raise TrainingError(
                f"{self._path.parent} holds an unfinished run with another {', '.join(different)}; finish it with the "
                f"same command, choose another --out, or discard it with --restart"
            )
        model.load_state_dict(content["trainables"], strict=False)
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"].cpu())
        return TrainProgress(**content["progress"]), dict(content["best_weights"])


def delete_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)


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
