"""Options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from dcar_core.model.config import LossDirection

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "emoji"


def example(*lines: str) -> str:
    """Return the epilog of a command's help: example command lines."""
    return "\b\n" + "\n".join([f"Example{'s' if len(lines) > 1 else ''}:", *(f"  {line}" for line in lines)])


def published_index(location: str) -> Path:
    """Return the directory of an index, with its published version."""
    from index_jobs.index import versions

    return versions.published_index(location)


def parse_filter(text: str) -> dict[str, Any]:
    """Return a filter given as JSON.

    Raises:
        typer.BadParameter: the text is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"""a filter is JSON, such as '{{"category": "shoes"}}': {error}""") from None
    if not isinstance(value, dict):
        raise typer.BadParameter("a filter is a JSON object of fields and conditions")
    return value


Data = Annotated[Path, Option(help="Directory with train.json, ..., or a table; see docs/reference/data-formats.md.")]
ModelName = Annotated[str, Option("--model", help="An open_clip model such as ViT-B-16-SigLIP, or a directory.")]
Pretrained = Annotated[
    str | None,
    Option(
        help="Weights of a named model: a tag, or a .safetensors or .pt file. Default: as `dcar models --recommend`."
    ),
]
Images = Annotated[Path | None, Option(help="Root folder of the images. Default: the folder of the annotations.")]
SkipBroken = Annotated[bool, Option("--skip-broken", help="Leave out images that are missing or broken.")]
Negatives = Annotated[
    str,
    Option(
        help="Generate negative captions: auto (if most pairs of a split have none), missing (for pairs without any), "
        "all (also replacing existing ones), off."
    ),
]
Taxonomy = Annotated[Path | None, Option(help="JSON of similar categories; see docs/reference/data-formats.md.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Loss = Annotated[LossDirection, Option(help="Contrastive loss: in both directions, or image-to-text only.")]
Epochs = Annotated[int, Option(min=1, help="Maximum number of epochs.")]
BatchSize = Annotated[int, Option(min=2, help="Pairs per training step.")]
Patience = Annotated[
    int, Option(min=0, help="Epochs without better validation recall before training stops; 0: never.")
]
Accumulate = Annotated[int, Option(min=1, help="Split a batch into parts, for a small device; the result is the same.")]
Amp = Annotated[str, Option(help="Mixed precision: auto (if a GPU supports it), off, bfloat16 or float16.")]
Features = Annotated[
    Path | None,
    Option(
        envvar="DCAR_FEATURES", help="Cache of frozen features, which several runs can share. Default: OUT/features."
    ),
]
LearningRate = Annotated[float, Option("--lr", min=0, help="Learning rate.")]
IndexDir = Annotated[
    Path, Option("--index", parser=published_index, metavar="DIR", help="Directory or URL of a published index.")
]
Filter = Annotated[
    dict[str, Any] | None,
    Option(
        parser=parse_filter, metavar="JSON", help='Only items that match a filter, such as \'{"category": "shoes"}\'.'
    ),
]
Out = Annotated[Path, Option(help="Directory to write to; created if missing.")]
