"""The training loop, shared by all methods.

    caption + image -> batch -> token weights -> prompted features -> L (see objective) -> trainables

- The best epoch by validation recall is kept (mean of R@1 in both directions, queries encoded from their text alone).
  Validation also decides whether queries use the predicted token weights. The test split is never read.
- With a run directory, a killed run resumes where it stopped. On the CPU the final weights equal those of an
  uninterrupted run bit for bit. Its state loads without executing code (`weights_only`).
- The learning curve is log.csv, and TensorBoard event files with the extra `tensorboard`.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR
from dcar_core.training.finished import STATE_FILE
from dcar_core.training.hard_negatives import train_second_stage, tune_on_hard_negatives
from dcar_core.training.objective import MixedPrecision, accumulate_gradients
from dcar_core.training.prepared_split import FeatureCache, PreparedSplit, prepare_split
from dcar_core.training.validation import Recall, choose_query_weights, evaluate, mean_r1
from dcar_core.util.arrays import Rows
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DivergedError, MissingExtraError, TrainingError
from dcar_core.util.files import csv_text, write_bytes

LOG_FILE = "log.csv"
SAVE_EVERY_S = 20.0
MAX_GRADIENT_NORM = 1.0
_FORMAT: dict[str, Any] = {"state format": 2}


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run: validation recall of the best epoch, and one record for each epoch."""

    best: Recall
    epoch: int
    seconds: float
    history: list[dict[str, Any]]


