"""A whole training, as `dcar train` does it: data, negatives, the loop, a checkpoint, and a verdict.

Under torchrun every process calls `adapt`; the leader alone writes files and gets a result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dcar_core.data import describe_reports, load_splits, save_reports
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import require_own_config, save_checkpoint
from dcar_core.model.config import LossDirection, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods.registry import default_method
from dcar_core.model.methods.registry import method as config_of
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.serving.encoder import pick_device
from dcar_core.training.distributed import torchrun_group
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.prepared_split import PreparedSplit, prepare_split, report_truncation
from dcar_core.training.train import TrainResult, train
from dcar_core.training.train_state import delete_state
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.bootstrap import MEASURES, Estimate, Hits, PairedDifference, compare_hits
from dcar_core.util.errors import DivergedError
from dcar_core.util.retrieval_metrics import compute_ranks

FEW_PAIRS = 100  # validation pairs of fewer images get a caveat


@dataclass(frozen=True)
class Verdict:
    """The comparison of a method with the untouched model, and the settings it was trained with."""

    method: str
    comparison: PairedDifference
    config: TrainConfig

    @property
    def is_worth_it(self) -> bool:
        """True if the adapted model has the higher mean R@1. See `is_certain` for the interval."""
        return self.comparison.difference["mean_r1"].value > 0

    @property
    def is_certain(self) -> bool:
        """True if the interval of the difference excludes 0."""
        difference = self.comparison.difference["mean_r1"]
        return difference.low > 0 or difference.high < 0

    def __str__(self) -> str:
        pairs, images = self.comparison.queries, self.comparison.images
        parts = [
            f"{'R@1 in percent (95 % interval)':32}{'text-to-image':24}{'image-to-text':24}mean",
            _row("untouched model", self.comparison.baseline, ""),
            _row(f"adapted ({self.method})", self.comparison.model, ""),
            _row("difference", self.comparison.difference, "+"),
            self._answer(),
        ]
        if not self.is_worth_it:
            # "clip-adapter" runs on every model, but learned less than "block-adapters" from any number of captions.
            other = "" if self.method in ("clip-adapter", "block-adapters") else "--method clip-adapter, "
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

    def _answer(self) -> str:
        difference = self.comparison.difference["mean_r1"]
        interval = f"95 % interval {difference.low:+.1f} to {difference.high:+.1f}"
        pairs = f"{self.comparison.queries:,} validation pairs"
        if not self.is_worth_it:
            return f"Was it worth it? No: the untouched model is at least as good ({interval}; {pairs})."
        if not self.is_certain:
            return (
                f"Was it worth it? Uncertain: {difference.value:+.1f} points, but the interval includes 0 ({interval}; "
                f"{pairs}). Add validation pairs, or train several seeds with `dcar evaluate`."
            )
        return (
            f"Was it worth it? Yes: {difference.value:+.1f} points of mean R@1 ({interval}; {pairs}). These pairs also "
            f"chose the epoch; `dcar evaluate` measures on the test split."
        )


@dataclass(frozen=True)
class Adaptation:
    """The outcome of a training; no verdict for a method that learns nothing."""

    result: TrainResult
    fingerprint: str
    verdict: Verdict | None


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
    on_data: Callable[[str], None] = lambda description: None,
) -> Adaptation | None:
    """Adapt a model to a data set, and write its checkpoint to `out`; None for torchrun's processes but the leader.

    Args:
        method: a name of `methods.registry`; default: by the model's level.
        images: directory of the images, if not that of the data. skip_broken: leave out images that cannot be read.
        negatives, taxonomy: as `add_negatives` takes them.
        features: directory of cached features; default: in `out`.
        restart: discard the state of an interrupted run.
        on_data: called with a description of the splits before the training starts.

    Raises:
        DcarError: data, model or method cannot be used, or `out` holds something else.
        DivergedError: the loss or a vector is not finite.
    """
    if method is not None:
        config_of(method)  # refuses an unknown name before a model is loaded
    require_own_config(out)
    with torchrun_group(pick_device(device)) as (group, here):
        splits, reports = load_splits(
            data, ("train", "val"), image_root=images, image_policy="skip" if skip_broken else "require"
        )
        backbone = load_backbone(source, here)
        chosen = config_of(method or default_method(backbone.level)).with_loss_direction(loss)
        model = seeded_model(backbone, chosen, config.seed)
        splits = add_negatives(splits, reports, backbone_functions(backbone), mode=negatives, taxonomy=taxonomy)
        report_truncation(splits, reports, backbone, model.prompt_tokens)
        if group.is_leader:
            on_data(describe_reports(splits, reports))
            save_reports(reports, out)
        with group.leader_first():
            if restart and group.is_leader:
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
                group=group,
            )
        except DivergedError:  # a resumed run would diverge again, and refuse a lower rate
            if group.is_leader:
                delete_state(out)
            raise
        if not group.is_leader:
            return None
        notes = {**config.to_dict(), "epoch": result.epoch, "validation": result.best}
        fingerprint = save_checkpoint(model, out, training=notes)
        if not result.history:  # nothing to learn; another method's unfinished run stays
            return Adaptation(result, fingerprint, None)
        delete_state(out)
        own, untouched = (
            split_hits(each, prepare_split(splits["val"], each, for_training=False, cache=cache))
            for each in (model, seeded_model(backbone, config_of("clip"), config.seed))
        )
        return Adaptation(result, fingerprint, Verdict(chosen.method, compare_hits(own, untouched), config))


def split_hits(model: DCAR, split: PreparedSplit) -> Hits:
    """Return the R@1 hits of a model's queries and images on a split."""
    model.eval()
    ranks = compute_ranks(encode_captions(model, split), encode_images(model, split), split.image_of)
    return Hits.from_ranks(ranks, split.image_of)


def _row(name: str, estimates: Mapping[str, Estimate], sign: str) -> str:
    cells = [format(estimates[measure], sign) for measure in MEASURES]
    return f"  {name:30}{cells[0]:24}{cells[1]:24}{cells[2]}"
