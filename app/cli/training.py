"""`dcar train` and `dcar evaluate`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import (
    BatchSize,
    Data,
    Device,
    Epochs,
    Images,
    LearningRate,
    ModelName,
    Out,
    Pretrained,
    SkipBroken,
)

if TYPE_CHECKING:
    from dcar_core.backbone import Backbone

commands = typer.Typer()


@commands.command()
def train(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    method: Annotated[str, typer.Option(help="dcar, coop, maple, dual, ... (an unknown name lists all)")] = "dcar",
    images: Images = None,
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: LearningRate = 2e-3,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better validation recall.")] = 5,
    seed: int = 0,
    device: Device = "auto",
    skip_broken: SkipBroken = False,
) -> None:
    """Adapt CLIP to a domain: learns prompts of a few hundred KB, keeps the best epoch by validation recall."""
    from dcar_core.checkpoint import save_checkpoint
    from dcar_core.config import TrainConfig
    from dcar_core.data import describe, load_splits, save_reports
    from dcar_core.evaluate import seeded_model
    from dcar_core.methods import method as method_config
    from dcar_core.train import train as run

    chosen = method_config(method)
    config = TrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed)
    splits, reports = load_splits(data, ("train", "val"), images=images, skip_broken=skip_broken)
    typer.echo(describe(splits, reports), err=True)
    training, validation = splits["train"], splits["val"]
    save_reports(reports, out)
    prompted = seeded_model(_backbone(model, pretrained, device), chosen, seed)
    found = run(prompted, training, validation, config)
    mark = save_checkpoint(prompted, out, training={**config.to_dict(), "epoch": found.epoch, "validation": found.best})
    (out / "history.json").write_text(json.dumps(found.history, indent=1) + "\n")
    typer.echo(
        f"{out}: epoch {found.epoch}, validation text-to-image R@1 {found.best['t2i_r1']:.1f}, "
        f"image-to-text R@1 {found.best['i2t_r1']:.1f}, {found.seconds:.0f} s, fingerprint {mark[:12]}"
    )


@commands.command()
def evaluate(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; an unknown name lists all.")] = "clip,coop,maple,dcar",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    images: Images = None,
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: LearningRate = 2e-3,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better validation recall.")] = 5,
    device: Device = "auto",
) -> None:
    """Train and test several methods with several seeds; prints a table and writes results.json to --out."""
    from dcar_core.config import TrainConfig
    from dcar_core.evaluate import compare, table

    names = [name.strip() for name in methods.split(",") if name.strip()]
    config = TrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience)
    results = compare(_backbone(model, pretrained, device), data, names, seeds, out, config, images=images)
    typer.echo(table(results))


def _backbone(model: str, pretrained: str | None, device: str) -> "Backbone":
    from dcar_core.backbone import BackboneSource, load_backbone
    from dcar_core.encoder import pick_device

    return load_backbone(BackboneSource(model, pretrained), pick_device(device))
