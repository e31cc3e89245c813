"""`dcar data`: look at annotations before training on them, or make some."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Device, Images, Negatives, Pretrained, Taxonomy

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


@commands.command("negatives")
def data_negatives(
    path: Annotated[Path, typer.Argument(help="A data set: a directory, or an annotation file.")],
    out: Annotated[Path | None, typer.Option(help="A new directory for the annotations with negatives.")] = None,
    negatives: Negatives = "missing",
    taxonomy: Taxonomy = None,
    model: Annotated[
        str | None,
        typer.Option(help="CLIP that says which category names are alike, as in training; default: by their letters."),
    ] = None,
    pretrained: Pretrained = None,
    count: Annotated[int, typer.Option(min=1, max=8, help="Most negatives of a caption.")] = 4,
    seed: Annotated[int, typer.Option(help="Other attribute swaps.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="So many captions of each split are printed.")] = 3,
    device: Device = "auto",
) -> None:
    """Make negative captions as `dcar train` does, print some, and write them to look at, edit and train on."""
    from dcar_core.data import describe, load_split, splits_of, write_splits
    from dcar_core.errors import DataError
    from dcar_core.negatives import fill, views

    names = splits_of(path)
    if not names:
        raise DataError(f"{path} has no pairs for train, val or test")
    read = {name: load_split(path, name, pictures="ignore") for name in names}
    splits, reports = {n: data for n, (data, _) in read.items()}, {n: report for n, (_, report) in read.items()}
    features, cut = views(model, pretrained, device)
    made = fill(splits, reports, features=features, cut=cut, mode=negatives, taxonomy=taxonomy, count=count, seed=seed)
    for data in made.values():
        for sample in data.samples[:: max(1, len(data) // show)][:show] if show else ():
            typer.echo(f"{sample.image}  [{sample.category}]\n    {sample.caption}")
            for text, category in zip(sample.negatives, sample.negative_categories, strict=False):
                typer.echo(f"  - {text}  [{category}]")
    typer.echo(describe(made, reports), err=True)
    if out is not None:
        write_splits(made, out)
        typer.echo(f"{out}: {', '.join(f'{name}.jsonl' for name in made)}; train with --data {out} --images IMAGES")
