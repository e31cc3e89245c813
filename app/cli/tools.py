"""`dcar models` and `dcar key`: list models, create an API key."""

from dataclasses import asdict
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from app.cli.options import example
from dcar_core.model.recommended import RECOMMENDED
from dcar_core.util.console import dump_json
from dcar_core.util.errors import DcarError, ModelError

commands = typer.Typer()


@commands.command(epilog=example("dcar models --recommend", "dcar models siglip2", "dcar models --level full --json"))
def models(
    name: Annotated[str, Argument(help="Part of the names to list, in any case. Default: all.")] = "",
    level: Annotated[Literal["full", "text", "features"] | None, Option(help="Only models of this level.")] = None,
    recommend: Annotated[bool, Option("--recommend", help="Only recommended models, with published recall.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the built-in models: name, level, parameters in millions, image size, context length, languages,
    libraries, and tags for --pretrained.

    Levels: full takes prompts in both towers, text in the text tower only, features in neither. docs/models.md
    helps to choose.
    """
    from dcar_core.model.catalogue import list_catalogue

    figures = {each.name: each for each in RECOMMENDED}
    entries = [each for each in list_catalogue() if name.lower() in each.name.lower() and level in (None, each.level)]
    if recommend:
        order = list(figures)
        entries = sorted((each for each in entries if each.name in figures), key=lambda each: order.index(each.name))
    if as_json:
        more = [figures[entry.name]._asdict() if recommend else {} for entry in entries]
        typer.echo(dump_json([asdict(entry) | figure for entry, figure in zip(entries, more, strict=True)]))
        return
    if not entries:
        raise ModelError("no built-in model matches; `dcar models` lists all")
    if recommend:
        width = max(len(entry.name) for entry in entries)
        typer.echo(f"{'':{width}}  COCO, Flickr R@1  size     per image    licence     for")
        for entry in entries:
            each, size = figures[entry.name], 4 * (entry.parameters or 0)
            typer.echo(
                f"{entry.name:{width}}  {each.coco:4} %, {each.flickr:4} %  {size:4} MB  {each.gflops:5} GFLOP  "
                f"{each.licence:10}  {each.use}"
            )
        return
    needs = [", ".join(entry.needs) or "-" for entry in entries]
    width, needs_width = max(len(entry.name) for entry in entries), max(map(len, needs))
    for entry, libraries in zip(entries, needs, strict=True):
        typer.echo(
            f"{entry.name:{width}}  {entry.level:8}  {entry.parameters or '-':4} M  {entry.image_size:3} px  "
            f"{entry.context_length:2} tokens  {entry.languages:7}  {libraries:{needs_width}}  "
            f"{', '.join(entry.pretrained) or '-'}"
        )


@commands.command(epilog=example("dcar key webshop"))
def key(name: Annotated[str, Argument(help="Name of the key's owner, which appears in the log.")]) -> None:
    """Create an API key. The service stores its hash only: add the last line of the output to DCAR_API_KEYS.

    For DCAR_ADMIN_KEY, write sha256: in place of the name.
    """
    from app.core.keys import key_hash, new_key, parse_keys

    secret = new_key()
    line = f"{name}:{key_hash(secret)}"
    try:
        parse_keys(line)
    except ValueError:
        raise DcarError(f"the name {name!r} is not allowed: use 1 to 64 letters, digits, dots, dashes") from None
    typer.echo(f"for {name}, shown this once: {secret}")
    typer.echo(line)
