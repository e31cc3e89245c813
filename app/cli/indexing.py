"""`dcar index`: build, watch, add, remove, apply, update, items, list, verify, rollback."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from app.cli.options import Filter, example, published_index
from dcar_core.util.console import dump_json
from dcar_core.util.errors import ArtifactError
from index_jobs.index.location import index_path, location_of
from index_jobs.jobs import cli as job_cli
from index_jobs.spec import KEEP_WRITES, BuildOptions

if TYPE_CHECKING:
    from index_jobs.index.index_version import Item

commands = typer.Typer(help="Build, update, inspect, verify and roll back published indexes.", no_args_is_help=True)
Index = Annotated[Path, Argument(parser=index_path, help="Directory or URL of a published index.")]
FilledIndex = Annotated[Path, Argument(parser=published_index, help="Directory or URL of a published index.")]
KeepWrites = Annotated[
    int, Option("--keep-writes", envvar="DCAR_KEEP_WRITES", min=1, help="Changes over HTTP or by a watch to keep.")
]

commands.command("build", epilog=job_cli.EPILOG)(job_cli.build_command)


@commands.command("list", epilog=example("dcar index list index"))
def list_command(
    index: Index,
    files: Annotated[bool, Option("--files", help="List their files, too: the blob, the bytes and the name.")] = False,
) -> None:
    """List the versions, newest first; * marks the one that is served."""
    from index_jobs.index.versions import list_versions, pull, require_index

    current = pull(index, history=True, files=False)
    versions = list_versions(index)
    if not versions:
        require_index(index)  # raises with the command to run
        name = location_of(index)
        raise ArtifactError(f"{name} has no readable version; `dcar index verify {name}` says why")
    for manifest in sorted(versions, key=lambda m: -m.version):
        mark = "*" if manifest.version == current else " "
        typer.echo(
            f"{mark} {manifest.version:4}  {manifest.created}  {manifest.count:9,} x {manifest.dim}  "
            f"{manifest.kind:16}  {manifest.spec.fingerprint[:12]}  {manifest.change}".rstrip()
        )
        if manifest.version == current:
            _recommend(manifest.rebuild)
        for name, info in manifest.files.items() if files else ():
            typer.echo(f"        {info.sha256}  {info.size:13,}  {name}")


@commands.command("items", epilog=example("""dcar index items index --filter '{"category": "shoes"}'"""))
def items_command(index: FilledIndex, filter: Filter = None) -> None:
    """Print the items of an index, one line of JSON for each."""
    for item in _matching_items(index, filter or {}):
        typer.echo(dump_json({"id": item.id, "caption": item.caption, "category": item.category, **item.metadata}))


@commands.command("verify", epilog=example("dcar index verify index"))
def verify_command(index: Index) -> None:
    """Check every file of every version against its checksum."""
    from index_jobs.index.publish import verify_index

    for manifest in verify_index(index):
        typer.echo(f"version {manifest.version}: {len(manifest.files)} files are as published")


@commands.command("rollback", epilog=example("dcar index rollback index", "dcar index rollback index --to 3"))
def rollback_command(
    index: Index,
    to: Annotated[int | None, Option(help="Version. Default: the one that the current version replaced.")] = None,
) -> None:
    """Make an earlier version the current one."""
    from index_jobs.index.publish import rollback

    typer.echo(f"{location_of(index)}: version {rollback(index, to)} is current")


@commands.command("add", epilog=example("dcar index add index --gallery new-photos"))
@job_cli.with_options("workers", "batch_size", "keep", "max_failed", "device", "runtime")
def add_command(
    index: Index,
    gallery: job_cli.Gallery,
    replace: Annotated[bool, Option("--replace", help="Replace items with the same id, instead of an error.")] = False,
    **options: Any,
) -> None:
    """Publish a version with the images of another gallery added, without a rebuild."""
    from index_jobs.jobs.update import add

    summary = add(index, gallery, replace_existing=replace, **options)
    added = f"{summary.added:,} added" + (f", {summary.removed:,} of them replaced" if summary.removed else "")
    outcome = f"{summary.count:,} images ({added}, {summary.failed} broken)"
    typer.echo(f"{location_of(index)}: version {summary.version}, {outcome}")
    _recommend(summary.rebuild)


@commands.command("apply", epilog=example("dcar index apply index"))
@job_cli.with_options("workers", "batch_size", "device", "runtime")
def apply_command(index: Index, keep: KeepWrites = KEEP_WRITES, **options: Any) -> None:
    """Publish the changes of items that a service has accepted over HTTP; services run this by themselves."""
    from index_jobs.jobs.apply import apply_waiting

    typer.echo(f"{location_of(index)}: {apply_waiting(index, keep=keep, **options):,} jobs applied")


@commands.command("update", epilog=example("dcar index update index --metadata prices.csv"))
def update_command(
    index: Index,
    metadata: Annotated[
        Path,
        Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="CSV, JSONL or Parquet table with a column id, whose other columns are merged into the items' fields. "
            "An empty cell changes nothing; null in JSONL removes a field.",
        ),
    ],
    strict: Annotated[bool, Option("--strict", help="Refuse fields that no item has.")] = False,
    keep: job_cli.Keep = BuildOptions.keep,
) -> None:
    """Publish a version with other metadata of some items; nothing is encoded."""
    from dcar_core.util.errors import shorten
    from index_jobs.gallery.metadata import read_changes
    from index_jobs.index.changes import change_metadata
    from index_jobs.index.manifest import counted

    summary = change_metadata(index, read_changes(str(metadata)), metadata.name, strict=strict, keep=keep)
    typer.echo(f"{location_of(index)}: version {summary.version}, {counted(summary.changed, 'item')} changed")
    if summary.new_fields:
        typer.echo(f"new fields: {', '.join(summary.new_fields)}")
    if summary.unknown:
        typer.echo(f"{counted(len(summary.unknown), 'unknown id')}: {shorten(summary.unknown)}")
    _recommend(summary.rebuild)


@commands.command("watch", epilog=example("dcar index watch index"))
@job_cli.with_options("max_vanished", "device", "runtime")
def watch_command(index: FilledIndex, keep: KeepWrites = KEEP_WRITES, **options: Any) -> None:
    """Follow the gallery of an index: publish new, changed and removed images until Ctrl-C."""
    from index_jobs.jobs.watch import watch

    watch(index, typer.echo, keep=keep, **options)


@commands.command(
    "remove",
    epilog=example("dcar index remove index 4f1c0a", """dcar index remove index --filter '{"category": "sold"}'"""),
)
def remove_command(
    index: FilledIndex,
    ids: Annotated[list[str] | None, Argument(help="Ids of items, as in search results.")] = None,
    ids_file: Annotated[Path | None, Option(exists=True, dir_okay=False, help="UTF-8 file with one id a line.")] = None,
    filter: Filter = None,
    missing_ok: Annotated[bool, Option("--missing-ok", help="Ignore ids that are not in the index.")] = False,
    keep: job_cli.Keep = BuildOptions.keep,
) -> None:
    """Publish a version without some items; a rebuild indexes those whose images are still there."""
    from dcar_core.data.entries import read_text
    from index_jobs.jobs.update import remove

    lines = read_text(ids_file).split("\n") if ids_file else []
    chosen = [*(ids or []), *(line.strip() for line in lines if line.strip())]
    if bool(chosen) == bool(filter):
        raise typer.BadParameter("give either ids, also by --ids-file with one a line, or --filter with a condition")
    if filter:
        chosen = [item.id for item in _matching_items(index, filter)]
    summary = remove(index, chosen, missing_ok=missing_ok, keep=keep)
    outcome = f"{summary.count:,} images ({summary.removed:,} removed)"
    typer.echo(f"{location_of(index)}: version {summary.version}, {outcome}")
    _recommend(summary.rebuild)


def _matching_items(index: Path, filter: dict[str, object]) -> "Iterator[Item]":
    import numpy as np

    from index_jobs.index.filters import match_rows
    from index_jobs.index.versions import open_current

    artifact = open_current(index)
    return (artifact.item(int(row)) for row in np.flatnonzero(match_rows(artifact, filter)))


def _recommend(rebuild: str) -> None:
    if rebuild:
        typer.echo(f"a rebuild is recommended: {rebuild}")
