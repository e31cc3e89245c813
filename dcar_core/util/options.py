"""Fields of the dataclasses that commands take their options as."""

from dataclasses import MISSING, field
from typing import Any


def option(default: Any = MISSING, help: str = "", *, kw_only: Any = MISSING, **declared: Any) -> Any:
    """Return a dataclass field that is an option of a command.

    Args:
        default: MISSING for an option that must be given.
        kw_only: False for an argument, which is given without a name.
        declared: min and max of a number, metavar, envvar, parser of a text, and flags in place of the name's own,
            such as ("-k",).
    """
    return field(default=default, kw_only=kw_only, metadata={"help": help, **declared})
