"""The training loop, shared by all methods.

    caption + image -> batch -> token weights -> prompted features -> L (see objective) -> trainables

- The best epoch by validation recall is kept (mean of R@1 in both directions, queries encoded from their text alone).
  Validation also decides whether queries use the predicted token weights. The test split is never read.
- With a run directory, a killed run resumes where it stopped. On the CPU the final weights equal those of an
  uninterrupted run bit for bit.
- Under torchrun the processes share each batch; only the leader writes files.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dcar_core.data import Dataset
from dcar_core.model.config import QueryWeights, TrainConfig
from dcar_core.model.dcar import DCAR
from dcar_core.training.distributed import SINGLE_PROCESS, ProcessGroup
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.grad_cache import MixedPrecision, accumulate_gradients
from dcar_core.training.prepared_split import PreparedSplit, prepare_split
from dcar_core.training.train_state import LOG_FILE, TensorBoard, TrainProgress, TrainStateFile, write_csv
from dcar_core.training.validation import Recall, choose_query_weights, evaluate, mean_r1
from dcar_core.util.arrays import Rows
from dcar_core.util.errors import DivergedError

SAVE_EVERY_S = 20.0
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run: validation recall of the best epoch, and one record for each epoch."""

    best: Recall
    epoch: int
    seconds: float
    history: list[dict[str, Any]]


