"""The command line's groups, and options that several commands share."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from dcar_core.model.catalogue import DEFAULT
from dcar_core.util.options import for_typer, option

_IN_WHEEL = Path(__file__).resolve().parents[1] / "emoji"
if _IN_WHEEL.is_dir():
    EXAMPLES = _IN_WHEEL
else:
    EXAMPLES = _IN_WHEEL.parents[1] / "examples" / "emoji"

app = typer.Typer(
    name="dcar",
    help=(
        "Image-text retrieval that knows fine-grained differences.\n\nAdapt CLIP to"
        " your catalogue (train), turn its images into an index (index build), and"
        " search it from the command line (search) or as a service (serve). `dcar demo`"
        " shows all of it on a bundled example."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"dcar {metadata.version('dcar')}")
        raise typer.Exit


def _every_command(
    *,
    version: bool = option(
        False,
        "Show the version and exit.",
        callback=_print_version,
        is_eager=True,
    ),
) -> None:
    pass


app.callback()(for_typer(_every_command))


def group(name: str, parent: typer.Typer = app, help: str | None = None) -> typer.Typer:
    """Return the group of commands of that name, new if there is none."""
    for known in parent.registered_groups:
        if known.name == name and known.typer_instance:
            return known.typer_instance
    made = typer.Typer(help=help, no_args_is_help=True)
    parent.add_typer(made, name=name)
    return made


def published_index(location: str) -> Path:
    """Return the directory of an index, with its published version."""
    from index_jobs.index import versions

    return versions.published_index(location)


def parse_filter(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("a filter is a JSON object of fields and conditions")
    return value


INDEX = option(
    help="Directory or URL of a published index.",
    parser=published_index,
    metavar="DIR",
)
OUT = option(help="Directory to write to; created if missing.")
MODEL = option(
    DEFAULT.name, "An open_clip model such as ViT-B-16-SigLIP2, or a directory."
)
PRETRAINED = option(
    None,
    "Weights of a named model: a tag, or a .safetensors or .pt file. Default: as `dcar"
    " models --recommend`.",
)
IMAGES = option(
    None, "Root folder of the images. Default: the folder of the annotations."
)
NEGATIVES = (
    "Generate negative captions: auto (if most pairs of a split have none), missing"
    " (for pairs without any), all (also replacing existing ones), off."
)
TAXONOMY = option(
    None, "JSON of similar categories; see docs/reference/data-formats.md."
)
DEVICE = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
FILTER = option(
    None,
    'Only items that match a filter, such as \'{"category": "shoes"}\'.',
    parser=parse_filter,
    metavar="JSON",
)
