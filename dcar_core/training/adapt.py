"""A whole training, as `dcar train` does it: data, negatives, the loop, a checkpoint, and a verdict."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.data import Annotations, Dataset, describe_reports, save_reports
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import require_own_config, save_checkpoint
from dcar_core.model.config import LossDirection, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods.registry import DEFAULT, default_method
from dcar_core.model.methods.registry import method as config_of
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.serving.encoder import pick_device
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.finished import FinishedTraining
from dcar_core.training.prepared_split import prepare_split, report_truncation
from dcar_core.training.train import train
from dcar_core.training.train_state import delete_state
from dcar_core.training.validation import encode_captions, encode_images, new_categories, rerank
from dcar_core.util.bootstrap import MEASURES, Estimate, Hits, PairedDifference, compare_hits
from dcar_core.util.errors import DivergedError
from dcar_core.util.retrieval_metrics import Ranks, compute_ranks

FEW_PAIRS = 100  # validation pairs of fewer images get a caveat


@dataclass(frozen=True)
class WiderSearch:
    """The text-to-image searches of the validation captions among the images of all splits that were read.

    first, ten: comparisons of R@1 and R@10; their measure is "t2i_r1" for both.
    """

    images: int
    first: PairedDifference
    ten: PairedDifference

    def __str__(self) -> str:
        (first, first_before), (ten, ten_before) = (
            [estimates["t2i_r1"].value for estimates in (each.model, each.baseline)] for each in (self.first, self.ten)
        )
        change = self.ten.difference["t2i_r1"]
        doubt = "" if change.is_certain else f" This is not certain ({change.low:+.1f} to {change.high:+.1f})."
        return (
            f"Among all {self.images:,} images for training and validation, {first:.1f} % of the validation captions "
            f"find their image first (untouched: {first_before:.1f} %), and {ten:.1f} % among the first ten "
            f"({ten_before:.1f} %).{doubt}"
        )


@dataclass(frozen=True)
class Verdict:
    """The comparison of a method with the untouched model, and the settings it was trained with.

    reranked: the comparison of its searches with `rerank` and by vectors; None without a second stage.
    """

    method: str
    comparison: PairedDifference
    config: TrainConfig
    wider: WiderSearch | None = None
    reranked: PairedDifference | None = None

    @property
    def is_worth_it(self) -> bool:
        """True if the adapted model has the higher mean R@1. See `is_certain` for the interval."""
        return self.comparison.difference["mean_r1"].value > 0

    @property
    def is_certain(self) -> bool:
        """True if the interval of the difference excludes 0."""
        return self.comparison.difference["mean_r1"].is_certain

    def __str__(self) -> str:
        pairs, images = self.comparison.queries, self.comparison.images
        parts = [
            f"{f'R@1 in % among {images:,} images':32}{'text-to-image':24}{'image-to-text':24}mean",
            _row("untouched model", self.comparison.baseline, ""),
            _row(f"adapted ({self.method})", self.comparison.model, ""),
            _row("difference", self.comparison.difference, "+"),
            self._answer(),
            *([str(self.wider)] if self.wider else []),
            *([self._second_stage(self.reranked)] if self.reranked else []),
        ]
        if not self.is_worth_it:
            # "clip-adapter" runs on every model, but learned less than block adapters from any number of captions.
            is_adapter = self.method in ("clip-adapter", "block-adapters", "block-adapters+", "query-prompts")
            other = "" if is_adapter else "--method clip-adapter, "
            lower, more = self.config.lr / 4, 2 * self.config.epochs
            parts.append(
                f"Next: {other}--lr {lower:g}, --epochs {more} --patience 0, more training pairs, or `dcar evaluate "
                f"--tune`; until then, `dcar zero-shot` writes a checkpoint of the untouched model."
            )
        if images < FEW_PAIRS:
            what = "pairs" if images == pairs else "images"
            parts.append(
                f"Caveat: {images} validation {what} decide little; each is {100 / images:.1f} points of R@1. Use at "
                f"least {FEW_PAIRS}."
            )
        return "\n".join(parts)

    def _second_stage(self, found: PairedDifference) -> str:
        change = found.difference["t2i_r1"]
        if change.value <= 0:
            return "With `rerank`: no gain on these pairs."
        return f"With `rerank`: R@1 of {found.model['t2i_r1']} text-to-image, {change:+} over the search by vectors."

    def _answer(self) -> str:
        difference = self.comparison.difference["mean_r1"]
        pool = f"among {self.comparison.images:,} validation images"
        interval = f"95 % interval {difference.low:+.1f} to {difference.high:+.1f}"
        pairs = f"{self.comparison.queries:,} validation pairs"
        if self.comparison.resampled < self.comparison.images:
            pairs += f" of {self.comparison.resampled:,} categories, resampled whole"
        if not self.is_worth_it:
            return f"Was it worth it? No: the untouched model is at least as good {pool} ({interval}; {pairs})."
        if not self.is_certain:
            return (
                f"Was it worth it? Uncertain: {difference.value:+.1f} points {pool}, but the interval includes 0 "
                f"({interval}; {pairs}). Add validation pairs, or train several seeds with `dcar evaluate`."
            )
        return (
            f"Was it worth it? Yes: {difference.value:+.1f} points of mean R@1 {pool} ({interval}; {pairs}). These "
            f"pairs also chose the epoch; `dcar evaluate` measures on the test split."
        )


def adapt(
    data: Path,
    source: BackboneSource,
    out: Path,
    config: TrainConfig,
    *,
    method: str | None = None,
    loss: LossDirection = "both",
    images: Path | None = None,
    skip_broken: bool = False,
    negatives: str = "auto",
    taxonomy: Path | None = None,
    features: Path | None = None,
    tensorboard: bool = False,
    restart: bool = False,
    device: str = "auto",
    request: Mapping[str, Any] | None = None,
    on_data: Callable[[str], None] = lambda description: None,
) -> FinishedTraining:
    """Adapt a model to a data set, and write its checkpoint to `out`.

    Args:
        method: a name of `methods.registry`; default: by the model's level.
        images: directory of the images, if not that of the data. skip_broken: leave out images that cannot be read.
        negatives, taxonomy: as `add_negatives` takes them.
        features: directory of cached features; default: in `out`.
        restart: discard the state of an interrupted run. A finished checkpoint in `out` is replaced in any case;
            `finished.find_finished` recognises one.
        request: what `finished.describe_request` returned; it is noted in the checkpoint.
        on_data: called with a description of the splits before the training starts.

    Raises:
        DcarError: data, model or method cannot be used, or `out` holds something else.
        DivergedError: the loss or a vector is not finite.
    """
    require_own_config(out)
    splits, reports = Annotations(data, images).load_all(("train", "val"), "skip" if skip_broken else "require")
    backbone = load_backbone(source, pick_device(device))
    default = default_method(backbone)
    chosen = config_of(method or default).with_loss_direction(loss)
    model = seeded_model(backbone, chosen, config.seed)
    splits = add_negatives(splits, reports, backbone_functions(backbone), mode=negatives, taxonomy=taxonomy)
    report_truncation(splits, reports, backbone, model.prompt_tokens)
    on_data(describe_reports(splits, reports))
    if method is None and default != DEFAULT:
        on_data(f"method {default}: the image tower of {source.model} does not have what {DEFAULT} needs")
    save_reports(reports, out)
    if restart:
        delete_state(out)
    cache = FeatureCache(features or out / "features", backbone)
    try:
        result = train(
            model,
            splits["train"],
            splits["val"],
            config,
            run=out,
            cache=cache,
            tensorboard=tensorboard,
        )
    except DivergedError:  # a resumed run would diverge again, and refuse a lower rate
        delete_state(out)
        raise
    verdict = None
    if result.history:  # else there was nothing to learn
        verdict = verdict_of(model, seeded_model(backbone, config_of("clip"), config.seed), splits, cache, config)
    done = FinishedTraining(
        result.epoch, round(result.seconds, 1), "", str(verdict or ""), verdict is None or verdict.is_worth_it
    )
    notes = {**config.to_dict(), "validation": result.best, **asdict(done)}
    if request is not None:
        notes["request"] = {**request, "method": None if chosen.method == default else chosen.method}
    fingerprint = save_checkpoint(model, out, training=notes)
    if result.history:  # another method's unfinished run stays
        delete_state(out)
    return replace(done, fingerprint=fingerprint)


def verdict_of(
    model: DCAR, untouched: DCAR, splits: Mapping[str, Dataset], cache: FeatureCache, config: TrainConfig
) -> Verdict:
    """Compare a model with the untouched one on the validation pairs, among their images and among all."""
    hits, wider, images, reranked = list[Hits](), list[tuple[Hits, Hits]](), 0, None
    group_of = new_categories(splits["train"], splits["val"])

    def hits_of(ranks: Ranks, k: int = 1) -> Hits:
        found = Hits.from_ranks(ranks, val.image_of, k)
        return found if group_of is None else found.grouped(group_of)

    for each in (model, untouched):
        each.eval()
        train, val = (prepare_split(splits[name], each, for_training=False, cache=cache) for name in ("train", "val"))
        text, own, others = encode_captions(each, val), encode_images(each, val), encode_images(each, train)
        hits.append(hits_of(compute_ranks(text, own, val.image_of)))
        if each.config.rerank.blocks:
            reranked = compare_hits(hits_of(rerank(each, val, text, own)), hits[-1])
        known = set(splits["val"].images)
        other = np.array([row for row, name in enumerate(splits["train"].images) if name not in known], np.int64)
        ranks = compute_ranks(text, np.concatenate([own, others[other]]), val.image_of)
        wider.append((hits_of(ranks), hits_of(ranks, k=10)))
        images = len(own) + len(other)
    first, ten = (compare_hits(own, other) for own, other in zip(*wider, strict=True))
    return Verdict(model.config.method, compare_hits(*hits), config, WiderSearch(images, first, ten), reranked)


def _row(name: str, estimates: Mapping[str, Estimate], sign: str) -> str:
    cells = [format(estimates[measure], sign) for measure in MEASURES]
    return f"  {name:30}{cells[0]:24}{cells[1]:24}{cells[2]}"
