"""`dcar train`, `dcar zero-shot` and `dcar evaluate`."""

import math
from typing import Annotated, Any

import typer

from app.cli.options import (
    Accumulate,
    Amp,
    BatchSize,
    Data,
    Device,
    Epochs,
    Features,
    Images,
    LearningRate,
    ModelName,
    Negatives,
    Out,
    Patience,
    Pretrained,
    SkipBroken,
    Taxonomy,
)
from dcar_core.model.config import GRID, TrainConfig

commands = typer.Typer()

UNTOUCHED_IS_AS_GOOD = 3  # exit status of `dcar train`


@commands.command()
def train(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    method: Annotated[str, typer.Option(help="dcar+, dcar, coop, maple, ... (an unknown name lists all)")] = "dcar+",
    images: Images = None,
    epochs: Epochs = TrainConfig.epochs,
    batch_size: BatchSize = TrainConfig.batch_size,
    lr: LearningRate = TrainConfig.lr,
    patience: Patience = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    accumulate: Accumulate = TrainConfig.accumulate,
    amp: Amp = "auto",
    features: Features = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write OUT/tensorboard (extra: tensorboard).")] = False,
    restart: Annotated[bool, typer.Option(help="Forget the state of a run that was killed.")] = False,
    device: Device = "auto",
    skip_broken: SkipBroken = False,
    negatives: Negatives = "auto",
    taxonomy: Taxonomy = None,
) -> None:
    """Adapt CLIP to a domain: learn a few hundred KB of prompts and adapters, keep the best epoch by validation recall.

    The last lines compare the adapted model with the untouched one. Exit status 3: the untouched model is at least as
    good; the checkpoint is written nevertheless. A killed run resumes with the same command. For several processes:
    torchrun --nproc-per-node N -m app.cli train ...
    """
    from dcar_core.data import describe_reports, load_splits, save_reports
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.checkpoint import save_checkpoint
    from dcar_core.model.dcar import seeded_model
    from dcar_core.model.methods import method as method_config
    from dcar_core.negatives import add_negatives_with_backbone
    from dcar_core.serving.encoder import pick_device
    from dcar_core.training.distributed import torchrun_group
    from dcar_core.training.feature_cache import FeatureCache
    from dcar_core.training.prepared_split import prepare_split, report_truncation
    from dcar_core.training.train import train as run
    from dcar_core.training.train_state import delete_state
    from dcar_core.training.verdict import Verdict, judge

    chosen = method_config(method)
    config = _config(
        epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed, accumulate=accumulate, amp=amp
    )
    with torchrun_group(pick_device(device)) as (group, here):
        splits, reports = load_splits(
            data, ("train", "val"), image_root=images, image_policy="skip" if skip_broken else "require"
        )
        backbone = load_backbone(BackboneSource(model, pretrained), here)
        adapted = seeded_model(backbone, chosen, seed)
        splits = add_negatives_with_backbone(splits, reports, backbone, mode=negatives, taxonomy=taxonomy)
        report_truncation(splits, reports, backbone, adapted.prompt_tokens)
        if group.is_leader:
            typer.echo(describe_reports(splits, reports), err=True)
            save_reports(reports, out)
        with group.leader_first():
            if restart and group.is_leader:
                delete_state(out)
        cache = FeatureCache(features or out / "features", backbone)
        result = run(
            adapted, splits["train"], splits["val"], config, run=out, cache=cache, tensorboard=tensorboard, group=group
        )
        if not group.is_leader:
            return
        notes = {**config.to_dict(), "epoch": result.epoch, "validation": result.best}
        fingerprint = save_checkpoint(adapted, out, training=notes)
        delete_state(out)
        typer.echo(f"{out}: epoch {result.epoch}, {result.seconds:.0f} s, fingerprint {fingerprint[:12]}")
        if not result.history:  # nothing to learn
            return
        untouched = seeded_model(backbone, method_config("clip"), seed)
        own_split, untouched_split = (
            prepare_split(splits["val"], each, for_training=False, cache=cache) for each in (adapted, untouched)
        )
        verdict = Verdict(method, judge(adapted, own_split, untouched, untouched_split), config)
    typer.echo(str(verdict))
    if not verdict.is_worth_it:
        raise typer.Exit(UNTOUCHED_IS_AS_GOOD)


@commands.command("zero-shot")
def zero_shot(out: Out, model: ModelName = "ViT-B-32-quickgelu", pretrained: Pretrained = None) -> None:
    """A checkpoint of a model as it is: to index and search with before anything is learned, or to compare with.

    It needs no data, and goes wherever one that was trained does: `dcar index build --checkpoint OUT ...`
    """
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.zero_shot import save_zero_shot

    mark = save_zero_shot(load_backbone(BackboneSource(model, pretrained)), out)
    typer.echo(f"{out}: {model} as it is, fingerprint {mark[:12]}")


@commands.command()
def evaluate(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; an unknown name lists all.")
    ] = "clip,coop,clip-adapter,maple,dcar,dcar+",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    images: Images = None,
    epochs: Epochs = TrainConfig.epochs,
    batch_size: BatchSize = TrainConfig.batch_size,
    lr: LearningRate = TrainConfig.lr,
    tune: Annotated[bool, typer.Option(help="Choose each method's learning rate on validation, seed 0.")] = False,
    grid: Annotated[str, typer.Option(help="The learning rates that --tune tries.")] = ",".join(
        f"{lr:g}" for lr in GRID
    ),
    patience: Patience = 5,
    accumulate: Accumulate = TrainConfig.accumulate,
    amp: Amp = "auto",
    features: Features = None,
    device: Device = "auto",
    skip_broken: SkipBroken = False,
    negatives: Negatives = "auto",
    taxonomy: Taxonomy = None,
) -> None:
    """Train and test several methods with several seeds; prints a table, writes results.* and report.html to --out.

    A run that is finished is not run again, so the same command goes on, and with another method or seed in its
    lists costs only that. The table has what the lists name.
    """
    from dcar_core.evaluation import compare, recall_table, settings_table
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.methods import method
    from dcar_core.serving.encoder import pick_device

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    for name in names:
        method(name)  # one that is unknown is told before a model is loaded
    config = _config(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, accumulate=accumulate, amp=amp)
    rates = _rates(grid)
    backbone = load_backbone(BackboneSource(model, pretrained), pick_device(device))
    results = compare(
        backbone, data, names, seeds, out, config, images=images, skip_broken=skip_broken, negatives=negatives,
        taxonomy=taxonomy, tune=tune, grid=rates, features=features, on_message=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(recall_table(results))
    if tune:
        typer.echo(settings_table(results))
    typer.echo(f"{out / 'report.html'} shows more, without a server")


def _config(**settings: Any) -> TrainConfig:
    try:
        return TrainConfig.from_dict(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _rates(grid: str) -> list[float]:
    try:
        rates = [float(part) for part in grid.split(",") if part.strip()]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise typer.BadParameter(f"--grid must be learning rates above 0 with commas between, not {grid!r}")
    return rates
