"""`dcar data`: look at annotations before training on them, or make some."""

import math
import os
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
    from dcar_core.data import check_dataset
    from dcar_core.model.text.tokenizer import count_clip_tokens

    count = count_clip_tokens if context else None
    unusable = 0
    for path in paths:
        typer.echo(f"{path}")
        for split in check_dataset(
            path, image_root=images, decode_images=not annotations_only, context=context, count_tokens=count
        ):
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
    from dcar_core.data import describe_reports, load_splits, write_splits
    from dcar_core.negatives import add_negatives, load_text_views

    splits, reports = load_splits(path, image_policy="ignore")
    features, cut = load_text_views(model, pretrained, device)
    made = add_negatives(
        splits, reports, features=features, cut=cut, mode=negatives, taxonomy=taxonomy, count=count, seed=seed
    )
    for data in made.values():
        for sample in data.samples[:: max(1, len(data) // show)][:show] if show else ():
            typer.echo(f"{sample.image}  [{sample.category}]\n    {sample.caption}")
            for text, category in zip(sample.negatives, sample.negative_categories, strict=False):
                typer.echo(f"  - {text}  [{category}]")
    typer.echo(describe_reports(made, reports), err=True)
    if out is not None:
        write_splits(made, out)
        typer.echo(f"{out}: {', '.join(f'{name}.jsonl' for name in made)}; train with --data {out} --images IMAGES")


@commands.command("caption")
def data_caption(
    images: Annotated[Path, typer.Option(help="A folder with a folder of pictures for each category.")],
    out: Annotated[Path, typer.Option(help="The annotations to write, such as captions.json.")],
    url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")],
    model: Annotated[str, typer.Option(help="A vision model there, which writes the drafts.")],
    judge_model: Annotated[str | None, typer.Option(help="What judges the drafts; default: the same model.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Where the judge is; default: at --url.")] = None,
    judge: Annotated[bool, typer.Option(help="Whether drafts are judged at all.")] = True,
    dataset: Annotated[
        str, typer.Option(help="What the pictures are of, for the questions; default: the folder.")
    ] = "",
    templates: Annotated[
        Path | None,
        typer.Option(help="Questions of your own, one a line, with {category} and maybe {dataset}, {words}."),
    ] = None,
    context: Annotated[int, typer.Option(min=16, help="Most CLIP tokens of a caption.")] = 73,
    rounds: Annotated[int, typer.Option(min=1, help="Most drafts of a picture.")] = 3,
    concurrency: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 4,
    side: Annotated[int, typer.Option(min=64, help="Pixels of the longer side of what is sent.")] = 768,
    max_tokens: Annotated[int, typer.Option(min=16, help="Most tokens of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0)] = 0.2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 120,
    tries: Annotated[int, typer.Option(min=1, help="Of one request.")] = 6,
    price: Annotated[str, typer.Option(help="IN,OUT of a million tokens, to show the cost.")] = "",
    judge_price: Annotated[str, typer.Option(help="The judge's; default: --price, if it is the same model.")] = "",
    restart: Annotated[bool, typer.Option(help="Forget what was answered before.")] = False,
) -> None:
    """Have a vision model caption your pictures, and write annotations to train on.

    Keys come from the environment: DCAR_CAPTION_API_KEY, and DCAR_JUDGE_API_KEY where the judge is elsewhere. Killed,
    the same command goes on, and asks nothing twice.
    """
    from dcar_core.captioning.options import CaptionOptions, VisionModel
    from dcar_core.captioning.questions import QUESTION_TEMPLATES, load_templates
    from dcar_core.captioning.run import caption_images
    from dcar_core.captioning.summary import summarize
    from dcar_core.model.text.tokenizer import count_clip_tokens

    drafter = VisionModel(url=url, name=model, key=os.environ.get("DCAR_CAPTION_API_KEY"), price=_price(price))
    second = drafter.judge(judge_url, judge_model, os.environ.get("DCAR_JUDGE_API_KEY"), _price(judge_price))
    options = CaptionOptions(
        dataset=dataset or images.resolve().name.replace("_", " "),
        templates=load_templates(templates) if templates is not None else QUESTION_TEMPLATES,
        context=context, rounds=rounds, side=side, max_tokens=max_tokens, temperature=temperature,
        concurrency=concurrency, timeout_s=timeout, tries=tries,
    )  # fmt: skip
    found = caption_images(images, out, drafter, second if judge else None, options, count_clip_tokens, restart=restart)
    typer.echo(summarize(found))
    if found.failed:
        raise typer.Exit(1)


def _price(given: str) -> tuple[float, float] | None:
    if not given.strip():
        return None
    try:
        into, out = (float(part) for part in given.split(","))
    except ValueError:
        raise typer.BadParameter(f"a price is IN,OUT of a million tokens, such as 0.15,0.60, not {given!r}") from None
    if not (0 <= into < math.inf and 0 <= out < math.inf):
        raise typer.BadParameter(f"a price cannot be {given!r}")
    return into, out
