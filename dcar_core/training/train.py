"""The training loop, shared by all methods.

    pairs -> batch -> objective (features by the method's parts, loss) -> gradients ->
    trainables

- The best epoch by validation recall is kept (mean of R@1 in both directions, queries
  encoded from their text alone). Validation also decides whether queries use the
  predicted token weights. The test split is never read.
- With a run directory, a killed run resumes after its last whole epoch. On the CPU the
  final weights equal those of an uninterrupted run bit for bit. Its state loads without
  executing code (`weights_only`).
"""

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR
from dcar_core.training.hard_negatives import train_second_stage, tune_on_hard_negatives
from dcar_core.training.objective import (
    MixedPrecision,
    accumulate_gradients,
    resolve_amp,
)
from dcar_core.training.prepared_split import (
    FeatureCache,
    PreparedSplit,
    prepare_split,
    split_key,
)
from dcar_core.training.validation import (
    Recall,
    choose_query_weights,
    evaluate,
    mean_r1,
)
from dcar_core.util.arrays import Rows
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DcarError, DivergedError
from dcar_core.util.files import csv_text, write_bytes

LOG_FILE = "log.csv"
STATE_FILE = "state.pt"  # of an unfinished run
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run: validation recall of the best epoch, and one record for
    each epoch.
    """

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
    run: Path | None = None,
    cache: FeatureCache | None = None,
) -> TrainResult:
    """Train in place. The model ends at its best epoch, in eval mode.

    Args:
        run: directory for state.pt and log.csv; None writes nothing. The caller removes
            the state with `delete_state` once the result is saved.

    Raises:
        DataError: an image cannot be read.
        DivergedError: the loss or a validation vector is not finite.
        DcarError: `run` holds the state of another run.
    """
    torch.manual_seed(config.seed)
    cache = cache or FeatureCache(None, model.backbone)
    train_split = prepare_split(training, model, for_training=True, cache=cache)
    val_split = prepare_split(validation, model, for_training=False, cache=cache)
    if not any(True for _ in model.trainables()):  # zero-shot CLIP
        if run is not None:
            (run / LOG_FILE).unlink(missing_ok=True)  # left by another method
        return TrainResult(evaluate(model, val_split), 0, 0.0, [])
    loop = _TrainingLoop(model, train_split, val_split, config)
    if run is not None:
        identity = describe_run(model, training, validation, config, cache)
    else:
        identity = {}
    if run is not None and (run / STATE_FILE).is_file():
        loop.restore(run, identity)
    label = f"training {model.config.method}"
    steps = loop.batches * config.epochs
    with progress_bar(steps, label, "batch", initial=loop.batches * loop.epoch) as bar:
        while (
            loop.epoch < config.epochs
            and not 0 < config.patience <= loop.epoch - loop.best_epoch
        ):
            loop.run_epoch(bar.update)
            if run is not None:
                loop.save(run, identity)
                write_csv(run, loop.history)
            record = loop.history[-1]
            bar.set_postfix(
                loss=f"{record['loss']:.3f}", val_r1=f"{mean_r1(record):.1f}"
            )
    return loop.keep_best_epoch()


def describe_run(
    model: DCAR,
    training: Dataset,
    validation: Dataset,
    config: TrainConfig,
    cache: FeatureCache,
) -> dict[str, Any]:
    """Return everything that determines a run, by names that a message can use. Raise
    DataError for a missing image.
    """
    return {
        "backbone": cache.backbone_hash,
        "method": model.config.to_dict(),
        "training data": split_key(training, cache),
        "validation data": split_key(validation, cache),
        **replace(config, amp=resolve_amp(config.amp, model.backbone.device)).to_dict(),
    }


def different_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the names by which two runs differ, "" for equal ones."""
    return ", ".join(
        key
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    )


