"""`dcar data`, which checks annotations and adds negative captions, and `dcar
models`.
"""

from pathlib import Path

import typer

from app.cli import options
from app.cli.options import app, group
from dcar_core.util.errors import ModelError
from dcar_core.util.options import command, option

_RECOMMENDED = "{:42}  {:21}  {:>4}  {:>8}  {:>5}  {:>4}  {:11}  {:13}  {}"
commands = group("data", help="Check annotations, or add negative captions.")


@command(commands, "check", "dcar data check my/catalogue")
def check(
    paths: list[Path] = option(
        help="Data sets: directories, or annotation files.", metavar="PATH..."
    ),
    *,
    images: Path | None = options.IMAGES,
    annotations_only: bool = option(False, "Do not open the images."),
    context: int = option(
        77,
        "Count captions of more CLIP tokens; 0 counts none.",
        min=0,
    ),
) -> int:
    """Print the contents of a data set, its repairs and omissions; fails if images are
    missing or broken.
    """
    from dcar_core.data import UNUSABLE, check_dataset, describe_reports

    unusable = 0
    for path in paths:
        checked = check_dataset(
            path,
            image_root=images,
            decode_images=not annotations_only,
            context=context,
        )
        typer.echo(f"{path}\n{describe_reports(*checked)}")
        unusable += sum(
            report.counts[phrase]
            for report in checked[1].values()
            for phrase in UNUSABLE
        )
    if unusable:
        remedy = (
            "set --images to their folder, repair them, or train with --skip-broken"
        )
        typer.echo(f"{unusable:,} images cannot be used: {remedy}", err=True)
    return int(unusable > 0)


@command(commands, "negatives", "dcar data negatives my/catalogue --out with-negatives")
def negatives(
    path: Path = option(help="Data set: a directory, or an annotation file."),
    *,
    out: Path | None = option(
        None, "New directory for the annotations with negatives."
    ),
    negatives: str = option("missing", options.NEGATIVES),
    taxonomy: Path | None = options.TAXONOMY,
    model: str | None = option(
        None,
        "CLIP model that compares category names, as in training. Default: compare"
        " their letters.",
    ),
    pretrained: str | None = options.PRETRAINED,
    count: int = option(4, "Maximum negatives per caption.", min=1, max=8),
    seed: int = option(0, "Seed of the attribute swaps."),
    show: int = option(3, "Captions of each split to print.", min=0),
    device: str = options.DEVICE,
) -> None:
    """Generate negative captions as `dcar train` does, print some, and write them for
    review and training.
    """
    from dcar_core.data import Annotations, describe_reports, write_splits
    from dcar_core.negatives import LETTER_FUNCTIONS, add_negatives, backbone_functions

    splits, reports = Annotations(path).load_all(None, "ignore")
    functions = LETTER_FUNCTIONS
    if model is not None:  # torch takes seconds
        from dcar_core.encoder.encoder import pick_device
        from dcar_core.model.backbone import BackboneSource, load_backbone

        functions = backbone_functions(
            load_backbone(BackboneSource(model, pretrained), pick_device(device))
        )
    made = add_negatives(
        splits,
        reports,
        functions,
        mode=negatives,
        taxonomy=taxonomy,
        count=count,
        seed=seed,
    )
    for split in made.values():
        for sample in (
            split.samples[:: max(1, len(split) // show)][:show] if show else ()
        ):
            typer.echo(f"{sample.image}  [{sample.category}]\n    {sample.caption}")
            for text, category in zip(
                sample.negatives,
                sample.negative_categories,
                strict=False,
            ):
                typer.echo(f"  - {text}  [{category}]")
    typer.echo(describe_reports(made, reports), err=True)
    if out is not None:
        write_splits(made, out)
        typer.echo(
            f"{out}: {', '.join(f'{name}.jsonl' for name in made)}; train with --data"
            f" {out} --images IMAGES"
        )


@command(app, "models", "dcar models --recommend", "dcar models siglip2")
def models(
    name: str = option("", "Part of the names to list, in any case. Default: all."),
    *,
    recommend: bool = option(
        False, "Recommended models, with published recall, size, cost and licence."
    ),
) -> None:
    """List the built-in models: name, level, parameters in millions, image size,
    context length, languages, libraries, and tags for --pretrained.

    Levels: full takes prompts in both towers, text in the text tower only.
    docs/models.md helps to choose.
    """
    from dcar_core.model.catalogue import list_catalogue, list_recommended

    if recommend:
        heads = (
            "model",
            "weights",
            "M",
            "download",
            "GFLOP",
            "COCO",
            "stated by",
            "licence",
            "for",
        )
        typer.echo(_RECOMMENDED.format(*heads))
        rows = {
            row: entry
            for row, entry in list_recommended().items()
            if name.lower() in row.name.lower()
        }
        for row, entry in rows.items():
            size = entry.parameters or 0
            cells = (
                row.name,
                row.pretrained or "its own",
                size,
                f"{size / 250:.1f} GB",
                row.gflops,
                row.coco or "-",
            )
            typer.echo(_RECOMMENDED.format(*cells, row.source, row.licence, row.use))
        return
    entries = [
        entry for entry in list_catalogue() if name.lower() in entry.name.lower()
    ]
    if not entries:
        raise ModelError("no built-in model matches; `dcar models` lists all")
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        typer.echo(
            f"{entry.name:{width}}  {entry.level:8}  {entry.parameters or '-':4} M "
            f" {entry.image_size:3} px  {entry.context_length:2} tokens "
            f" {entry.languages:7}  {', '.join(entry.needs) or '-':12} "
            f" {', '.join(entry.pretrained) or '-'}"
        )
