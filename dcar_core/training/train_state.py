"""A training run's state on disk, so that a run that was killed goes on as if nothing had happened.

Everything that the next step depends on is in it: trainables, optimizer, torch's random state, the position in the
epoch (whose order follows from seed and epoch alone), and the best epoch so far. The file is written aside, flushed
and renamed, so a kill at any moment leaves the last state or the one before. It loads without running code.
"""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcar_core.model.config import QueryWeights
from dcar_core.model.dcar import DCAR
from dcar_core.training.validation import Recall
from dcar_core.util.errors import TrainingError
from dcar_core.util.files import atomic_writer

FILE = "state.pt"


@dataclass
class Progress:
    """How far a run is. epoch: finished ones; step, losses: batches of the next one that are done."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = 0
    best_recall: Recall = field(default_factory=dict)
    best_query: QueryWeights = "none"
    history: list[dict[str, Any]] = field(default_factory=list)


class State:
    """The state file of one run. `identity` is all that the run follows from; with no directory nothing is kept."""

    def __init__(self, directory: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = directory / FILE if directory is not None else None
        self._identity = dict(identity)

    def save(
        self, model: DCAR, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, progress: Progress,
        kept: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        if self._path is None:
            return
        content = {
            "identity": self._identity,
            "trainables": {name: p.detach() for name, p in model.trainables()},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "progress": asdict(progress),
            "kept": dict(kept),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = io.BytesIO()  # a few MB: torch's own writer tells a full disk as a bug
        torch.save(content, whole)
        with atomic_writer(self._path) as file:
            file.write(whole.getbuffer())

    def restore(
        self, model: DCAR, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> tuple[Progress, dict[str, Tensor]] | None:
        """Bring everything to where the run was; None when there is nothing to go on from.

        Raises:
            TrainingError: the file is of a run with other settings, data or weights; the message names what differs.
        """
        if self._path is None or not self._path.is_file():
            return None
        try:
            content = torch.load(self._path, map_location=model.backbone.device, weights_only=True)
            found = content["identity"]
        except Exception as error:  # torch raises many kinds for a file that is not one of its own
            raise TrainingError(f"{self._path} is no training state ({type(error).__name__}); delete it") from error
        if found != self._identity:
            keys = sorted(found.keys() | self._identity.keys())
            differs = [key for key in keys if found.get(key) != self._identity.get(key)]
            raise TrainingError(
                f"{self._path.parent} holds an unfinished run with another {', '.join(differs)}; finish it with the "
                f"same command, give another --out, or forget it with --restart"
            )
        with torch.no_grad():
            for name, parameter in model.trainables():
                parameter.copy_(content["trainables"][name])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"].cpu())
        return Progress(**content["progress"]), dict(content["kept"])


def forget(directory: Path) -> None:
    """Remove the state of a run that is finished or not wanted."""
    (directory / FILE).unlink(missing_ok=True)
