"""`dcar train`, `dcar retrain`, `dcar zero-shot` and `dcar evaluate`."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from typer import Option

from app.cli import options
from app.cli.options import example
from dcar_core.model.config import GRID, PromptValues, Temperature, TrainConfig
from dcar_core.model.recommended import DEFAULT, recommended_weights
from dcar_core.util.files import require_writable
from index_jobs.spec import BuildOptions

if TYPE_CHECKING:
    from dcar_core.training.finished import FinishedTraining

commands = typer.Typer()

DEFAULT_GRID = ",".join(f"{lr:g}" for lr in GRID)
N = TypeVar("N", int, float)
PAPER_MODEL = "ViT-B-32-quickgelu"  # as OpenAI trained it
UNTOUCHED_IS_AS_GOOD = 3  # exit status of `dcar train`


@commands.command(epilog=example("dcar train --data my/catalogue --out checkpoint"))
def train(
    data: options.Data,
    out: options.Out,
    model: options.ModelName = DEFAULT.name,
    pretrained: options.Pretrained = None,
    method: Annotated[
        str | None,
        Option(
            help="query-prompts, dcar+, dcar, ... (an unknown name lists all). Default, by the level of `dcar models`: "
            "query-prompts for full (block-adapters+ for image towers unlike CLIP's), dcar+-text for text, "
            "clip-adapter for features."
        ),
    ] = None,
    images: options.Images = None,
    epochs: options.Epochs = TrainConfig.epochs,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    lr: options.LearningRate = TrainConfig.lr,
    loss: options.Loss = "both",
    patience: options.Patience = 5,
    seed: Annotated[int, Option(min=0, help="Seed of the run.")] = 0,
    accumulate: options.Accumulate = TrainConfig.accumulate,
    amp: options.Amp = "auto",
    features: options.Features = None,
    tensorboard: Annotated[bool, Option(help="Also write OUT/tensorboard (extra: tensorboard).")] = False,
    restart: Annotated[bool, Option(help="Train from the start: discard an interrupted or a finished run.")] = False,
    device: options.Device = "auto",
    skip_broken: options.SkipBroken = False,
    negatives: options.Negatives = "auto",
    taxonomy: options.Taxonomy = None,
) -> None:
    """Adapt CLIP to a domain: learn adapters or prompts of a few MB, keep the best epoch by validation recall.

    The last lines compare the adapted model with the untouched one. Exit status 3: the untouched model is at least as
    good; the checkpoint is still written. An interrupted run resumes with the same command; a finished one ends at
    once. The checkpoint of another training is not replaced without --restart.
    """
    from dcar_core.training.finished import describe_request, find_finished

    pretrained = pretrained or recommended_weights(model)
    config = _config(
        epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed, accumulate=accumulate, amp=amp
    )
    require_writable(out)
    if method is not None:
        from dcar_core.model.methods.registry import method as config_of

        config_of(method)  # refuses an unknown name
    given: dict[str, Any] = {
        "method": method, "loss": loss, "images": images, "skip_broken": skip_broken, "negatives": negatives,
        "taxonomy": taxonomy,
    }  # fmt: skip
    request = describe_request(data, model, pretrained, config, **given)
    finished = None if restart else find_finished(out, request)
    if finished is not None:
        _report(out, finished, "already trained: ", "; --restart trains again")
        return
    from dcar_core.model.backbone import BackboneSource
    from dcar_core.training.adapt import adapt

    done = adapt(
        data, BackboneSource(model, pretrained), out, config, features=features, tensorboard=tensorboard,
        restart=restart, device=device, request=request,
        on_data=lambda description: typer.echo(description, err=True), **given,
    )  # fmt: skip
    _report(out, done)


@commands.command(epilog=example("dcar retrain --index index --pairs pairs", "dcar index rollback index"))
def retrain(
    index: options.IndexDir,
    pairs: Annotated[
        list[Path],
        Option(
            metavar="FILE",
            help="Table with a column caption and a column id or image, as `dcar feedback export` writes it, or its "
            "directory; may be repeated.",
        ),
    ],
    validation: Annotated[Path | None, Option(metavar="DATA", help="As for `dcar index build`.")] = None,
    judgements: Annotated[Path | None, Option(metavar="FILE", help="As for `dcar index build`.")] = None,
    margin: Annotated[float, Option(min=0, max=1, help="As for `dcar index build`.")] = BuildOptions.margin,
    device: options.Device = "auto",
) -> None:
    """Tune the served model on new pairs, and publish it with the index if it ranks better.

    Only an adapter behind the text tower learns, in seconds. The rest needs `dcar train`, which resumes, and a build.
    INDEX/retrain.json has the comparison. Exit status 6: not published.
    """
    started = time.perf_counter()
    from index_jobs.index.location import location_of
    from index_jobs.index.versions import open_current
    from index_jobs.jobs.retrain import describe_rest
    from index_jobs.jobs.retrain import retrain as run

    served = open_current(index)
    if rest := describe_rest(served.checkpoint):
        typer.echo(f"{location_of(index)}: {rest}", err=True)
    summary = run(
        index, pairs, validation=validation, judgements=judgements, margin=margin, device=device, started=started
    )
    typer.echo(f"{location_of(index)}: {summary.to_text()}")


@commands.command("zero-shot", epilog=example("dcar zero-shot --model ViT-B-32-quickgelu --out clip"))
def zero_shot(out: options.Out, model: options.ModelName = DEFAULT.name, pretrained: options.Pretrained = None) -> None:
    """Write a checkpoint of the unadapted model, to index and search without training, or to compare with.

    It needs no data, and works wherever a trained checkpoint does: `dcar index build --checkpoint OUT ...`
    """
    require_writable(out)
    pretrained = pretrained or recommended_weights(model)
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.checkpoint import save_zero_shot

    fingerprint = save_zero_shot(load_backbone(BackboneSource(model, pretrained)), out)
    typer.echo(f"{out}: {model} unadapted, fingerprint {fingerprint[:12]}")


@commands.command(epilog=example("dcar evaluate --data my/catalogue --methods clip,query-prompts --out results"))
def evaluate(
    data: options.Data,
    out: options.Out,
    model: options.ModelName = DEFAULT.name,
    pretrained: options.Pretrained = None,
    methods: Annotated[
        str | None,
        Option(
            help="Methods, separated by commas; an unknown name lists all. Default: clip,coop,clip-adapter,maple,dcar,"
            "dcar+,query-prompts, or their variants that the model's towers can run."
        ),
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Seeds for each method.")] = 3,
    images: options.Images = None,
    epochs: options.Epochs = TrainConfig.epochs,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    lr: options.LearningRate = TrainConfig.lr,
    loss: options.Loss = "both",
    prompts: Annotated[
        PromptValues | None, Option(help="constant: prompts learn nothing; those of query-prompts ignore the query.")
    ] = None,
    anchor: Annotated[
        float | None, Option(min=0, max=100, help="Weight of L_anchor. Default: the method's own.")
    ] = None,
    temperature: Annotated[Temperature | None, Option(help="learned: the losses learn CLIP's temperature.")] = None,
    tune: Annotated[bool, Option(help="Choose the learning rate of each method on validation, seed 0.")] = False,
    grid: Annotated[str, Option(help="Learning rates that --tune tries.")] = DEFAULT_GRID,
    patience: options.Patience = 5,
    accumulate: options.Accumulate = TrainConfig.accumulate,
    amp: options.Amp = "auto",
    features: options.Features = None,
    device: options.Device = "auto",
    skip_broken: options.SkipBroken = False,
    negatives: options.Negatives = "auto",
    taxonomy: options.Taxonomy = None,
    preset: Annotated[
        Literal["paper"] | None,
        Option(
            help="paper: --data holds the paper's data sets as folders; each is evaluated in OUT/NAME with --tune, and "
            "the paper's figures are shown next to ours. The model is ViT-B-32-quickgelu with the weights of OpenAI."
        ),
    ] = None,
) -> None:
    """Train and test several methods with several seeds, and the untouched model; recommend one in the last line.

    It prints tables, and writes results.md, results.json and recall.svg to --out.

    Finished runs are not repeated, so the same command resumes, and another method or seed costs only its own runs.
    """
    require_writable(out)
    if preset:
        tune, model = True, PAPER_MODEL if model == DEFAULT.name else model
    pretrained = pretrained or recommended_weights(model)
    from dcar_core.encoder.encoder import pick_device
    from dcar_core.evaluation import all_tables, compare, find_data_sets, paper_tables
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.methods.registry import comparable_methods, method

    names = list(dict.fromkeys(name.strip() for name in (methods or "").split(",") if name.strip()))
    for name in names:
        method(name)  # refuses an unknown name before a model is loaded
    config = _config(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, accumulate=accumulate, amp=amp)
    rates = _numbers("--grid", grid, float)
    if tune and lr != TrainConfig.lr:
        raise typer.BadParameter("--tune chooses the learning rate; leave out --lr, or name the rates by --grid")
    if tune and not rates:
        raise typer.BadParameter("--grid has no learning rate")
    if not tune and grid != DEFAULT_GRID:
        raise typer.BadParameter("--grid names the learning rates of --tune; give both, or one rate by --lr")
    places = {out: data}
    if preset:
        found, missing = find_data_sets(data)
        places = {out / name: place for name, place in found.items()}
        for line in missing:
            typer.echo(line, err=True)
    backbone = load_backbone(BackboneSource(model, pretrained), pick_device(device))
    if methods is None:
        names = comparable_methods(backbone)
        typer.echo(f"comparing {', '.join(names)}: methods for a model of level {backbone.level}", err=True)
    elif "clip" not in names:
        names.insert(0, "clip")  # the untouched model, which needs no training
    results = {}
    for directory, place in places.items():
        result = results[place.name] = compare(
            backbone, place, names, seeds, directory, config, images=images, skip_broken=skip_broken,
            negatives=negatives, taxonomy=taxonomy, loss=loss,
            controls={"prompts": prompts, "anchor": anchor, "temperature": temperature},
            tune=tune, grid=rates, features=features,
            on_message=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
        typer.echo(all_tables(result))
        typer.echo(f"{directory / 'results.md'} has more")
        typer.echo(result["recommendation"])
    if preset:
        typer.echo(paper_tables(results))


def _report(out: Path, done: "FinishedTraining", state: str = "", hint: str = "") -> None:
    """Print what a training came to, and exit with status 3 if the untouched model is at least as good."""
    typer.echo(f"{out}: {state}epoch {done.epoch}, {done.seconds:.0f} s, fingerprint {done.fingerprint[:12]}{hint}")
    if done.verdict:
        typer.echo(done.verdict)
    if not done.is_worth_it:
        raise typer.Exit(UNTOUCHED_IS_AS_GOOD)


def _config(**settings: Any) -> TrainConfig:
    try:
        return TrainConfig.from_dict(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Return the numbers of an option, which commas separate."""
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [kind("0")]
    if not all(0 < number < math.inf for number in numbers):
        raise typer.BadParameter(f"{option} must be numbers above 0, separated by commas, not {text!r}")
    return numbers
