"""`dcar index`: build, add, remove, list, verify, roll back."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Checkpoint, Device, Gallery, Out, Runtime, Workers
from dcar_core.util.console import json_text
from dcar_core.util.errors import ArtifactError
from index_jobs.jobs.command_line import parse_size
from index_jobs.options import Options
from index_jobs.store.manifest import DUPLICATES, FAILED, VERSIONS

commands = typer.Typer(help="Build, update, look into, verify and roll back published indexes.", no_args_is_help=True)
Index = Annotated[Path, typer.Argument(help="Directory of a published index.")]


@commands.command("build")
def index_build(
    gallery: Gallery,
    checkpoint: Checkpoint,
    out: Out,
    kind: Annotated[
        str,
        typer.Option(help="auto, flat, hnsw, ivf, .. (docs/explanation/index-kinds.md), or a faiss factory string."),
    ] = "auto",
    milvus: Annotated[str | None, typer.Option(help="URI of a Milvus for the vectors, or a Milvus Lite file.")] = None,
    memory: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="For the index, as 4GiB.")
    ] = None,
    target_recall: Annotated[
        float, typer.Option(min=0, max=1, help="At 10, to tune searches for.")
    ] = Options.target_recall,
    workers: Workers = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one forward pass.")] = Options.batch_size,
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep.")] = Options.keep,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="The share of pictures that may be broken.")
    ] = Options.max_failed,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="Decode JPEGs whole, bit for bit as open_clip does.")] = False,
    pixel_cache: Annotated[Path | None, typer.Option(help="Keep decoded pictures there for the next build.")] = None,
    ray: Annotated[str | None, typer.Option(help="Encode on a Ray cluster: its address, auto, or local.")] = None,
    runtime: Runtime = "auto",
    validation: Annotated[
        Path | None, typer.Option(help="Data whose val pairs judge it, and give the auto min_score.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0, max=1, help="How much lower its recall may be.")] = Options.margin,
    force: Annotated[bool, typer.Option(help="Publish even if nothing changed or it is worse; retry reads.")] = False,
) -> None:
    """Encode a gallery, build the index and publish it as a new version. Killed, the same command goes on."""
    from index_jobs.rebuild import rebuild

    found = rebuild(
        gallery, checkpoint, out, kind=kind, milvus=milvus, memory=memory, target_recall=target_recall, workers=workers,
        batch_size=batch_size, keep=keep, max_failed=max_failed, device=device, exact=exact, pixel_cache=pixel_cache,
        ray=ray, runtime=runtime, validation=validation, margin=margin, force=force,
    )  # fmt: skip
    what = "is up to date with" if found.reused else "published:"
    typer.echo(f"{out}: version {found.version} {what} {found.count:,} pictures, {found.kind}, {found.failed} broken")
    if found.gate and not found.reused:
        typer.echo(f"compared with the version before: {found.gate['reason']}")
    if found.failed or found.duplicates:
        typer.echo(
            f"{out / VERSIONS / str(found.version)}: {FAILED} names what is broken, {DUPLICATES} "
            f"{found.duplicates:,} pictures that equal another"
        )
    if found.hint:
        typer.echo(found.hint)


@commands.command("list")
def index_list(index: Index) -> None:
    """The versions, newest first; * marks the one that is served."""
    from index_jobs.store.artifact import current_if_known, list_versions, require_index

    current, versions = current_if_known(index), list_versions(index)
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

    from index_jobs.store.artifact import open_current
    from index_jobs.store.filters import matching

    artifact = open_current(index)
    try:
        chosen = json.loads(filter) if filter else {}
    except ValueError as error:
        raise typer.BadParameter(f"--filter is JSON: {error}") from None
    if not isinstance(chosen, dict):
        raise typer.BadParameter("--filter is an object: field to condition")
    for row in np.flatnonzero(matching(artifact, chosen)):
        item = artifact.item(int(row))
        known = {"id": item.id, "caption": item.caption, "category": item.category, **item.metadata}
        typer.echo(json_text(known))


@commands.command("verify")
def index_verify(index: Index) -> None:
    """Check every file of every version against its checksum."""
    from index_jobs.store.artifact import verify_index

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
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one forward pass.")] = Options.batch_size,
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep.")] = Options.keep,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="The share of pictures that may be broken.")
    ] = Options.max_failed,
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
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep.")] = Options.keep,
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
