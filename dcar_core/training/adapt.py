"""A whole training, as `dcar train` does it: data, negatives, the loop, a checkpoint, and a verdict.

Under torchrun every process calls `adapt`; the leader alone writes files and gets a result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dcar_core.data import Dataset, describe_reports, load_splits, save_reports
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import require_own_config, save_checkpoint
from dcar_core.model.config import LossDirection, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods.registry import default_method
from dcar_core.model.methods.registry import method as config_of
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.serving.encoder import pick_device
from dcar_core.training.distributed import ProcessGroup, torchrun_group
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.prepared_split import prepare_split, report_truncation
from dcar_core.training.train import TrainResult, train
from dcar_core.training.train_state import delete_state
from dcar_core.training.verdict import Verdict, split_hits
from dcar_core.util.bootstrap import compare_hits
from dcar_core.util.errors import DivergedError


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
        result = _train(model, splits, config, out, cache, tensorboard=tensorboard, group=group)
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


def _train(
    model: DCAR,
    splits: Mapping[str, Dataset],
    config: TrainConfig,
    out: Path,
    cache: FeatureCache,
    *,
    tensorboard: bool,
    group: ProcessGroup,
) -> TrainResult:
    """Train; discard the state of a run that diverged, because it would do so again, and refuse a lower rate."""
    try:
        return train(
            model, splits["train"], splits["val"], config, run=out, cache=cache, tensorboard=tensorboard, group=group
        )
    except DivergedError:
        if group.is_leader:
            delete_state(out)
        raise
