"""`dcar benchmark`: measure the encoder runtimes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import EXAMPLES, Device, Images, Pretrained, example

commands = typer.Typer()


@commands.command(epilog=example("dcar benchmark --checkpoint checkpoint --data my/catalogue"))
def benchmark(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint, model directory, or open_clip model.")] = str(
        EXAMPLES / "twemoji" / "checkpoint"
    ),
    data: Annotated[Path, typer.Option(help="Annotations with a test split, as for training.")] = EXAMPLES / "twemoji",
    runtimes: Annotated[
        str,
        typer.Option(
            help="Runtimes, separated by commas; an unknown name lists all. Default: those of `auto`, and int8."
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file for all measurements.")] = None,
    images: Images = None,
    pretrained: Pretrained = None,
    limit: Annotated[int, typer.Option(min=1, help="Most captions of the test split to use.")] = 2000,
    cache: Annotated[
        Path | None,
        typer.Option(envvar="DCAR_RUNTIME_CACHE", help="Cache of exports and measurements. Default: the user's cache."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure every runtime on this machine with real captions and images, and store the best for `--runtime auto`.

    Without options it uses the bundled emoji. int8 is calibrated on the training split.
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
        out.write_text(json.dumps(asdict(report), indent=2) + "\n")
