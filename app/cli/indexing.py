"""`dcar index`: build, add, remove, list, verify, roll back."""

from pathlib import Path
from typing import Annotated

import typer

from dcar_core.util.console import json_text
from dcar_core.util.errors import ArtifactError
from index_jobs.jobs.command_line import (
    EPILOG,
    BatchSize,
    Device,
    Gallery,
    Keep,
    MaxFailed,
    Runtime,
    Workers,
    build_index,
)
from index_jobs.options import RebuildOptions

commands = typer.Typer(help="Build, update, look into, verify and roll back published indexes.", no_args_is_help=True)
Index = Annotated[Path, typer.Argument(help="Directory of a published index.")]


commands.command("build", epilog=EPILOG)(build_index)


@commands.command("list")
def index_list(index: Index) -> None:
    """The versions, newest first; * marks the one that is served."""
    from index_jobs.store.versions import current_version_or_none, list_versions, require_index

    current, versions = current_version_or_none(index), list_versions(index)
    if not versions:
        require_index(index)  # which says what to do
        raise ArtifactError(f"{index} has no version that can be read; `dcar index verify {index}` says why")
    for manifest in sorted(versions, key=lambda m: -m.version):
        mark = "*" if manifest.version == current else " "
        typer.echo(
            f"{mark} {manifest.version:4}  {manifest.created}  {manifest.count:9,} x {manifest.dim}  "
            f"{manifest.kind:16}  {manifest.fingerprint[:12]}"
            + (f"  +{len(manifest.additions)} additions" if manifest.additions else "")
            + (f"  -{manifest.removed:,} removed" if manifest.removed else "")
        )
        if manifest.version == current:
            _advise(manifest.rebuild)


@commands.command("items")
def index_items(
    index: Index,
    filter: Annotated[str | None, typer.Option(help='Which, as in searches: \'{"category": "cat face"}\'.')] = None,
) -> None:
    """What is in the index, an item a line of JSON, in the index's order."""
    import json

    import numpy as np

    from index_jobs.store.filters import match_rows
    from index_jobs.store.versions import open_current

    artifact = open_current(index)
    try:
        chosen = json.loads(filter) if filter else {}
    except ValueError as error:
        raise typer.BadParameter(f"--filter is JSON: {error}") from None
    if not isinstance(chosen, dict):
        raise typer.BadParameter("--filter is an object: field to condition")
    for row in np.flatnonzero(match_rows(artifact, chosen)):
        item = artifact.item(int(row))
        known = {"id": item.id, "caption": item.caption, "category": item.category, **item.metadata}
        typer.echo(json_text(known))


@commands.command("verify")
def index_verify(index: Index) -> None:
    """Check every file of every version against its checksum."""
    from index_jobs.store.versions import verify_index

    for manifest in verify_index(index):
        typer.echo(f"version {manifest.version}: {len(manifest.files)} files are as published")


@commands.command("rollback")
def index_rollback(
    index: Index,
    to: Annotated[int | None, typer.Option(help="Version; default: the one that the current one replaced.")] = None,
) -> None:
    """Serve an earlier version again."""
    from index_jobs.store.publish import rollback

    typer.echo(f"{index}: version {rollback(index, to)} is current")


@commands.command("add")
def index_add(
    index: Index,
    gallery: Gallery,
    replace: Annotated[bool, typer.Option(help="Pictures take the place of items with their ids.")] = False,
    workers: Workers = None,
    batch_size: BatchSize = RebuildOptions.batch_size,
    keep: Keep = RebuildOptions.keep,
    max_failed: MaxFailed = RebuildOptions.max_failed,
    device: Device = "auto",
    runtime: Runtime = "auto",
) -> None:
    """Publish a version with another gallery's pictures besides those that are there, without a rebuild."""
    from index_jobs.jobs.updates import add

    found = add(
        index, gallery, replace_known=replace, workers=workers, batch_size=batch_size, keep=keep,
        max_failed=max_failed, device=device, runtime=runtime,
    )  # fmt: skip
    what = f"{found.added:,} added" + (f", {found.removed:,} of them replaced" if found.removed else "")
    typer.echo(f"{index}: version {found.version}, {found.count:,} pictures ({what}, {found.failed} broken)")
    _advise(found.rebuild)


@commands.command("remove")
def index_remove(
    index: Index,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of items, as searches show them.")] = None,
    ids_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with an id a line.")
    ] = None,
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="Ids that are not there are no error.")] = False,
    keep: Keep = RebuildOptions.keep,
) -> None:
    """Publish a version in which these items are never found, without a rebuild."""
    from index_jobs.jobs.updates import remove

    lines = ids_file.read_text(encoding="utf-8").splitlines() if ids_file else []
    wanted = [*(ids or []), *filter(None, map(str.strip, lines))]
    if not wanted:
        raise typer.BadParameter("give ids, or --ids-file with an id a line")
    found = remove(index, wanted, missing_ok=missing_ok, keep=keep)
    typer.echo(f"{index}: version {found.version}, {found.count:,} pictures ({found.removed:,} removed)")
    _advise(found.rebuild)


def _advise(rebuild: str) -> None:
    if rebuild:
        typer.echo(f"a rebuild is worth it: {rebuild}")
