"""A whole training, as `dcar train` does it: data, negatives, the loop, a checkpoint,
and a verdict.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.data import Annotations, Dataset, describe_reports, save_reports
from dcar_core.encoder.encoder import pick_device
from dcar_core.model.backbone import load_backbone
from dcar_core.model.checkpoint import (
    is_checkpoint,
    read_config,
    require_own_config,
    save_checkpoint,
)
from dcar_core.model.config import UNTOUCHED, BackboneSource, LossDirection, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import DEFAULT, default_method, find_method
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.training.prepared_split import (
    FeatureCache,
    prepare_split,
    report_truncation,
)
from dcar_core.training.train import (
    STATE_FILE,
    delete_state,
    describe_run,
    different_names,
    train,
)
from dcar_core.training.validation import (
    encode_captions,
    encode_images,
    new_categories,
    rerank,
)
from dcar_core.util.errors import DcarError, DivergedError
from dcar_core.util.metrics import Comparison, Estimate, Ranks, Scores, compute_ranks

FEW_PAIRS = 100  # validation pairs of fewer images get a caveat


@dataclass(frozen=True)
class FinishedTraining:
    """The outcome of a training. verdict: its lines, "" for a method that learns
    nothing.

    is_repeated: the checkpoint was there already, made by the same command.
    """

    epoch: int
    seconds: float
    fingerprint: str
    verdict: str
    is_worth_it: bool
    is_repeated: bool = False


@dataclass(frozen=True)
class Verdict:
    """The comparison of a method with the untouched model, and the settings it was
    trained with.

    wider: the number of all images for training and validation, and comparisons of
    searches of the validation captions among them: by R@1 and, under the same name, by
    R@10. reranked: the comparison of its searches with `rerank` and by vectors; None
    without a second stage.
    """

    method: str
    comparison: Comparison
    config: TrainConfig
    wider: tuple[int, Comparison, Comparison] | None = None
    reranked: Comparison | None = None

    @property
    def is_worth_it(self) -> bool:
        """True if the adapted model has the higher mean R@1."""
        return self.comparison.gain.value > 0

    def __str__(self) -> str:
        compared = self.comparison
        images = self.comparison.images
        title = f"R@1 in % among {images:,} images"
        parts = [
            f"{title:32}{'text-to-image':24}{'image-to-text':24}mean",
            _row("untouched model", compared.baseline),
            _row(f"adapted ({self.method})", compared.model),
            _row("difference", compared.difference, "+"),
            f"Was it worth it? {self._answer()}",
        ]
        if self.wider:
            parts.append(_describe_wider(*self.wider))
        if self.reranked:
            recall = self.reranked.model["t2i_r1"]
            change = self.reranked.difference["t2i_r1"]
            gain = (
                f"R@1 of {recall} text-to-image, {change:+} over the search by vectors."
            )
            parts.append(
                "With `rerank`:"
                f" {gain if change.value > 0 else 'no gain on these pairs.'}"
            )
        if not self.is_worth_it:
            # "clip-adapter" runs on every model, but learned less than block adapters
            # from any number of captions.
            own = find_method(self.method).config
            if own.adapter.text and own.prompt.length == 0:
                other = ""
            else:
                other = "--method clip-adapter, "
            next_steps = (
                f"{other}--lr {self.config.lr / 4:g}, --epochs {2 * self.config.epochs}"
                " --patience 0"
            )
            parts.append(
                f"Next: {next_steps}, more training pairs, or `dcar evaluate --tune`;"
                " until then, `dcar zero-shot` writes a checkpoint of the untouched"
                " model."
            )
        if images < FEW_PAIRS:
            what = "pairs" if images == compared.queries else "images"
            share = f"each is {100 / images:.1f} points of R@1"
            parts.append(
                f"Caveat: {images} validation {what} decide little; {share}. Use at"
                f" least {FEW_PAIRS}."
            )
        return "\n".join(parts)

    def _answer(self) -> str:
        compared = self.comparison
        pairs = f"{self.comparison.queries:,} validation pairs"
        if compared.resampled < compared.images:
            pairs += f" of {compared.resampled:,} categories, resampled whole"
        gain = compared.gain.points(
            f"of mean R@1 among {compared.images:,} validation images", pairs
        )
        if not self.is_worth_it:
            return f"No: the untouched model is at least as good, {gain}."
        if not compared.gain.is_certain:
            remedy = (
                "Add validation pairs, or train several seeds with `dcar evaluate`."
            )
            return f"Uncertain: {gain}, but the interval includes 0. {remedy}"
        return (
            f"Yes: {gain}. These pairs also chose the epoch; `dcar evaluate` measures"
            " on the test split."
        )


def _describe_wider(images: int, first: Comparison, ten: Comparison) -> str:
    first_recall, first_before, ten_recall, ten_before = (
        side["t2i_r1"].value
        for compared in (first, ten)
        for side in (compared.model, compared.baseline)
    )
    change = ten.difference["t2i_r1"]
    doubt = "" if change.is_certain else f" This is not certain: {change.points()}."
    return (
        f"Among all {images:,} images for training and validation, {first_recall:.1f} %"
        " of the validation captions find their image first (untouched:"
        f" {first_before:.1f} %), and {ten_recall:.1f} % among the first ten"
        f" ({ten_before:.1f} %).{doubt}"
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
    restart: bool = False,
    device: str = "auto",
    on_data: Callable[[str], None] = lambda description: None,
) -> FinishedTraining:
    """Adapt a model to a data set, and write its checkpoint to `out`; return it if it
    is there already.

    Args:
        method: a name of `model.methods`; default: by the model's level.
        images: directory of the images, if not that of the data. skip_broken: leave out
            images that cannot be read.
        negatives, taxonomy: as `add_negatives` takes them.
        features: directory of cached features; default: in `out`.
        restart: discard the checkpoint in `out` and the state of an interrupted run.
        on_data: called with a description of the splits before the training starts.

    Raises:
        DcarError: data, model or method cannot be used, or `out` holds something else.
        DivergedError: the loss or a vector is not finite.
    """
    require_own_config(out)
    splits, reports = Annotations(data, images).load_all(
        ("train", "val"), "skip" if skip_broken else "require"
    )
    backbone = load_backbone(source, pick_device(device))
    default = default_method(backbone)
    model = seeded_model(
        backbone,
        find_method(method or default).config.with_loss_direction(loss),
        config.seed,
    )
    splits = add_negatives(
        splits,
        reports,
        backbone_functions(backbone),
        mode=negatives,
        taxonomy=taxonomy,
    )
    cache = FeatureCache(features or out / "features", backbone)
    identity = json.loads(
        json.dumps(describe_run(model, splits["train"], splits["val"], config, cache))
    )
    if not restart and (finished := _find_finished(out, identity)):
        return finished
    report_truncation(splits, reports, backbone, model.prompt_tokens)
    on_data(describe_reports(splits, reports))
    if method is None and default != DEFAULT:
        on_data(
            f"method {default}: the image tower of {source.model} does not have what"
            f" {DEFAULT} needs"
        )
    save_reports(reports, out)
    if restart:
        delete_state(out)
    try:
        result = train(
            model,
            splits["train"],
            splits["val"],
            config,
            run=out,
            cache=cache,
        )
    except DivergedError:  # a resumed run would diverge again, and refuse a lower rate
        delete_state(out)
        raise
    verdict = None
    if result.history:  # else there was nothing to learn
        verdict = verdict_of(
            model,
            seeded_model(backbone, UNTOUCHED, config.seed),
            splits,
            cache,
            config,
        )
    is_worth_it = verdict is None or verdict.is_worth_it
    done = FinishedTraining(
        result.epoch,
        round(result.seconds, 1),
        "",
        str(verdict or ""),
        is_worth_it,
    )
    notes = {
        **config.to_dict(),
        "validation": result.best,
        **asdict(done),
        "identity": identity,
    }
    fingerprint = save_checkpoint(model, out, training=notes)
    if result.history:  # another method's unfinished run stays
        delete_state(out)
    return replace(done, fingerprint=fingerprint)


def _find_finished(out: Path, identity: Mapping[str, Any]) -> FinishedTraining | None:
    """Return the training in `out` if it is the same; None if there is none, or one is
    to be resumed.

    Raises:
        DcarError: the checkpoint in `out` is of another training.
    """
    if not is_checkpoint(out) or (out / STATE_FILE).is_file():
        return None
    content = read_config(out)
    notes = content.get("training", {})
    if different := different_names(notes.get("identity") or {"command": ""}, identity):
        remedy = "choose another --out, or replace it with --restart"
        raise DcarError(
            f"{out} holds a checkpoint that was trained with another {different};"
            f" {remedy}"
        )
    known = {field.name: notes[field.name] for field in fields(FinishedTraining)}
    return FinishedTraining(
        **known | {"fingerprint": content["fingerprint"], "is_repeated": True}
    )


def verdict_of(
    model: DCAR,
    untouched: DCAR,
    splits: Mapping[str, Dataset],
    cache: FeatureCache,
    config: TrainConfig,
) -> Verdict:
    """Compare a model with the untouched one on the validation pairs, among their
    images and among all.
    """
    scores = list[Scores]()
    wider = list[tuple[Scores, Scores]]()
    images = 0
    reranked = None
    group_of = new_categories(splits["train"], splits["val"])

    def scores_of(ranks: Ranks, k: int = 1) -> Scores:
        own = Scores.of_ranks(ranks, val.image_of, k)
        return own if group_of is None else own.grouped(group_of)

    for tower in (model, untouched):
        tower.eval()
        train, val = (
            prepare_split(splits[name], tower, for_training=False, cache=cache)
            for name in ("train", "val")
        )
        text = encode_captions(tower, val)
        own = encode_images(tower, val)
        others = encode_images(tower, train)
        scores.append(scores_of(compute_ranks(text, own, val.image_of)))
        if tower.config.rerank.blocks:
            reranked = Comparison.of(
                scores_of(rerank(tower, val, text, own)), scores[-1]
            )
        known = set(splits["val"].images)
        other = np.array(
            [
                row
                for row, name in enumerate(splits["train"].images)
                if name not in known
            ],
            np.int64,
        )
        ranks = compute_ranks(text, np.concatenate([own, others[other]]), val.image_of)
        wider.append((scores_of(ranks), scores_of(ranks, k=10)))
        images = len(own) + len(other)
    first, ten = (Comparison.of(own, other) for own, other in zip(*wider, strict=True))
    return Verdict(
        model.config.method,
        Comparison.of(*scores),
        config,
        (images, first, ten),
        reranked,
    )


def _row(name: str, estimates: Mapping[str, Estimate], sign: str = "") -> str:
    cells = [format(estimate, sign) for estimate in estimates.values()]
    return f"  {name:30}{cells[0]:24}{cells[1]:24}{cells[2]}"