def train(
    model: DCAR,
    training: Dataset,
    validation: Dataset,
    config: TrainConfig,
    *,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    run: Path | None = None,
    cache: FeatureCache | None = None,
    tensorboard: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> TrainResult:
    """Train in place. The model ends at its best epoch, in eval mode.

    Args:
        on_epoch: called with the record of each epoch that this call finishes.
        run: directory for state.pt, log.csv and tensorboard/; None writes nothing. The caller removes the state with
            `train_state.delete_state` once the result is saved.

    Raises:
        DataError: an image cannot be read.
        DivergedError: the loss or a validation vector is not finite.
        TrainingError: `run` holds the state of another run.
    """
    torch.manual_seed(config.seed)
    shows_progress = progress and group.is_leader
    with group.leader_first():
        train_split = prepare_split(training, model, for_training=True, progress=shows_progress, cache=cache)
        val_split = prepare_split(validation, model, for_training=False, progress=shows_progress, cache=cache)
    if not any(p.requires_grad for _, p in model.trainables()):  # zero-shot CLIP
        if run is not None and group.is_leader:
            (run / LOG_FILE).unlink(missing_ok=True)  # left by another method
        return TrainResult(evaluate(model, val_split), 0, 0.0, [])
    loop = _TrainingLoop(model, train_split, val_split, config, run, group)
    loop.restore()
    has_board = tensorboard and group.is_leader
    board = TensorBoard(run / "tensorboard", loop.progress.epoch) if run is not None and has_board else None
    with tqdm(total=loop.total_steps, initial=loop.finished_steps, desc=f"training {model.config.method}",
              unit="batch", disable=not shows_progress) as bar:  # fmt: skip
        while not loop.is_finished:
            loop.run_epoch(on_step=bar.update)
            record = loop.finish_epoch()
            if group.is_leader:
                if board is not None:
                    board.write(record)
                on_epoch(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", val_r1=f"{mean_r1(record):.1f}")
    if board is not None:
        board.close()
    return loop.keep_best_epoch()


class _TrainingLoop:
    """Epochs of optimisation steps, validation after each, and the state from which a run resumes."""

    def __init__(
        self,
        model: DCAR,
        train_split: PreparedSplit,
        val_split: PreparedSplit,
        config: TrainConfig,
        run: Path | None,
        group: ProcessGroup,
    ) -> None:
        self.model, self.train_split, self.val_split = model, train_split, val_split
        self.config, self.run, self.group = config, run, group
        self.parameters = [p for _, p in model.trainables() if p.requires_grad]
        self.lr = config.lr * model.method.lr_factor
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=config.weight_decay)
        self.precision = MixedPrecision(config.amp, model.backbone.device)
        self.batches = math.ceil(len(train_split) / config.batch_size)
        self.total_steps = self.batches * config.epochs
        exact = replace(config, amp=self.precision.name)
        identity = _run_identity(model, train_split, val_split, exact) if run is not None else {}
        self.state = TrainStateFile(run, identity)
        self.progress, self.best_weights = TrainProgress(), _copy_trainables(model)
        self.started = self.saved = time.monotonic()

    def restore(self) -> None:
        """Resume from the state file, if there is one."""
        restored = self.state.restore(self.model, self.optimizer, self.precision.scaler)
        if restored is not None:
            self.progress, self.best_weights = restored
        self.started = time.monotonic() - self.progress.seconds

    @property
    def finished_steps(self) -> int:
        """Steps of this run so far, those before a restart included."""
        return self.progress.epoch * self.batches + self.progress.step

    @property
    def is_finished(self) -> bool:
        """True after the last epoch, or after `patience` epochs without a better one."""
        at, config = self.progress, self.config
        is_stalled = config.patience > 0 and at.epoch - at.best_epoch >= config.patience
        return at.epoch >= config.epochs or is_stalled

    def run_epoch(self, on_step: Callable[[], object]) -> None:
        """Run the remaining steps of the current epoch."""
        self.model.train()
        order = np.random.default_rng([self.config.seed, self.progress.epoch + 1]).permutation(len(self.train_split))
        for rows in np.array_split(order, self.batches)[self.progress.step :]:
            self._step(np.sort(rows))
            on_step()
            if self.group.is_leader and time.monotonic() - self.saved > SAVE_EVERY_S:
                self._save()

    def finish_epoch(self) -> dict[str, Any]:
        """Validate, keep the best weights, and return the record. Raise DivergedError if a vector is not finite."""
        choice: tuple[QueryWeights, Recall] | DivergedError | None = None
        if self.group.is_leader:
            try:
                choice = choose_query_weights(self.model, self.val_split)
            except DivergedError as error:
                choice = error
        choice = self.group.broadcast(choice)  # the leader's; an error too, for which the others would wait
        assert choice is not None
        if isinstance(choice, DivergedError):
            raise choice
        query, recall = choice
        at = self.progress
        at.epoch += 1
        at.seconds = time.monotonic() - self.started
        loss = float(np.mean(at.losses))
        record = {"epoch": at.epoch, "loss": loss, "query": query, **recall, "seconds": at.seconds}
        at.history.append(record)
        at.step, at.losses = 0, []
        if mean_r1(recall) > at.best:
            at.best, at.best_epoch, at.best_recall, at.best_query = mean_r1(recall), at.epoch, recall, query
            self.best_weights = _copy_trainables(self.model)
        if self.group.is_leader:
            self._save()
            if self.run is not None:
                write_csv(self.run, at.history)
        return record

    def keep_best_epoch(self) -> TrainResult:
        """Load the weights of the best epoch into the model, and return the result."""
        self.model.load_state_dict(self.best_weights, strict=False)
        at = self.progress
        self.model.config = self.model.config.with_query_weights(at.best_query)
        self.model.eval()
        recall, finish = at.best_recall, self.model.method.finish
        if finish is not None and self.model.changes is not None:
            finish(self.model.changes, lambda: mean_r1(evaluate(self.model, self.val_split)))
            recall = evaluate(self.model, self.val_split)
        return TrainResult(recall, at.best_epoch, at.seconds, at.history)

    def _step(self, rows: Rows) -> None:
        for options in self.optimizer.param_groups:
            options["lr"] = self.lr * _lr_factor(self.finished_steps, self.total_steps, self.config.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        loss = accumulate_gradients(
            self.model, self.train_split, rows, parts=self.config.accumulate, group=self.group,
            precision=self.precision,
        )  # fmt: skip
        if not math.isfinite(loss):
            raise DivergedError(
                f"{self.model.config.method} diverged: the loss is {loss} in epoch {self.progress.epoch + 1}; "
                f"use a lower --lr"
            )
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        scaler.step(self.optimizer)
        scaler.update()
        self.progress.losses.append(loss)
        self.progress.step += 1

    def _save(self) -> None:
        self.saved = time.monotonic()
        self.progress.seconds = self.saved - self.started
        self.state.save(self.model, self.optimizer, self.precision.scaler, self.progress, self.best_weights)


def _run_identity(
    model: DCAR, train_split: PreparedSplit, val_split: PreparedSplit, config: TrainConfig
) -> dict[str, Any]:
    """Return everything that determines a run; a state with any other value belongs to another run."""
    return {
        "backbone": model.backbone.content_hash(),
        "method": model.config.with_query_weights("none").to_dict(),
        "training data": train_split.key,
        "validation data": val_split.key,
        **config.to_dict(),
    }


def _lr_factor(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of all steps, then a cosine to 0."""
    warmup_steps = max(1, int(warmup * total))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))


def _copy_trainables(model: DCAR) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trainables()}