class _TrainingLoop:
    """Epochs of optimisation steps with validation after each, and the state from which
    a run resumes.

    The order of an epoch's pairs follows from the seed and the epoch alone.

    history: one record for each finished epoch. best_epoch: the number of the best one.
    """

    def __init__(
        self,
        model: DCAR,
        train_split: PreparedSplit,
        val_split: PreparedSplit,
        config: TrainConfig,
    ) -> None:
        self.model = model
        self.train_split = train_split
        self.val_split = val_split
        self.config = config
        self.parameters = [p for _, p in model.trainables()]
        self.lr = config.lr * model.method.lr_factor
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.lr,
            weight_decay=config.weight_decay,
        )
        self.precision = MixedPrecision(config.amp, model.backbone.device)
        self.batches = math.ceil(len(train_split) / config.batch_size)
        self.history = list[dict[str, Any]]()
        self.best_epoch = 0
        self.best_weights = self._copy_trainables()
        self.started = time.monotonic()

    @property
    def epoch(self) -> int:
        return len(self.history)

    def run_epoch(self, on_step: Callable[[], object]) -> None:
        """Train and validate, and keep the best weights. Raise DivergedError if the
        loss or a vector is not finite.
        """
        self.model.train()
        order = np.random.default_rng([self.config.seed, self.epoch + 1]).permutation(
            len(self.train_split)
        )
        losses = list[float]()
        for batch, rows in enumerate(
            np.array_split(order, self.batches), self.epoch * self.batches
        ):
            losses.append(self._step(np.sort(rows), batch))
            on_step()
        query, recall = choose_query_weights(self.model, self.val_split)
        seconds = time.monotonic() - self.started
        loss = float(np.mean(losses))
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "loss": loss,
                "query": query,
                **recall,
                "seconds": seconds,
            }
        )
        if self.best_epoch == 0 or mean_r1(recall) > mean_r1(
            self.history[self.best_epoch - 1]
        ):
            self.best_epoch = self.epoch
            self.best_weights = self._copy_trainables()

    def _step(self, rows: Rows, batch: int) -> float:
        for options in self.optimizer.param_groups:
            options["lr"] = self.lr * _lr_factor(
                batch,
                self.batches * self.config.epochs,
                self.config.warmup,
            )
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulate
        scaler = self.precision.scaler
        loss = accumulate_gradients(
            self.model,
            self.train_split,
            rows,
            parts=parts,
            precision=self.precision,
        )
        if not math.isfinite(loss):
            what = (
                f"{self.model.config.method} diverged: the loss is {loss} in epoch"
                f" {self.epoch + 1}"
            )
            raise DivergedError(f"{what}; use a lower --lr")
        scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        scaler.step(self.optimizer)
        scaler.update()
        return loss

    def keep_best_epoch(self) -> TrainResult:
        """Load the weights of the best epoch into the model, train what follows the
        epochs, and return the result.
        """
        model = self.model.eval()
        best = self.history[self.best_epoch - 1]
        finish = model.method.finish
        model.load_state_dict(self.best_weights, strict=False)
        model.query_weights = best["query"]
        recall = {name: value for name, value in best.items() if "_r" in name}
        if finish is not None and model.changes is not None:
            finish(model.changes, lambda: mean_r1(evaluate(model, self.val_split)))
            recall = evaluate(model, self.val_split)
        if model.config.loss.hard_negatives:
            recall = tune_on_hard_negatives(
                model,
                self.train_split,
                self.val_split,
                self.config.seed,
            )
        if model.query_prompts is not None:
            train_second_stage(
                model,
                self.train_split,
                self.val_split,
                self.config.seed,
            )
        return TrainResult(
            recall,
            self.best_epoch,
            time.monotonic() - self.started,
            self.history,
        )

    def save(self, run: Path, identity: Mapping[str, Any]) -> None:
        content = {
            "identity": identity,
            "trainables": {name: p.detach() for name, p in self.model.trainables()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }
        run.mkdir(parents=True, exist_ok=True)
        # torch.save reports a full disk as an internal error, so write the file
        # ourselves
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_bytes(run / STATE_FILE, buffer.getbuffer())

    def restore(self, run: Path, identity: Mapping[str, Any]) -> None:
        """Continue from the state of a run. Raise DcarError if it is of another run."""
        path = run / STATE_FILE
        try:
            content = dict(
                torch.load(
                    path,
                    map_location=self.model.backbone.device,
                    weights_only=True,
                )
            )
            different = different_names(content["identity"], identity)
        except Exception as error:
            # torch raises many types for a file that it did not write
            raise DcarError(
                f"{path} is not a training state ({type(error).__name__}); delete it"
            ) from error
        if different:
            raise DcarError(
                f"{run} holds an unfinished run with another {different}; finish it"
                " with the same command, choose another --out, or discard it with"
                " --restart"
            )
        self.model.load_state_dict(content["trainables"], strict=False)
        self.optimizer.load_state_dict(content["optimizer"])
        self.precision.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"].cpu())
        self.history = content["history"]
        self.best_epoch = content["best_epoch"]
        self.best_weights = content["best_weights"]
        self.started = time.monotonic() - self.history[-1]["seconds"]

    def _copy_trainables(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.trainables()}


def _lr_factor(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of all steps, then a cosine to 0."""
    if step < (warmup_steps := max(1, int(warmup * total))):
        return (step + 1) / warmup_steps
    return 0.5 * (
        1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps))
    )


def delete_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)


def write_csv(directory: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write log.csv with one row an epoch. The file is rewritten each time, so a
    resumed run has no duplicate rows.
    """
    write_bytes(
        directory / LOG_FILE,
        csv_text(history[0], *(record.values() for record in history)).encode(),
    )
