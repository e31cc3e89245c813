"""`dcar data`: check annotations, and add negative captions."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from app.cli.options import Device, Images, Negatives, Pretrained, Taxonomy, example

commands = typer.Typer(help="Check annotations, or add negative captions.", no_args_is_help=True)


@commands.command("check", epilog=example("dcar data check my/catalogue"))
def check_command(
    paths: Annotated[list[Path], Argument(help="Data sets: directories, or annotation files.", metavar="PATH...")],
    images: Images = None,
    annotations_only: Annotated[bool, Option(help="Do not open the images.")] = False,
    context: Annotated[int, Option(min=0, help="Count captions of more CLIP tokens; 0 counts none.")] = 77,
) -> None:
    """Print the contents of a data set, its repairs and omissions; fails if images are missing or broken."""
    from dcar_core.data import UNUSABLE, check_dataset, describe_reports

    unusable = 0
    for path in paths:
        checked = check_dataset(path, image_root=images, decode_images=not annotations_only, context=context)
        typer.echo(f"{path}\n{describe_reports(*checked)}")
        unusable += sum(report.counts[phrase] for report in checked[1].values() for phrase in UNUSABLE)
    if unusable:
        typer.echo(
            f"{unusable:,} images cannot be used: set --images to their folder, repair them, or train with "
            f"--skip-broken (--annotations-only skips images in this check)",
            err=True,
        )
        raise typer.Exit(1)


@commands.command("negatives", epilog=example("dcar data negatives my/catalogue --out with-negatives"))
def negatives_command(
    path: Annotated[Path, Argument(help="Data set: a directory, or an annotation file.")],
    out: Annotated[Path | None, Option(help="New directory for the annotations with negatives.")] = None,
    negatives: Negatives = "missing",
    taxonomy: Taxonomy = None,
    model: Annotated[
        str | None,
        Option(help="CLIP model that compares category names, as in training. Default: compare their letters."),
    ] = None,
    pretrained: Pretrained = None,
    count: Annotated[int, Option(min=1, max=8, help="Maximum negatives per caption.")] = 4,
    seed: Annotated[int, Option(help="Seed of the attribute swaps.")] = 0,
    show: Annotated[int, Option(min=0, help="Captions of each split to print.")] = 3,
    device: Device = "auto",
) -> None:
    """Generate negative captions as `dcar train` does, print some, and write them for review and training."""
    from dcar_core.data import Annotations, describe_reports, write_splits
    from dcar_core.negatives import LETTER_FUNCTIONS, add_negatives, backbone_functions

    splits, reports = Annotations(path).load_all(None, "ignore")
    functions = LETTER_FUNCTIONS
    if model is not None:  # torch takes seconds
        from dcar_core.encoder.encoder import pick_device
        from dcar_core.model.backbone import BackboneSource, load_backbone

        functions = backbone_functions(load_backbone(BackboneSource(model, pretrained), pick_device(device)))
    made = add_negatives(splits, reports, functions, mode=negatives, taxonomy=taxonomy, count=count, seed=seed)
    for data in made.values():
        for sample in data.samples[:: max(1, len(data) // show)][:show] if show else ():
            typer.echo(f"{sample.image}  [{sample.category}]\n    {sample.caption}")
            for text, category in zip(sample.negatives, sample.negative_categories, strict=False):
                typer.echo(f"  - {text}  [{category}]")
    typer.echo(describe_reports(made, reports), err=True)
    if out is not None:
        write_splits(made, out)
        typer.echo(f"{out}: {', '.join(f'{name}.jsonl' for name in made)}; train with --data {out} --images IMAGES")
