"""`dcar key`: create an API key."""

from typing import Annotated

import typer

from app.cli.options import example
from dcar_core.util.errors import DcarError

commands = typer.Typer()


@commands.command(epilog=example("dcar key webshop"))
def key(name: Annotated[str, typer.Argument(help="Name of the key's owner, which appears in the log.")]) -> None:
    """Create an API key. The service stores its hash only: add the last line of the output to DCAR_API_KEYS."""
    from app.core.keys import key_hash, new_key, parse_keys

    secret = new_key()
    line = f"{name}:{key_hash(secret)}"
    try:
        parse_keys(line)
    except ValueError:
        raise DcarError(f"the name {name!r} is not allowed: use 1 to 64 letters, digits, dots, dashes") from None
    typer.echo(f"for {name}, shown this once: {secret}")
    typer.echo(line)
