"""`dcar data`: look at annotations before training on them, or make some."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Images

commands = typer.Typer(help="Check annotations, or have captions written for your pictures.", no_args_is_help=True)


@commands.command("check")
def data_check(
    paths: Annotated[
        list[Path], typer.Argument(help="Data sets: directories, or annotation files.", metavar="PATH...")
    ],
    images: Images = None,
    annotations_only: Annotated[bool, typer.Option(help="Do not look for the pictures.")] = False,
    context: Annotated[int, typer.Option(min=0, help="Count captions of more CLIP tokens than this; 0: do not.")] = 77,
) -> None:
    """Print what a data set holds and what was repaired or left out; fails if pictures are missing or broken."""
    from dcar_core.backbone import clip_token_counts
    from dcar_core.data import check

    count = clip_token_counts if context else None
    unusable = 0
    for path in paths:
        typer.echo(f"{path}")
        for split in check(path, images=images, pictures=not annotations_only, context=context, count_tokens=count):
            typer.echo(split)
            unusable += len(split.missing) + len(split.broken)
    if unusable:
        typer.echo(
            f"{unusable:,} pictures cannot be used: point --images to where they are, mend them, or train with "
            f"--skip-broken (--annotations-only leaves pictures out of this check)",
            err=True,
        )
        raise typer.Exit(1)
