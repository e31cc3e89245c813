"""`dcar models`: list the models that open_clip has built in."""

from dataclasses import asdict
from typing import Annotated

import typer

from app.cli.options import example
from dcar_core.util.console import json_text
from dcar_core.util.errors import ModelError

commands = typer.Typer()


@commands.command(epilog=example("dcar models siglip2", "dcar models --level full --json"))
def models(
    name: Annotated[str, typer.Argument(help="Part of the names to list, in any case. Default: all.")] = "",
    level: Annotated[str | None, typer.Option(help="Only models of this level: full, text or adapters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the built-in models: name, level, image size, context length, libraries, and tags for --pretrained.

    Levels: full takes prompts in both towers, text in the text tower alone, adapters in neither. docs/models.md
    helps to choose.
    """
    from typing import get_args

    from dcar_core.model.catalogue import list_catalogue
    from dcar_core.model.towers.select import Level

    if level is not None and level not in get_args(Level):
        raise typer.BadParameter(f"--level must be one of {', '.join(get_args(Level))}, not {level!r}")
    entries = [
        entry for entry in list_catalogue() if name.lower() in entry.name.lower() and level in (None, entry.level)
    ]
    if as_json:
        typer.echo(json_text([asdict(entry) for entry in entries]))
        return
    if not entries:
        raise ModelError("no built-in model matches; `dcar models` lists all")
    needs = [", ".join(entry.needs) or "-" for entry in entries]
    width, needs_width = max(len(entry.name) for entry in entries), max(map(len, needs))
    for entry, libraries in zip(entries, needs, strict=True):
        typer.echo(
            f"{entry.name:{width}}  {entry.level:8}  {entry.image_size:3} px  {entry.context_length:2} tokens  "
            f"{libraries:{needs_width}}  {', '.join(entry.pretrained) or '-'}"
        )
