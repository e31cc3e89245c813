"""Training: one visible loop for every method.

    caption + image -> batch -> weights -> prompted features -> L (see step.py) -> trainables

- The best epoch by validation recall (the mean of R@1 both ways, as a query sees it, without pair weights) is kept,
  and validation decides too whether queries use the predicted token weights. The test split is not touched here.
- With a run directory, a killed run goes on exactly where it was: on the CPU its weights become bit for bit those of
  a run that was never interrupted.
- Under torchrun the processes share each batch; only the first one writes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dcar_core.data import Dataset
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR
from dcar_core.training.distributed import ALONE, Group
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.features import Prepared, prepare
from dcar_core.training.grad_cache import Precision, accumulate_gradients
from dcar_core.training.run_log import CSV, TensorBoard, write_csv
from dcar_core.training.train_state import Progress, State
from dcar_core.training.validation import Recall, choose_query_weights, evaluate, mean_r1
from dcar_core.util.errors import DivergedError

SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class TrainResult:
    """What a run found: validation recall of the kept epoch, and a line for every epoch."""

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
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    run: Path | None = None,
    cache: FeatureCache | None = None,
    tensorboard: bool = False,
    group: Group = ALONE,
) -> TrainResult:
    """Train in place and leave the model at its best epoch, in eval mode.

    Args:
        on_epoch: told the line of every epoch that is finished here.
        run: where state.pt (to go on from), log.csv and tensorboard/ are kept; None keeps nothing. `resume.forget`
            removes the state once the caller has saved the result.

    Raises:
        DataError: pictures that cannot be read.
        DivergedError: the loss, or what the model makes of the validation split, is no number any more.
        TrainingError: `run` holds the state of another run.
    """
    torch.manual_seed(config.seed)
    shown = progress and group.leads
    with group.leader_first():
        data = prepare(training, model, for_training=True, progress=shown, cache=cache)
        held_out = prepare(validation, model, for_training=False, progress=shown, cache=cache)
    parameters = [p for _, p in model.trainables() if p.requires_grad]
    if not parameters:  # plain CLIP
        if run is not None and group.leads:
            (run / CSV).unlink(missing_ok=True)  # of another method
        return TrainResult(evaluate(model, held_out), 0, 0.0, [])
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    precision = Precision(config.amp, model.backbone.device)
    state = State(run, _identity(model, data, held_out, config) if run is not None else {})
    at, kept = state.restore(model, optimizer, precision.scaler) or (Progress(), _copy(model))
    board = TensorBoard(run / "tensorboard", at.epoch) if tensorboard and run is not None and group.leads else None
    batches = math.ceil(len(data) / config.batch_size)
    total = batches * config.epochs
    bar = tqdm(total=total, initial=at.epoch * batches + at.step, desc=f"training {model.config.method}", unit="batch",
               disable=not shown)  # fmt: skip
    started, saved = time.monotonic() - at.seconds, time.monotonic()
    while at.epoch < config.epochs and not (config.patience and at.epoch - at.best_epoch >= config.patience):
        epoch = at.epoch + 1
        model.train()
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data))
        for rows in np.array_split(order, batches)[at.step :]:
            for options in optimizer.param_groups:
                options["lr"] = config.lr * _cosine(at.epoch * batches + at.step, total, config.warmup)
            optimizer.zero_grad(set_to_none=True)
            loss = accumulate_gradients(
                model, data, np.sort(rows), parts=config.accumulate, group=group, precision=precision
            )
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} in epoch {epoch} of {model.config.method}; use a lower --lr")
            precision.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            precision.scaler.step(optimizer)
            precision.scaler.update()
            at.losses.append(loss)
            at.step += 1
            bar.update()
            if group.leads and time.monotonic() - saved > SAVE_EVERY_S:
                at.seconds, saved = time.monotonic() - started, time.monotonic()
                state.save(model, optimizer, precision.scaler, at, kept)
        found = choose_query_weights(model, held_out) if group.leads else None
        chosen = group.agree(found)
        assert chosen is not None
        query, recall = chosen
        score = mean_r1(recall)
        at.seconds = time.monotonic() - started
        line = {"epoch": epoch, "loss": float(np.mean(at.losses)), "query": query, **recall, "seconds": at.seconds}
        at.history.append(line)
        at.epoch, at.step, at.losses = epoch, 0, []
        if score > at.best:
            at.best, at.best_epoch, at.best_recall, at.best_query = score, epoch, recall, query
            kept = _copy(model)
        if group.leads:
            state.save(model, optimizer, precision.scaler, at, kept)
            if run is not None:
                write_csv(run, at.history)
            if board is not None:
                board.write(line)
            on_epoch(line)
        bar.set_postfix(loss=f"{line['loss']:.3f}", val_r1=f"{score:.1f}")
    bar.close()
    if board is not None:
        board.close()
    with torch.no_grad():
        for name, parameter in model.trainables():
            parameter.copy_(kept[name])
    model.config = model.config.with_query_weights(at.best_query)
    model.eval()
    return TrainResult(at.best_recall, at.best_epoch, at.seconds, at.history)


def _identity(model: DCAR, data: Prepared, held_out: Prepared, config: TrainConfig) -> dict[str, Any]:
    """All that a run follows from: another value of any of these is another run."""
    return {
        "backbone": model.backbone.content_hash(),
        "method": model.config.with_query_weights("none").to_dict(),
        "training data": data.key,
        "validation data": held_out.key,
        **config.to_dict(),
    }


def _cosine(step: int, total: int, warmup: float) -> float:
    start = max(1, int(warmup * total))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, total - start)))


def _copy(model: DCAR) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trainables()}
