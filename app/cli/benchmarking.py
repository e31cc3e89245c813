"""`dcar benchmark`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import EXAMPLES, Device, Images, Pretrained

commands = typer.Typer()


@commands.command()
def benchmark(
    checkpoint: Annotated[
        str, typer.Option(help="What `dcar train` wrote, a model directory, or an open_clip model.")
    ] = str(EXAMPLES / "twemoji" / "checkpoint"),
    data: Annotated[Path, typer.Option(help="Annotations with a test split, as for training.")] = EXAMPLES / "twemoji",
    runtimes: Annotated[
        str,
        typer.Option(
            help="For a look at some, with commas; default: what `auto` tries and int8; an unknown name lists all."
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="A JSON file for everything that was measured.")] = None,
    images: Images = None,
    pretrained: Pretrained = None,
    limit: Annotated[int, typer.Option(min=1, help="Most captions of the test split.")] = 2000,
    cache: Annotated[
        Path | None, typer.Option(envvar="DCAR_RUNTIME_CACHE", help="Exports and measurements; default: the user's.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure every runtime here with real captions and pictures, and remember the best one for `--runtime auto`.

    Without options it takes the bundled emoji. int8 is calibrated on the training split.
    """
    from dcar_core.serving.runtime_benchmark import benchmark as run
    from dcar_core.serving.runtime_benchmark import format_report

    names = [name.strip() for name in runtimes.split(",") if name.strip()]
    report = run(
        checkpoint, data, runtimes=names, pretrained=pretrained, images=images, cache=cache, device=device,
        limit=limit, say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(format_report(report))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
