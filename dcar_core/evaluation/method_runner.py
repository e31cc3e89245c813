"""Training and test runs of methods, kept in directories and never repeated, and their
analysis.

    runs/<method>/seed0-lr0.002-1a2b3c4d/    trainables.safetensors, config.json,
                                             log.csv, training.json, test.json

- The directory name ends in a digest of everything that determines the run: weights,
  method, settings, data. A table therefore never mixes runs with different settings.
- A killed run resumes from its last state.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.checkpoint import load_checkpoint, save_checkpoint
from dcar_core.model.config import ModelConfig, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.objective import resolve_amp
from dcar_core.training.prepared_split import (
    FeatureCache,
    PreparedSplit,
    prepare_split,
    split_key,
)
from dcar_core.training.train import delete_state, train
from dcar_core.training.validation import (
    encode_captions,
    encode_images,
    mean_r1,
    rerank,
)
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import DivergedError
from dcar_core.util.files import hash_json, write_json
from dcar_core.util.metrics import (
    Ranks,
    Scores,
    compute_ranks,
    hard_negative_accuracy,
    recall_of_ranks,
)

_BY_VECTORS_ALONE: dict[str, Any] = {"hard_negative_accuracy": None}
_BATCH = 256  # negatives that are encoded at a time


@dataclass(frozen=True)
class MethodRunner:
    """Trains and tests methods on one data set.

    splits: train, val and test. on_message: called with one line before each training.
    """

    backbone: Backbone
    splits: Mapping[str, Dataset]
    out: Path
    config: TrainConfig
    cache: FeatureCache
    on_message: Callable[[str], None] = lambda line: None

    def train(self, method: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        """Return the record of a training run, training first if there is none. Only
        validation is read.

        Raises:
            DivergedError: the run diverged, now or when it was recorded.
        """
        directory = self.directory(method, seed, lr)
        config = replace(self.config, seed=seed, lr=lr)
        record_file = directory / "training.json"
        if not record_file.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            self.on_message(f"{method.method}, seed {seed}, learning rate {lr:g}")
            model = seeded_model(self.backbone, method, seed)
            data = self.splits["train"], self.splits["val"]
            record: dict[str, Any] = {
                "seed": seed,
                "lr": lr,
                "run": str(directory.relative_to(self.out)),
            }
            try:
                result = train(model, *data, config, run=directory, cache=self.cache)
            except DivergedError as error:
                record |= {"diverged": str(error)}
            else:
                notes = {
                    **config.to_dict(),
                    "epoch": result.epoch,
                    "validation": result.best,
                }
                record |= {
                    "fingerprint": save_checkpoint(model, directory, training=notes),
                    "trainable": sum(p.numel() for _, p in model.trainables()),
                    "epoch": result.epoch,
                    "seconds": round(result.seconds, 1),
                    "query": model.query_weights,
                    "val": result.best,
                }
            write_json(record_file, record)
            delete_state(directory)
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if "diverged" in record:
            raise DivergedError(record["diverged"])
        return record

    def test(self, method: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        """Return the record of a run with its results on the test split, read once.
        Raise DivergedError as `train`.
        """
        record = self.train(method, seed, lr)
        directory = self.directory(method, seed, lr)
        results_file = directory / "test.json"
        data = self.splits["test"]
        if not results_file.is_file():
            # another backbone, with other features
            is_merged = find_method(method.method).changes is not None
            shared = None if is_merged else self.backbone
            model, _ = load_checkpoint(
                directory,
                device=str(self.backbone.device),
                backbone=shared,
            )
            cache = FeatureCache(None, model.backbone) if is_merged else self.cache
            write_json(
                results_file,
                analyse(
                    model,
                    data,
                    prepare_split(data, model, for_training=False, cache=cache),
                ),
            )
        return {**record, **json.loads(results_file.read_text(encoding="utf-8"))}

    def tune(
        self,
        method: ModelConfig,
        grid: Sequence[float],
    ) -> tuple[float, dict[str, float | None]]:
        """Return the learning rate with the best validation recall at seed 0.

        Returns:
            The rate, and the validation R@1 of every rate; None where it diverged.

        Raises:
            DivergedError: every rate diverged.
        """
        scores: dict[float, float] = {}
        for lr in grid:
            with suppress(DivergedError):
                scores[lr] = mean_r1(self.train(method, 0, lr)["val"])
        if not scores:
            rates = ", ".join(f"{lr:g}" for lr in grid)
            raise DivergedError(
                f"{method.method} diverged with every learning rate of {rates}"
            )
        return max(scores, key=lambda lr: scores[lr]), {
            f"{lr:g}": scores.get(lr) for lr in grid
        }

    def directory(self, method: ModelConfig, seed: int, lr: float) -> Path:
        # runs on a CPU differ from runs on a GPU
        amp = resolve_amp(self.config.amp, self.backbone.device)
        config = replace(self.config, seed=seed, lr=lr, amp=amp)
        key = hash_json(
            [
                self.cache.backbone_hash,
                method.to_dict(),
                config.to_dict(),
                self._split_keys,
            ]
        )[:8]
        return self.out / "runs" / method.method / f"seed{seed}-lr{lr:g}-{key}"

    @cached_property
    def _split_keys(self) -> list[str]:
        return [split_key(split, self.cache) for split in self.splits.values()]


def analyse(model: DCAR, data: Dataset, split: PreparedSplit) -> dict[str, Any]:
    """Return the results of a split, serialisable as JSON; figures are percentages.

    Returns:
        test: the recall; hard_negative_accuracy, None without negatives; categories:
            name -> pairs, t2i_r1, i2t_r1;
        scores: queries and sums of `metrics.Scores`; reranked: what differs with
            `rerank`, of a model with a second
        stage.
    """
    model.eval()
    text = encode_captions(model, split)
    image = encode_images(model, split)
    again = rerank(model, split, text, image) if model.config.rerank.blocks else None
    return {
        **_by_ranks(data, split, compute_ranks(text, image, split.image_of)),
        "hard_negative_accuracy": hard_negative_accuracy(
            image[split.image_of],
            text,
            encode_negatives(model, data),
        ),
        **(
            {"reranked": _by_ranks(data, split, again) | _BY_VECTORS_ALONE}
            if again
            else {}
        ),
    }


def _by_ranks(data: Dataset, split: PreparedSplit, ranks: Ranks) -> dict[str, Any]:
    scores = Scores.of_ranks(ranks, split.image_of)
    return {
        "test": recall_of_ranks(ranks),
        "categories": _recall_by_category(data, split.image_of, ranks),
        "scores": [scores.queries.tolist(), scores.sums.tolist()],
    }


def serving_cost(model: DCAR) -> dict[str, Any]:
    """Return the cost of one more domain.

    Returns:
        bytes: of the parameters that serving needs. backbone: "shared" with other
            domains or "own".
        gallery: after a training, "unchanged", "recomputed" from its frozen features,
            or "encoded again".
    """
    own = model.changes is not None
    weights = [parameter for _, parameter in model.served()]
    if own:
        weights = [*model.backbone.clip.state_dict().values()]
    again = "unchanged" if model.image_adapter is None else "recomputed"
    return {
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "backbone": "own" if own else "shared",
        "gallery": again if model.image_is_frozen else "encoded again",
    }


@torch.inference_mode()
def encode_negatives(model: DCAR, data: Dataset) -> list[Floats]:
    """Encode each pair's negatives (m, E) as queries; equal texts are encoded once."""
    negatives = [sample.negatives for sample in data.samples]
    # similar lengths share a batch
    unique = sorted({text for texts in negatives for text in texts}, key=len)
    row_of = {text: row for row, text in enumerate(unique)}
    batches = (unique[i : i + _BATCH] for i in range(0, len(unique), _BATCH))
    tokens = (model.backbone.tokenize(batch, model.prompt_tokens) for batch in batches)
    encoded = (model.encode_query(part).float().cpu().numpy() for part in tokens)
    vectors = np.concatenate(
        [np.zeros((0, model.backbone.embed_dim), np.float32), *encoded]
    )
    return [vectors[[row_of[text] for text in texts]] for texts in negatives]


def _recall_by_category(
    data: Dataset,
    image_of: Rows,
    ranks: Ranks,
) -> dict[str, dict[str, float]]:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(data.samples):
        rows_of[sample.category].append(row)
    return {
        name: {
            "pairs": len(rows),
            "t2i_r1": 100 * float((ranks.text[rows] < 1).mean()),
            "i2t_r1": 100 * float((ranks.image[np.unique(image_of[rows])] < 1).mean()),
        }
        for name, rows in sorted(rows_of.items())
        if name
    }
