"""Training: one visible loop for every method.

    caption + image -> Batch -> weights -> prompted features -> L = L_con + lambda L_cate + mu L_head -> trainables

The best epoch by validation recall (the mean of R@1 both ways, as a query sees it, without pair weights) is kept, and
validation decides too whether queries use the predicted token weights. The test split is not touched here.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dcar_core.config import QueryWeights, TrainConfig
from dcar_core.data import Dataset
from dcar_core.features import Prepared, prepare
from dcar_core.losses import anchor_loss, category_loss, contrastive_loss, head_loss
from dcar_core.metrics import recall_at_k
from dcar_core.model import DCAR
from dcar_core.reweight import real_tokens

Recall = dict[str, float]


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
) -> TrainResult:
    """Train in place and leave the model at its best epoch, in eval mode.

    Raises:
        DataError: pictures that cannot be read.
    """
    torch.manual_seed(config.seed)
    parameters = [p for _, p in model.trainables() if p.requires_grad]
    data = prepare(training, model, for_training=True, progress=progress)
    held_out = prepare(validation, model, for_training=False, progress=progress)
    if not parameters:  # plain CLIP
        return TrainResult(evaluate(model, held_out), 0, 0.0, [])
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    batches = math.ceil(len(data) / config.batch_size)
    total = batches * config.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, total, config.warmup))
    rng = np.random.default_rng(config.seed)
    started, history = time.monotonic(), []
    best, best_epoch, kept = -1.0, 0, _copy(model)
    best_recall: Recall = {}
    bar = tqdm(total=total, desc=f"training {model.config.method}", unit="batch", disable=not progress)
    for epoch in range(1, config.epochs + 1):
        model.train()
        losses = []
        for rows in np.array_split(rng.permutation(len(data)), batches):
            loss = batch_loss(model, data, np.sort(rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.update()
        query, recall = _best_query_weights(model, held_out)
        score = (recall["t2i_r1"] + recall["i2t_r1"]) / 2
        line = {"epoch": epoch, "loss": float(np.mean(losses)), "query": query, **recall}
        history.append(line)
        on_epoch(line)
        bar.set_postfix(loss=f"{line['loss']:.3f}", val_r1=f"{score:.1f}")
        if score > best:
            best, best_epoch, best_recall, kept = score, epoch, recall, _copy(model)
            best_query = query
        elif config.patience and epoch - best_epoch >= config.patience:
            break
    bar.close()
    with torch.no_grad():
        for name, parameter in model.trainables():
            parameter.copy_(kept[name])
    model.config = model.config.with_query_weights(best_query)
    model.eval()
    return TrainResult(best_recall, best_epoch, time.monotonic() - started, history)


def batch_loss(model: DCAR, data: Prepared, rows: NDArray[np.int64]) -> Tensor:
    """L over the pairs `rows`."""
    config, backbone = model.config, model.backbone
    device, scale = backbone.device, backbone.scale
    tokens = data.tokens[rows]
    tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
    length = tokens.shape[1]
    images, inverse = np.unique(data.image_of[rows], return_inverse=True)
    pixels = torch.from_numpy(backbone.preprocess.normalize(data.pixels[images])).to(device)
    image = model.encode_image(pixels)[torch.from_numpy(inverse)]  # [B, E], each picture encoded once
    paired = data.pair_weights[rows, :length] if data.pair_weights is not None else None
    predicted = model.predicted_weights(tokens)
    used = {"none": None, "pair": paired, "predicted": predicted}[config.reweight.train]
    text = model.encode_text(tokens, used)
    group, owner = data.caption_group[rows], torch.from_numpy(data.image_of[rows])
    same = (group[:, None] == group[None]) | (owner[:, None] == owner[None])
    loss = contrastive_loss(text, image, same.to(device), scale)
    adapter = model.category_adapter()
    if adapter is not None and data.caption_features is not None and data.matching is not None:
        captions = adapter(data.caption_features[rows])
        loss = loss + config.loss.category * category_loss(image, captions, data.matching[rows], scale)
    if predicted is not None and paired is not None:
        loss = loss + config.loss.head * head_loss(predicted, paired, real_tokens(tokens))
    if data.frozen_images is not None and data.frozen_captions is not None:
        held = anchor_loss(image, data.frozen_images[data.image_of[rows]]) + anchor_loss(
            text, data.frozen_captions[rows]
        )
        loss = loss + config.loss.anchor * held
    return loss


def evaluate(model: DCAR, data: Prepared) -> Recall:
    """Recall@1/5/10 both ways over a split, in percent. Queries never see their image."""
    model.eval()
    return recall_at_k(encode_captions(model, data), encode_pictures(model, data), data.image_of)


@torch.inference_mode()
def encode_captions(model: DCAR, data: Prepared, batch: int = 128) -> NDArray[np.float32]:
    """(N, E), each caption encoded as a query."""
    parts = [model.encode_query(data.tokens[i : i + batch]) for i in range(0, len(data.tokens), batch)]
    return torch.cat(parts).cpu().numpy()


@torch.inference_mode()
def encode_pictures(model: DCAR, data: Prepared, batch: int = 128) -> NDArray[np.float32]:
    """(I, E)"""
    backbone = model.backbone
    parts = []
    for i in range(0, len(data.pixels), batch):
        pixels = backbone.preprocess.normalize(data.pixels[i : i + batch])
        parts.append(model.encode_image(torch.from_numpy(pixels).to(backbone.device)))
    return torch.cat(parts).cpu().numpy()


def _best_query_weights(model: DCAR, data: Prepared) -> tuple[QueryWeights, Recall]:
    """Validation's choice between plain queries and predicted token weights; ties go to plain ones."""
    choices: tuple[QueryWeights, ...] = ("none", "predicted") if model.head is not None else ("none",)
    model.eval()
    pictures, found = encode_pictures(model, data), []
    for query in choices:
        model.config = model.config.with_query_weights(query)
        recall = recall_at_k(encode_captions(model, data), pictures, data.image_of)
        found.append((recall["t2i_r1"] + recall["i2t_r1"], query, recall))
    _, query, recall = max(found, key=lambda item: item[0])
    model.config = model.config.with_query_weights(query)
    return query, recall


def _cosine(step: int, total: int, warmup: float) -> float:
    start = max(1, int(warmup * total))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, total - start)))


def _copy(model: DCAR) -> dict[str, Tensor]:
    return {name: deepcopy(p.detach()) for name, p in model.trainables()}
