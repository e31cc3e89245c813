"""The command that builds and publishes an index: `dcar index build` and `python -m index_jobs.rebuild`.

- Both forms mount this one function; only the default of `--json` differs.
- Most options are the fields of `IndexSpec` and `BuildOptions` that have a help text.
- Nothing heavy is imported before the options are checked.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from dcar_core.util.console import show_progress
from dcar_core.util.errors import DcarError
from index_jobs.jobs.summary import RebuildSummary, RejectedError
from index_jobs.spec import BuildOptions, IndexSpec

EPILOG = """\b
Example:
  dcar index build --gallery photos --checkpoint checkpoint --out index

\b
Exit codes:
  0    published, or nothing had changed ("reused": true in the JSON summary)
  1    the output cannot be written, an index or shard is corrupted, or another failure
  2    wrong usage
  3    the gallery cannot be used, or too many of its images are broken
  4    the checkpoint, its model or the served version's model cannot be loaded
  5    another job is writing to the same index
  6    not published: the new index ranks worse than the served one
  7    not published: too many images of the served index are gone from the gallery
  130  interrupted; run the same command again to resume
"""


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "800MiB"; a bare number is bytes, and less than a megabyte is refused."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if size < 1_000_000:
        raise typer.BadParameter(f"{text!r} is not a size of a megabyte or more; give one such as 800MiB or 4GiB")
    return size


def parse_names(text: str) -> list[str]:
    return sorted({name.strip() for name in text.split(",") if name.strip()})


_PARSERS = {"memory": parse_size, "text_fields": parse_names}
_FIELDS = {each.name: each for options in (IndexSpec, BuildOptions) for each in fields(options) if each.metadata}


def _option(name: str) -> Any:
    """Return the declaration of the option that a field is; one that is off by default has no --no form."""
    field = _FIELDS[name]
    flags = [f"--{name}"] if field.default is False else []
    return typer.Option(*flags, parser=_PARSERS.get(name), **field.metadata)


Gallery = Annotated[
    str,
    typer.Option(
        metavar="[NAME=]LOCATION",
        help="Images to add, as for `dcar index build`. NAME= puts NAME/ before ids and names, so that they differ.",
    ),
]
Galleries = Annotated[
    list[str],
    typer.Option(
        "--gallery",
        metavar="[NAME=]LOCATION",
        help="Images to index: a folder (with tars and metadata.jsonl, if any), an uncompressed .tar, or a .jsonl, "
        ".csv or .parquet list with a column file_name, image, path or url. A path, or a URL: s3://, gs://, https://. "
        "May be repeated: ids and names in further galleries begin with NAME/, or with the location's own name.",
    ),
]
Checkpoint = Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint of `dcar train` or `dcar zero-shot`.")]
Keep = Annotated[int, _option("keep")]
Runtime = Annotated[str, _option("runtime")]
_TYPES = get_type_hints(IndexSpec) | get_type_hints(BuildOptions) | {"text_fields": str}
Command = TypeVar("Command", bound=Callable[..., None])


def with_options(*names: str) -> Callable[[Command], Command]:
    """Return a decorator that declares these fields as the options of a command, in the place of its `**options`."""
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default="auto" if name == "runtime" else _FIELDS[name].default,
            annotation=Annotated[_TYPES[name], _option(name)],
        )
        for name in names
    ]

    def declare(command: Command) -> Command:
        *own, _ = inspect.signature(command).parameters.values()
        last = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        first = [each for each in own if each not in last]
        vars(command)["__signature__"] = inspect.Signature([*first, *options, *last])
        return command

    return declare


@with_options(*_FIELDS)
def build_command(
    galleries: Galleries,
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Index directory, created if missing, or its URL: s3://, gs://, az://."),
    ],
    *,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json/--text",
            help="Print the summary as JSON or as text. `python -m index_jobs.rebuild` prints JSON by default, `dcar "
            "index build` text.",
            show_default=False,
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only, no progress.")] = False,
    **options: Any,
) -> None:
    """Encode a gallery with a checkpoint, build an index, verify it and publish it as the current version.

    Running services load the new version by themselves. An interrupted build resumes when the same command is run
    again; an unchanged gallery and checkpoint finish at once. The summary goes to stdout, progress to stderr.
    """
    from index_jobs.jobs.build import rebuild

    show_progress(quiet=quiet)
    try:
        summary = rebuild(galleries, checkpoint, out, progress=not quiet, **options)
    except RejectedError as error:
        _print(error.summary, as_json)
        raise
    _print(summary, as_json)


def _print(summary: RebuildSummary, as_json: bool) -> None:
    """Print the summary; a job that is done does not fail because stdout is closed or full."""
    try:
        sys.stdout.write((json.dumps(asdict(summary), indent=2) if as_json else summary.to_text()) + "\n")
        sys.stdout.flush()
    except (DcarError, OSError) as error:
        sys.stderr.write(f"the summary is lost: {error}\n")
