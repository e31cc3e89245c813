"""`dcar key`: make an API key."""

from typing import Annotated

import typer

from dcar_core.util.errors import DcarError

commands = typer.Typer()


@commands.command()
def key(name: Annotated[str, typer.Argument(help="Who the key is for, as it will stand in the log.")]) -> None:
    """Make an API key. The service is told its hash alone: add the last line to DCAR_API_KEYS."""
    from app.core.keys import key_hash, new_key, parse_keys

    made = new_key()
    line = f"{name}:{key_hash(made)}"
    try:
        parse_keys(line)
    except ValueError:
        raise DcarError(f"the name {name!r} will not do: 1 to 64 letters, digits, dots, dashes") from None
    typer.echo(f"for {name}, shown this once: {made}")
    typer.echo(line)
