"""Commands made of functions that take one options dataclass, and the commands of plug-ins.

- A keyword-only field is an option of the command, any other field an argument. Type and default are the field's; help,
  bounds and so on are what `dcar_core.util.options.option` declares.
- A tuple of any length may be repeated. False becomes a flag; True also has a --no form.
- The function's docstring is the help. From a line "Example:" or "Examples:" on it is shown as it stands.
- A ValueError of the dataclass is a usage error. The number that the function returns is the exit status.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from importlib.metadata import entry_points
from types import GenericAlias, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from dcar_core.util.errors import DcarError

Function = Callable[[Any], int | None]


def add_plugins(app: typer.Typer) -> None:
    """Add the commands of installed distributions. The name of an entry point is a command's path: `data.caption`."""
    for entry in entry_points(group="dcar.commands"):
        *groups, name = entry.name.split(".")
        group = app
        for each in groups:
            group = _group(group, each)
        try:
            add_command(group, name, entry.load())
        except Exception as error:
            raise DcarError(f"the plug-in {entry.value} cannot be loaded ({error}); update or uninstall it") from error


def add_command(group: typer.Typer, name: str, function: Function) -> None:
    """Add a command to a group, made of a function that takes one options dataclass."""
    text, example, rest = (inspect.getdoc(function) or "").partition("\nExample")
    blocks = (example + rest).strip().split("\n\n")
    group.command(name, help=text.strip(), epilog="\n\n".join(f"\b\n{block}" for block in blocks))(_command(function))


def _command(function: Function) -> Callable[..., None]:
    """Return the function that typer makes a command of."""
    (options,) = [hint for name, hint in get_type_hints(function).items() if name != "return"]
    types = get_type_hints(options)

    def command(**given: Any) -> None:
        try:
            chosen = options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if status := function(chosen):
            raise typer.Exit(status)

    parameters = [_parameter(each, types[each.name]) for each in fields(options) if each.init]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    """Return the parameter that typer reads for a field of the options."""
    declared = dict(field.metadata)
    flags = declared.pop("flags", (f"--{field.name.replace('_', '-')}",) if field.default is False else ())
    declare = typer.Option if field.kw_only else typer.Argument
    annotation: Any = Annotated[_as_list(hint), declare(*flags, **declared)]
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _as_list(hint: Any) -> Any:
    """Return the type with a list in place of a tuple of any length, as typer declares what may be repeated."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_as_list, arguments))]  # noqa: UP007
    return GenericAlias(list, arguments[:1]) if get_origin(hint) is tuple and arguments[-1] is Ellipsis else hint


def _group(app: typer.Typer, name: str) -> typer.Typer:
    """Return the group of commands of that name, new if there is none."""
    for each in app.registered_groups:
        if each.name == name and each.typer_instance:
            return each.typer_instance
    made = typer.Typer(no_args_is_help=True)
    app.add_typer(made, name=name)
    return made
