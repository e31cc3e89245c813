"""Commands made of functions whose parameters, or the fields of a dataclass, are
declared by `option`.

- A keyword-only parameter is an option of the command, any other one an argument. Its
  type is that of the option.
- False becomes a flag; True also has a --no form. A list may be repeated.
- The function's docstring is the help. The number that it returns is the exit status.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    import typer

Function = TypeVar("Function", bound=Callable[..., int | None])


def option(default: Any = MISSING, help: str = "", **declared: Any) -> Any:
    """Return the default of a parameter, or a dataclass field, that is an option or an
    argument of a command.

    Args:
        default: MISSING for one that must be given.
        declared: min and max of a number, metavar, envvar, a parser of the text that
            raises ValueError, and flags in place of the name's own, such as ("-k",).
            command_default: its default, if not that of the field.
    """
    return field(default=default, metadata={"help": help, **declared})


def with_options(options: type, *names: str) -> Callable[[Function], Function]:
    """Return a decorator that declares fields of a dataclass, all or those named, in
    place of `**options`.
    """
    types = get_type_hints(options)
    added = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option,
            annotation=types[option.name],
        )
        for option in fields(options)
        if option.metadata and (not names or option.name in names)
    ]

    def declare(function: Function) -> Function:
        *own, rest = _parameters(function)
        vars(function)["__signature__"] = inspect.Signature([*own, *added, rest])
        return function

    return declare


def command(
    group: "typer.Typer",
    name: str,
    *examples: str,
) -> Callable[[Function], Function]:
    """Return a decorator that adds a function to a group of commands. examples: command
    lines below the help.
    """
    if examples:
        epilog = "\n  ".join([f"\b\nExample{'s' * (len(examples) > 1)}:", *examples])
    else:
        epilog = ""

    def add(function: Function) -> Function:
        group.command(name, help=inspect.getdoc(function), epilog=epilog)(
            for_typer(function)
        )
        return function

    return add


def for_typer(function: Callable[..., int | None]) -> Callable[..., None]:
    """Return the function with its parameters declared as typer reads them."""
    import typer

    def run(**values: Any) -> None:
        if status := function(**values):
            raise typer.Exit(status)

    declared = [
        _declare(own)
        for own in _parameters(function)
        if own.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    vars(run)["__signature__"] = inspect.Signature(declared)
    return run


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    types = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    return [
        own.replace(annotation=types.get(name, own.annotation))
        for name, own in parameters.items()
    ]


def _declare(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return the parameter that typer reads."""
    import typer

    settings = dict(parameter.default.metadata)
    default = settings.pop("command_default", parameter.default.default)
    flags = settings.pop(
        "flags", (f"--{parameter.name.replace('_', '-')}",) if default is False else ()
    )
    declare: Any = typer.Argument
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        declare = typer.Option
    type_ = str if "parser" in settings else parameter.annotation
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[type_, declare(*flags, **settings)],
    )
