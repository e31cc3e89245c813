"""`dcar index`: build, watch, add, remove, apply, update, items, list, verify,
rollback.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from app.cli import options
from app.cli.options import group
from dcar_core.util.errors import ArtifactError
from dcar_core.util.options import command, option, with_options
from index_jobs.index.stores import index_path, location_of
from index_jobs.rebuild import add_build_command
from index_jobs.spec import KEEP_WRITES, BuildOptions, IndexSpec

if TYPE_CHECKING:
    from index_jobs.index.index_version import Item

commands = group(
    "index", help="Build, update, inspect, verify and roll back published indexes."
)
INDEX = option(help="Directory or URL of a published index.", parser=index_path)
FILLED_INDEX = option(
    help="Directory or URL of a published index.", parser=options.published_index
)
KEEP_CHANGES = option(
    KEEP_WRITES,
    "Changes over HTTP or by a watch to keep.",
    flags=("--keep-writes",),
    envvar="DCAR_KEEP_WRITES",
    min=1,
)

add_build_command(commands)


@command(commands, "list", "dcar index list index")
def list_versions(
    index: Path = INDEX,
    *,
    files: bool = option(
        False, "List their files, too: the blob, the bytes and the name."
    ),
) -> None:
    """List the versions, newest first; * marks the one that is served."""
    from index_jobs.index import versions

    current = versions.pull_history(index)
    manifests = versions.list_versions(index)
    if not manifests:
        versions.require_index(index)  # raises with the command to run
        name = location_of(index)
        raise ArtifactError(
            f"{name} has no readable version; `dcar index verify {name}` says why"
        )
    for manifest in sorted(manifests, key=lambda m: -m.version):
        mark = "*" if manifest.version == current else " "
        typer.echo(
            f"{mark} {manifest.version:4}  {manifest.created}  {manifest.count:9,} x"
            f" {manifest.dim}  {manifest.kind:16}  {manifest.spec.fingerprint[:12]} "
            f" {manifest.change}".rstrip()
        )
        if manifest.version == current:
            _recommend(manifest.rebuild)
        for name, info in manifest.files.items() if files else ():
            typer.echo(f"        {info.sha256}  {info.size:13,}  {name}")


@command(
    commands,
    "items",
    """dcar index items index --filter '{"category": "shoes"}'""",
)
def items(
    index: Path = FILLED_INDEX,
    *,
    filter: dict[str, Any] | None = options.FILTER,
) -> None:
    """Print the items of an index, one line of JSON for each."""
    for item in _matching_items(index, filter or {}):
        fields = {
            "id": item.id,
            "caption": item.caption,
            "category": item.category,
            **item.metadata,
        }
        typer.echo(json.dumps(fields, ensure_ascii=False))


@command(commands, "verify", "dcar index verify index")
def verify(index: Path = INDEX) -> None:
    """Check every file of every version against its checksum."""
    from index_jobs.index.versions import verify_index

    for manifest in verify_index(index):
        typer.echo(
            f"version {manifest.version}: {len(manifest.files)} files are as published"
        )


@command(
    commands,
    "rollback",
    "dcar index rollback index",
    "dcar index rollback index --to 3",
)
def rollback(
    index: Path = INDEX,
    *,
    to: int | None = option(
        None, "Version. Default: the one that the current version replaced."
    ),
) -> None:
    """Make an earlier version the current one."""
    from index_jobs.index import versions

    typer.echo(
        f"{location_of(index)}: version {versions.rollback(index, to)} is current"
    )


@command(commands, "add", "dcar index add index --gallery new-photos")
@with_options(IndexSpec, "max_failed", "runtime")
@with_options(BuildOptions, "workers", "batch_size", "keep", "device")
def add(
    index: Path = INDEX,
    *,
    gallery: str = option(
        help=(
            "Images to add, as for `dcar index build`. NAME= puts NAME/ before ids and"
            " names, so that they differ."
        ),
        metavar="[NAME=]LOCATION",
    ),
    replace: bool = option(
        False, "Replace items with the same id, instead of an error."
    ),
    **build: Any,
) -> None:
    """Publish a version with the images of another gallery added, without a rebuild."""
    from index_jobs.jobs.update import add as run

    summary = run(index, gallery, replace_existing=replace, **build)
    added = f"{summary.added:,} added" + (
        f", {summary.removed:,} of them replaced" if summary.removed else ""
    )
    outcome = f"{summary.count:,} images ({added}, {summary.failed} broken)"
    typer.echo(f"{location_of(index)}: version {summary.version}, {outcome}")
    _recommend(summary.rebuild)


@command(commands, "apply", "dcar index apply index")
@with_options(IndexSpec, "runtime")
@with_options(BuildOptions, "workers", "batch_size", "device")
def apply(index: Path = INDEX, *, keep: int = KEEP_CHANGES, **build: Any) -> None:
    """Publish the changes of items that a service has accepted over HTTP; services run
    this by themselves.
    """
    from index_jobs.jobs.update import apply_waiting

    typer.echo(
        f"{location_of(index)}: {apply_waiting(index, keep=keep, **build):,} jobs"
        " applied"
    )


@command(commands, "update", "dcar index update index --metadata prices.csv")
@with_options(BuildOptions, "keep")
def update(
    index: Path = INDEX,
    *,
    metadata: Path = option(
        help=(
            "CSV, JSONL or Parquet table with a column id, whose other columns are"
            " merged into the items' fields. An empty cell changes nothing; null in"
            " JSONL removes a field."
        ),
        exists=True,
        dir_okay=False,
        metavar="FILE",
    ),
    by: str = option(
        "id",
        "Another column that names items, such as sku; all with its value are changed.",
    ),
    **build: Any,
) -> None:
    """Publish a version with other metadata of some items; nothing is encoded."""
    from dcar_core.util.errors import shorten
    from index_jobs.gallery.metadata import read_changes
    from index_jobs.index.changes import change_metadata
    from index_jobs.index.manifest import quantity

    summary = change_metadata(
        index,
        read_changes(str(metadata), by),
        metadata.name,
        by=by,
        **build,
    )
    typer.echo(
        f"{location_of(index)}: version {summary.version},"
        f" {quantity(summary.changed, 'item')} changed"
    )
    if summary.new_fields:
        typer.echo(f"new fields: {', '.join(summary.new_fields)}")
    if summary.unknown:
        typer.echo(
            f"{quantity(len(summary.unknown), f'unknown {by}')}:"
            f" {shorten(summary.unknown)}"
        )
    _recommend(summary.rebuild)


@command(commands, "watch", "dcar index watch index")
@with_options(IndexSpec, "runtime")
@with_options(BuildOptions, "max_vanished", "device")
def watch(
    index: Path = FILLED_INDEX,
    *,
    keep: int = KEEP_CHANGES,
    **build: Any,
) -> None:
    """Follow the gallery of an index: publish new, changed and removed images until
    Ctrl-C.
    """
    from index_jobs.jobs.watch import watch as run

    run(index, typer.echo, keep=keep, **build)


@command(
    commands,
    "remove",
    "dcar index remove index 4f1c0a",
    """dcar index remove index --filter '{"category": "sold"}'""",
)
@with_options(BuildOptions, "keep")
def remove(
    index: Path = FILLED_INDEX,
    ids: list[str] | None = option(None, "Ids of items, as in search results."),
    *,
    filter: dict[str, Any] | None = options.FILTER,
    missing_ok: bool = option(False, "Ignore ids that are not in the index."),
    **build: Any,
) -> None:
    """Publish a version without some items; a rebuild indexes those whose images are
    still there.
    """
    from index_jobs.jobs.update import remove as run

    if bool(ids) == bool(filter):
        raise typer.BadParameter("give either ids, or --filter with a condition")
    chosen = ids or [item.id for item in _matching_items(index, filter or {})]
    summary = run(index, chosen, missing_ok=missing_ok, **build)
    outcome = f"{summary.count:,} images ({summary.removed:,} removed)"
    typer.echo(f"{location_of(index)}: version {summary.version}, {outcome}")
    _recommend(summary.rebuild)


def _matching_items(index: Path, filter: dict[str, Any]) -> "Iterator[Item]":
    import numpy as np

    from index_jobs.index.filters import match_rows
    from index_jobs.index.versions import open_current

    opened = open_current(index)
    return (opened.item(int(row)) for row in np.flatnonzero(match_rows(opened, filter)))


def _recommend(rebuild: str) -> None:
    if rebuild:
        typer.echo(f"a rebuild is recommended: {rebuild}")
