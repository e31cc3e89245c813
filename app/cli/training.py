"""`dcar train`, `dcar retrain`, `dcar zero-shot` and `dcar evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from app.cli import options
from app.cli.options import app
from dcar_core.model.catalogue import recommended_weights
from dcar_core.model.config import GRID, Amp, BackboneSource, LossDirection, TrainConfig
from dcar_core.util.files import require_writable
from dcar_core.util.options import command, option, with_options
from index_jobs.spec import BuildOptions

UNTOUCHED_IS_AS_GOOD = 3  # exit status of `dcar train`


@dataclass(kw_only=True)
class Training:
    """Options of `dcar train` and `dcar evaluate`."""

    data: Path = option(
        help=(
            "Directory with train.json, ..., or a table; see"
            " docs/reference/data-formats.md."
        )
    )
    out: Path = options.OUT
    model: str = options.MODEL
    pretrained: str | None = options.PRETRAINED
    images: Path | None = options.IMAGES
    epochs: int = option(TrainConfig.epochs, "Maximum number of epochs.", min=1)
    batch_size: int = option(TrainConfig.batch_size, "Pairs per training step.", min=2)
    lr: float = option(TrainConfig.lr, "Learning rate.", min=0)
    loss: LossDirection = option(
        "both", "Contrastive loss: in both directions, or image-to-text only."
    )
    patience: int = option(
        5,
        "Epochs without better validation recall before training stops; 0: never.",
        min=0,
    )
    accumulate: int = option(
        1,
        "Split a batch into parts, for a small device; the result is the same.",
        min=1,
    )
    amp: Amp = option(
        "auto",
        "Mixed precision: auto (if a GPU supports it), off, bfloat16 or float16.",
    )
    features: Path | None = option(
        None,
        "Cache of frozen features, which several runs can share. Default:"
        " OUT/features.",
        envvar="DCAR_FEATURES",
    )
    device: str = options.DEVICE
    skip_broken: bool = option(False, "Leave out images that are missing or broken.")
    negatives: str = option("auto", options.NEGATIVES)
    taxonomy: Path | None = options.TAXONOMY

    @property
    def source(self) -> BackboneSource:
        return BackboneSource(
            self.model, self.pretrained or recommended_weights(self.model)
        )

    def config(self, seed: int = 0) -> TrainConfig:
        return TrainConfig(
            seed=seed,
            **self.pick("epochs", "batch_size", "lr", "patience", "accumulate", "amp"),
        )

    def pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


@command(app, "train", "dcar train --data my/catalogue --out checkpoint")
@with_options(Training)
def train(
    *,
    method: str | None = option(
        None,
        "query-prompts, dcar+, dcar, ... (an unknown name lists all). Default, by the"
        " level of `dcar models`: query-prompts for full (block-adapters+ for image"
        " towers unlike CLIP's), dcar+-text for text.",
    ),
    seed: int = option(0, "Seed of the run.", min=0),
    restart: bool = option(
        False, "Train from the start: discard an interrupted or a finished run."
    ),
    **training: Any,
) -> int:
    """Adapt CLIP to a domain: learn adapters or prompts of a few MB, keep the best
    epoch by validation recall.

    The last lines compare the adapted model with the untouched one. Exit status 3: the
    untouched model is at least as good; the checkpoint is still written. An interrupted
    run resumes with the same command; a finished one is not repeated. The checkpoint of
    another training is not replaced without --restart.
    """
    chosen = Training(**training)
    require_writable(chosen.out)
    if method is not None:
        from dcar_core.model.methods import find_method

        find_method(method)  # refuses an unknown name
    from dcar_core.training.adapt import adapt

    done = adapt(
        chosen.data,
        chosen.source,
        chosen.out,
        chosen.config(seed),
        method=method,
        restart=restart,
        on_data=lambda text: typer.echo(text, err=True),
        **chosen.pick(
            "features",
            "device",
            "loss",
            "images",
            "skip_broken",
            "negatives",
            "taxonomy",
        ),
    )
    state, hint = (
        ("already trained: ", "; --restart trains again")
        if done.is_repeated
        else ("", "")
    )
    line = (
        f"{state}epoch {done.epoch}, {done.seconds:.0f} s, fingerprint"
        f" {done.fingerprint[:12]}{hint}"
    )
    typer.echo(f"{chosen.out}: {line}")
    if done.verdict:
        typer.echo(done.verdict)
    return 0 if done.is_worth_it else UNTOUCHED_IS_AS_GOOD


@command(
    app,
    "retrain",
    "dcar retrain --index index --pairs pairs",
    "dcar index rollback index",
)
@with_options(BuildOptions, "validation", "margin")
def retrain(
    *,
    index: Path = options.INDEX,
    pairs: list[Path] = option(
        help=(
            "Table with a column caption and a column id or image, as `dcar feedback"
            " export` writes it, or its directory; may be repeated."
        ),
        metavar="FILE",
    ),
    device: str = options.DEVICE,
    **build: Any,
) -> None:
    """Tune the served model on new pairs, and publish it with the index if it ranks
    better.

    Only an adapter behind the text tower learns, in seconds. The rest needs `dcar
    train`, which resumes, and a build. INDEX/retrain.json has the comparison. Exit
    status 6: not published.
    """
    from index_jobs.index.stores import location_of
    from index_jobs.jobs.retrain import retrain as run

    summary = run(index, pairs, device=device, **build)
    typer.echo(f"{location_of(index)}: {summary.to_text()}")


@command(app, "zero-shot", "dcar zero-shot --model ViT-B-32-quickgelu --out clip")
def zero_shot(
    *,
    out: Path = options.OUT,
    model: str = options.MODEL,
    pretrained: str | None = options.PRETRAINED,
) -> None:
    """Write a checkpoint of the unadapted model, to index and search without training,
    or to compare with.

    It needs no data, and works wherever a trained checkpoint does: `dcar index build
    --checkpoint OUT ...`
    """
    require_writable(out)
    from dcar_core.model.checkpoint import save_zero_shot

    fingerprint = save_zero_shot(
        BackboneSource(model, pretrained or recommended_weights(model)), out
    )
    typer.echo(f"{out}: {model} unadapted, fingerprint {fingerprint[:12]}")


@command(
    app,
    "evaluate",
    "dcar evaluate --data my/catalogue --methods clip,query-prompts --out results",
)
@with_options(Training)
def evaluate(
    *,
    methods: str = option(
        "",
        "Methods, separated by commas; an unknown name lists all. Default:"
        " clip,coop,clip-adapter,maple,dcar,dcar+,query-prompts, or their variants that"
        " the model's towers can run.",
    ),
    seeds: int = option(3, "Seeds for each method.", min=1),
    tune: bool = option(
        False,
        "Choose each method's learning rate on validation with seed 0, in place of"
        f" --lr: {GRID}.",
    ),
    **training: Any,
) -> None:
    """Train and test several methods with several seeds, and the untouched model;
    recommend one in the last line.

    It prints tables, and writes results.md, results.json and recall.svg to --out.

    Finished runs are not repeated, so the same command resumes, and another method or
    seed costs only its own runs.
    """
    chosen = Training(**training)
    require_writable(chosen.out)
    from dcar_core.encoder.encoder import pick_device
    from dcar_core.evaluation import all_tables, compare
    from dcar_core.model.backbone import load_backbone
    from dcar_core.model.config import UNTOUCHED
    from dcar_core.model.methods import comparable_methods, find_method

    names = list(
        dict.fromkeys(name.strip() for name in methods.split(",") if name.strip())
    )
    for name in names:
        find_method(name)  # refuses an unknown name before a model is loaded
    backbone = load_backbone(chosen.source, pick_device(chosen.device))
    if not names:
        names = comparable_methods(backbone)
        typer.echo(
            f"comparing {', '.join(names)}: methods for a model of level"
            f" {backbone.level}",
            err=True,
        )
    elif UNTOUCHED.method not in names:
        names.insert(0, UNTOUCHED.method)  # which needs no training
    results = compare(
        backbone,
        chosen.data,
        names,
        seeds,
        chosen.out,
        chosen.config(),
        grid=GRID if tune else (),
        on_message=lambda line: typer.echo(line, err=True),
        **chosen.pick(
            "images", "skip_broken", "negatives", "taxonomy", "loss", "features"
        ),
    )
    typer.echo(
        f"{all_tables(results)}\n{chosen.out / 'results.md'} has"
        f" more\n{results['recommendation']}"
    )
