"""`dcar train`, `dcar zero-shot` and `dcar evaluate`."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.hub import prepare_hub
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
    Loss,
    ModelName,
    Negatives,
    Out,
    Patience,
    Pretrained,
    SkipBroken,
    Taxonomy,
    example,
)
from dcar_core.model.config import GRID, TrainConfig

commands = typer.Typer()

DEFAULT_GRID = ",".join(f"{lr:g}" for lr in GRID)
UNTOUCHED_IS_AS_GOOD = 3  # exit status of `dcar train`


@commands.command(
    epilog=example(
        "dcar train --data my/catalogue --pretrained openai --out checkpoint",
        "torchrun --nproc-per-node 2 -m app.cli train --data my/catalogue --pretrained openai --out checkpoint",
    )
)
def train(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="block-adapters, dcar+, dcar, ... (an unknown name lists all). Default: by the model's level, as "
            "`dcar models` lists it: block-adapters for full, dcar+-text for text, clip-adapter for features."
        ),
    ] = None,
    images: Images = None,
    epochs: Epochs = TrainConfig.epochs,
    batch_size: BatchSize = TrainConfig.batch_size,
    lr: LearningRate = TrainConfig.lr,
    loss: Loss = "both",
    patience: Patience = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    accumulate: Accumulate = TrainConfig.accumulate,
    amp: Amp = "auto",
    features: Features = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write OUT/tensorboard (extra: tensorboard).")] = False,
    restart: Annotated[bool, typer.Option(help="Discard the state of an interrupted run.")] = False,
    device: Device = "auto",
    skip_broken: SkipBroken = False,
    negatives: Negatives = "auto",
    taxonomy: Taxonomy = None,
) -> None:
    """Adapt CLIP to a domain: learn adapters or prompts of a few MB, keep the best epoch by validation recall.

    The last lines compare the adapted model with the untouched one. Exit status 3: the untouched model is at least as
    good; the checkpoint is written nevertheless. An interrupted run resumes with the same command.
    """
    prepare_hub(model, pretrained)
    from dcar_core.model.backbone import BackboneSource
    from dcar_core.training.adapt import adapt

    config = _config(
        epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed, accumulate=accumulate, amp=amp
    )
    done = adapt(
        data, BackboneSource(model, pretrained), out, config, method=method, loss=loss, images=images,
        skip_broken=skip_broken, negatives=negatives, taxonomy=taxonomy, features=features, tensorboard=tensorboard,
        restart=restart, device=device, on_data=lambda description: typer.echo(description, err=True),
    )  # fmt: skip
    if done is None:
        return
    result, verdict = done.result, done.verdict
    typer.echo(f"{out}: epoch {result.epoch}, {result.seconds:.0f} s, fingerprint {done.fingerprint[:12]}")
    if verdict is None:
        return
    typer.echo(str(verdict))
    if not verdict.is_worth_it:
        raise typer.Exit(UNTOUCHED_IS_AS_GOOD)


@commands.command(
    "zero-shot", epilog=example("dcar zero-shot --model ViT-B-32-quickgelu --pretrained openai --out clip")
)
def zero_shot(out: Out, model: ModelName = "ViT-B-32-quickgelu", pretrained: Pretrained = None) -> None:
    """Write a checkpoint of the unadapted model, to index and search without training, or to compare with.

    It needs no data, and works wherever a trained checkpoint does: `dcar index build --checkpoint OUT ...`
    """
    prepare_hub(model, pretrained)
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.checkpoint import save_zero_shot

    fingerprint = save_zero_shot(load_backbone(BackboneSource(model, pretrained)), out)
    typer.echo(f"{out}: {model} unadapted, fingerprint {fingerprint[:12]}")


@commands.command(
    epilog=example("dcar evaluate --data my/catalogue --pretrained openai --methods clip,block-adapters --out results")
)
def evaluate(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; an unknown name lists all. Default: clip,coop,clip-adapter,maple,dcar,"
            "dcar+,block-adapters, or their variants that the model's towers can run."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each method.")] = 3,
    images: Images = None,
    epochs: Epochs = TrainConfig.epochs,
    batch_size: BatchSize = TrainConfig.batch_size,
    lr: LearningRate = TrainConfig.lr,
    loss: Loss = "both",
    shots: Annotated[
        str, typer.Option(help="Also train on this many pairs of each category, such as 1,2,4,8,16, for curves.")
    ] = "",
    unseen_categories: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the categories to leave out of training and validation.")
    ] = 0.0,
    also: Annotated[
        list[Path] | None, typer.Option(help="Another data set to measure the trained models on; may be repeated.")
    ] = None,
    tune: Annotated[bool, typer.Option(help="Choose the learning rate of each method on validation, seed 0.")] = False,
    grid: Annotated[str, typer.Option(help="Learning rates that --tune tries.")] = DEFAULT_GRID,
    patience: Patience = 5,
    accumulate: Accumulate = TrainConfig.accumulate,
    amp: Amp = "auto",
    features: Features = None,
    device: Device = "auto",
    skip_broken: SkipBroken = False,
    negatives: Negatives = "auto",
    taxonomy: Taxonomy = None,
) -> None:
    """Train and test several methods with several seeds; print a table, and write results.* and report.html to --out.

    Finished runs are not repeated, so the same command resumes, and another method or seed costs only its own runs.
    """
    prepare_hub(model, pretrained)
    from dcar_core.evaluation import all_tables, compare
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.methods.registry import comparable_methods, method
    from dcar_core.serving.encoder import pick_device

    names = list(dict.fromkeys(name.strip() for name in (methods or "").split(",") if name.strip()))
    for name in names:
        method(name)  # refuses an unknown name before a model is loaded
    config = _config(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, accumulate=accumulate, amp=amp)
    rates = _parse_rates(grid)
    if tune and lr != TrainConfig.lr:
        raise typer.BadParameter("--tune chooses the learning rate; leave out --lr, or name the rates by --grid")
    if not tune and grid != DEFAULT_GRID:
        raise typer.BadParameter("--grid names the learning rates of --tune; give both, or one rate by --lr")
    backbone = load_backbone(BackboneSource(model, pretrained), pick_device(device))
    if methods is None:
        names = comparable_methods(backbone.level)
        typer.echo(f"comparing {', '.join(names)}: methods for a model of level {backbone.level}", err=True)
    results = compare(
        backbone, data, names, seeds, out, config, images=images, skip_broken=skip_broken, negatives=negatives,
        taxonomy=taxonomy, loss=loss, shots=_parse_shots(shots), unseen_categories=unseen_categories,
        also=also or (), tune=tune, grid=rates, features=features,
        on_message=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(all_tables(results))
    typer.echo(f"{out / 'report.html'} shows more, without a server")


def _config(**settings: Any) -> TrainConfig:
    try:
        return TrainConfig.from_dict(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _parse_rates(grid: str) -> list[float]:
    rates: list[float] = []
    with suppress(ValueError):
        rates = [float(part) for part in grid.split(",") if part.strip()]
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise typer.BadParameter(f"--grid must be learning rates above 0, separated by commas, not {grid!r}")
    return rates


def _parse_shots(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--shots must be numbers above 0, separated by commas, not {text!r}")
    return sorted({int(part) for part in parts})
