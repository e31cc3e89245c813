"""`dcar data`: check annotations, add negative captions, caption images."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from app.cli.options import Device, Images, Negatives, Pretrained, Taxonomy, example

commands = typer.Typer(help="Check annotations, add negative captions, or caption images.", no_args_is_help=True)


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
        from dcar_core.model.backbone import BackboneSource, load_backbone
        from dcar_core.serving.encoder import pick_device

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


@commands.command(
    "caption",
    epilog=example(
        "dcar data caption --images photos --out photos/pairs.json --url http://127.0.0.1:8000/v1 --model MODEL"
    ),
)
def caption_command(
    images: Annotated[Path, Option(help="Folder with one folder of images for each category.")],
    out: Annotated[Path, Option(help="Annotations to write, such as photos/pairs.json.")],
    url: Annotated[str, Option(help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")],
    model: Annotated[str, Option(help="Vision model at the endpoint that writes the drafts.")],
    judge_model: Annotated[str | None, Option(help="Model that judges the drafts. Default: --model.")] = None,
    judge_url: Annotated[str | None, Option(help="Endpoint of the judge. Default: --url.")] = None,
    judge: Annotated[bool, Option(help="Judge the drafts.")] = True,
    dataset: Annotated[str, Option(help="Subject of the images, for the questions. Default: the folder's name.")] = "",
    templates: Annotated[
        Path | None, Option(help="File of questions, one per line, with {category} and optionally {dataset}, {words}.")
    ] = None,
    context: Annotated[int, Option(min=16, help="Maximum CLIP tokens of a caption.")] = 73,
    rounds: Annotated[int, Option(min=1, help="Maximum drafts per image.")] = 3,
    concurrency: Annotated[int, Option(min=1, help="Images captioned at a time.")] = 4,
    side: Annotated[int, Option(min=64, help="Longer side of the uploaded image, in pixels.")] = 768,
    max_tokens: Annotated[int, Option(min=16, help="Maximum tokens of a response.")] = 200,
    temperature: Annotated[float, Option(min=0, help="Sampling temperature.")] = 0.2,
    timeout: Annotated[float, Option(min=0.1, help="Seconds to wait for a response.")] = 120,
    tries: Annotated[int, Option(min=1, help="Attempts for one request.")] = 6,
    price: Annotated[str, Option(help="IN,OUT price of a million tokens, to print the cost.")] = "",
    judge_price: Annotated[str, Option(help="Price of the judge. Default: --price for the same model.")] = "",
    restart: Annotated[bool, Option(help="Discard earlier responses.")] = False,
) -> None:
    """Caption images with a vision model, and write annotations for training.

    Keys come from the environment: DCAR_CAPTION_API_KEY, and DCAR_JUDGE_API_KEY for a judge at another endpoint. An
    interrupted run resumes with the same command and repeats no request.
    """
    from dcar_core.captioning.options import CaptionOptions, VisionModel
    from dcar_core.captioning.questions import QUESTION_TEMPLATES, load_templates
    from dcar_core.captioning.run import caption_images

    drafter = VisionModel(url=url, name=model, key=os.environ.get("DCAR_CAPTION_API_KEY"), price=_parse_price(price))
    judging_key = os.environ.get("DCAR_JUDGE_API_KEY")
    judging_model = drafter.judge(judge_url, judge_model, judging_key, _parse_price(judge_price))
    options = CaptionOptions(
        dataset=dataset or images.resolve().name.replace("_", " "),
        templates=load_templates(templates) if templates is not None else QUESTION_TEMPLATES,
        context=context, rounds=rounds, side=side, max_tokens=max_tokens, temperature=temperature,
        concurrency=concurrency, timeout_s=timeout, tries=tries,
    )  # fmt: skip
    outcome = caption_images(images, out, drafter, judging_model if judge else None, options, restart=restart)
    typer.echo(str(outcome))
    if outcome.failed or not outcome.accepted:
        raise typer.Exit(1)


def _parse_price(text: str) -> tuple[float, float] | None:
    if not text.strip():
        return None
    try:
        price_in, price_out = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"a price is IN,OUT of a million tokens, such as 0.15,0.60, not {text!r}") from None
    if not (0 <= price_in < math.inf and 0 <= price_out < math.inf):
        raise typer.BadParameter(f"a price cannot be {text!r}")
    return price_in, price_out