@dataclass
class _Progress:
    """The position of a run.

    history: one record for each finished epoch. best_epoch: the number of the best one.
    step, losses: finished batches of the current epoch.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        return len(self.history)


def train(
    model: DCAR, training: Dataset, validation: Dataset, config: TrainConfig,
    *, run: Path | None = None, cache: FeatureCache | None = None, tensorboard: bool = False,
) -> TrainResult:  # fmt: skip
    """Train in place. The model ends at its best epoch, in eval mode.

    Args:
        run: directory for state.pt, log.csv and tensorboard/; None writes nothing. The caller removes the state with
            `delete_state` once the result is saved.

    Raises:
        DataError: an image cannot be read.
        DivergedError: the loss or a validation vector is not finite.
        TrainingError: `run` holds the state of another run.
    """
    torch.manual_seed(config.seed)
    train_split = prepare_split(training, model, for_training=True, cache=cache)
    val_split = prepare_split(validation, model, for_training=False, cache=cache)
    if not any(p.requires_grad for _, p in model.trainables()):  # zero-shot CLIP
        if run is not None:
            (run / LOG_FILE).unlink(missing_ok=True)  # left by another method
        return TrainResult(evaluate(model, val_split), 0, 0.0, [])
    loop = _TrainingLoop(model, train_split, val_split, config, run)
    board = run / "tensorboard" if run is not None and tensorboard else None
    label, done = f"training {model.config.method}", loop.finished_steps
    with (
        tensorboard_log(board, loop.progress.epoch) as log,
        progress_bar(loop.total_steps, label, "batch", initial=done) as bar,
    ):
        while not loop.is_finished:
            loop.run_epoch(on_step=bar.update)
            record = loop.finish_epoch()
            log(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", val_r1=f"{mean_r1(record):.1f}")
    return loop.keep_best_epoch()


class _TrainingLoop:
    """Epochs of optimisation steps, validation after each, and the state from which a run resumes.

    The state holds everything that the next step depends on. The order of an epoch's pairs follows from the seed and
    the epoch alone.
    """

    def __init__(
        self, model: DCAR, train_split: PreparedSplit, val_split: PreparedSplit, config: TrainConfig, run: Path | None
    ) -> None:
        self.model, self.train_split, self.val_split = model, train_split, val_split
        self.config, self.run = config, run
        self.parameters = [p for _, p in model.trainables() if p.requires_grad]
        self.lr = config.lr * model.method.lr_factor
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=config.weight_decay)
        self.precision = MixedPrecision(config.amp, model.backbone.device)
        self.batches = math.ceil(len(train_split) / config.batch_size)
        self.total_steps = self.batches * config.epochs
        self.progress, self.best_weights = _Progress(), self._copy_trainables()
        if run is not None:
            # Everything that determines a run; a state with any other value belongs to another run.
            self.identity = {
                **_FORMAT,
                "backbone": model.backbone.content_hash(),
                "method": model.config.with_query_weights("none").to_dict(),
                "training data": train_split.key,
                "validation data": val_split.key,
                **replace(config, amp=self.precision.name).to_dict(),
            }
            self._restore(run)
        self.saved = time.monotonic()
        self.started = self.saved - self.progress.seconds

    @property
    def finished_steps(self) -> int:
        """Steps of this run so far, those before a restart included."""
        return self.progress.epoch * self.batches + self.progress.step

    @property
    def is_finished(self) -> bool:
        """True after the last epoch, or after `patience` epochs without a better one."""
        at, config = self.progress, self.config
        return at.epoch >= config.epochs or 0 < config.patience <= at.epoch - at.best_epoch

    def run_epoch(self, on_step: Callable[[], object]) -> None:
        """Run the remaining steps of the current epoch."""
        self.model.train()
        order = np.random.default_rng([self.config.seed, self.progress.epoch + 1]).permutation(len(self.train_split))
        for rows in np.array_split(order, self.batches)[self.progress.step :]:
            self._step(np.sort(rows))
            on_step()
            if time.monotonic() - self.saved > SAVE_EVERY_S:
                self._save()

    def finish_epoch(self) -> dict[str, Any]:
        """Validate, keep the best weights, and return the record. Raise DivergedError if a vector is not finite."""
        query, recall = choose_query_weights(self.model, self.val_split)
        at, seconds, loss = self.progress, time.monotonic() - self.started, float(np.mean(self.progress.losses))
        record = {"epoch": at.epoch + 1, "loss": loss, "query": query, **recall, "seconds": seconds}
        at.history.append(record)
        at.step, at.losses = 0, []
        if at.best_epoch == 0 or mean_r1(recall) > mean_r1(at.history[at.best_epoch - 1]):
            at.best_epoch, self.best_weights = at.epoch, self._copy_trainables()
        self._save()
        if self.run is not None:
            write_csv(self.run, at.history)
        return record

    def keep_best_epoch(self) -> TrainResult:
        """Load the weights of the best epoch into the model, train what follows the epochs, and return the result."""
        at, model = self.progress, self.model.eval()
        best, finish = at.history[at.best_epoch - 1], model.method.finish
        model.load_state_dict(self.best_weights, strict=False)
        model.config = model.config.with_query_weights(best["query"])
        recall = {name: value for name, value in best.items() if "_r" in name}
        if finish is not None and model.changes is not None:
            finish(model.changes, lambda: mean_r1(evaluate(model, self.val_split)))
            recall = evaluate(model, self.val_split)
        if model.config.loss.hard_negatives:
            recall = tune_on_hard_negatives(model, self.train_split, self.val_split, self.config.seed)
        if model.query_prompts is not None:
            train_second_stage(model, self.train_split, self.val_split, self.config.seed)
        return TrainResult(recall, at.best_epoch, time.monotonic() - self.started, at.history)

    def _step(self, rows: Rows) -> None:
        for options in self.optimizer.param_groups:
            options["lr"] = self.lr * _lr_factor(self.finished_steps, self.total_steps, self.config.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        parts, precision = self.config.accumulate, self.precision
        loss = accumulate_gradients(self.model, self.train_split, rows, parts=parts, precision=precision)
        if not math.isfinite(loss):
            what = f"{self.model.config.method} diverged: the loss is {loss} in epoch {self.progress.epoch + 1}"
            raise DivergedError(f"{what}; use a lower --lr")
        precision.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        precision.scaler.step(self.optimizer)
        precision.scaler.update()
        self.progress.losses.append(loss)
        self.progress.step += 1

    def _save(self) -> None:
        self.saved = time.monotonic()
        self.progress.seconds = self.saved - self.started
        if self.run is None:
            return
        content = {
            "identity": self.identity,
            "trainables": {name: p.detach() for name, p in self.model.trainables()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "progress": asdict(self.progress),
            "best_weights": self.best_weights,
        }
        self.run.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch.save reports a full disk as an internal error, so write the file ourselves
        torch.save(content, buffer)
        write_bytes(self.run / STATE_FILE, buffer.getbuffer())

    def _restore(self, run: Path) -> None:
        """Continue from the state of a run, if there is one. Raise TrainingError if it is of another run."""
        path = run / STATE_FILE
        if not path.is_file():
            return
        try:
            content = dict(torch.load(path, map_location=self.model.backbone.device, weights_only=True))
            found, wanted = content["identity"], self.identity
        except Exception as error:  # torch raises many types for a file that it did not write
            raise TrainingError(f"{path} is not a training state ({type(error).__name__}); delete it") from error
        different = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
        if different:
            raise TrainingError(
                f"{run} holds an unfinished run with another {', '.join(different)}; finish it with the same command, "
                f"choose another --out, or discard it with --restart"
            )
        self.model.load_state_dict(content["trainables"], strict=False)
        self.optimizer.load_state_dict(content["optimizer"])
        self.precision.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"].cpu())
        self.progress = _Progress(**content["progress"])
        self.best_weights = content["best_weights"]

    def _copy_trainables(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.trainables()}


def _lr_factor(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of all steps, then a cosine to 0."""
    if step < (warmup_steps := max(1, int(warmup * total))):
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))


def delete_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)


def write_csv(directory: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write log.csv with one row an epoch. The file is rewritten each time, so a resumed run has no duplicate rows."""
    write_bytes(directory / LOG_FILE, csv_text(history[0], *(record.values() for record in history)).encode())


@contextmanager
def tensorboard_log(directory: Path | None, epoch: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes an epoch's record. Events after `epoch`, left by a killed run, are purged."""
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
