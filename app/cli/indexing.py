"""`dcar index`: build, list, verify, roll back."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import Checkpoint, Device, Gallery, Out
from index_jobs.arguments import parse_size

commands = typer.Typer(help="Build, list, verify and roll back published indexes.", no_args_is_help=True)


@commands.command("build")
def index_build(
    gallery: Gallery,
    checkpoint: Checkpoint,
    out: Out,
    kind: Annotated[
        str, typer.Option(help="auto, flat, hnsw, ivf, .. (docs/index.md), or a faiss factory string.")
    ] = "auto",
    memory: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="For the index, as 4GiB.")
    ] = None,
    target_recall: Annotated[float, typer.Option(min=0, max=1, help="At 10, to tune searches for.")] = 0.99,
    workers: Annotated[int | None, typer.Option(help="Processes that decode pictures; default: by size.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one forward pass.")] = 64,
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep.")] = 3,
    max_failed: Annotated[float, typer.Option(min=0, max=1, help="The share of pictures that may be broken.")] = 0.05,
    device: Device = "auto",
    force: Annotated[bool, typer.Option(help="Build even if nothing changed.")] = False,
) -> None:
    """Encode a gallery, build the index and publish it as a new version. Killed, the same command goes on."""
    from index_jobs.rebuild import rebuild

    found = rebuild(
        gallery, checkpoint, out, kind=kind, memory=memory, target_recall=target_recall, workers=workers,
        batch_size=batch_size, keep=keep, max_failed=max_failed, device=device, force=force,
    )  # fmt: skip
    what = "is up to date with" if found.reused else "published:"
    typer.echo(f"{out}: version {found.version} {what} {found.count:,} pictures, {found.kind}, {found.failed} broken")


@commands.command("list")
def index_list(index: Annotated[Path, typer.Argument(help="Directory of a published index.")]) -> None:
    """The versions, newest first; * marks the one that is served."""
    from index_jobs.artifact import current_version, list_versions

    current = current_version(index)
    for manifest in sorted(list_versions(index), key=lambda m: -m.version):
        mark = "*" if manifest.version == current else " "
        typer.echo(
            f"{mark} {manifest.version:4}  {manifest.created}  {manifest.count:9,} x {manifest.dim}  "
            f"{manifest.kind:16}  {manifest.fingerprint[:12]}"
        )


@commands.command("verify")
def index_verify(index: Annotated[Path, typer.Argument(help="Directory of a published index.")]) -> None:
    """Check every file of every version against its checksum."""
    from index_jobs.artifact import verify_index

    for manifest in verify_index(index):
        typer.echo(f"version {manifest.version}: {len(manifest.files)} files are as published")


@commands.command("rollback")
def index_rollback(
    index: Annotated[Path, typer.Argument(help="Directory of a published index.")],
    to: Annotated[int | None, typer.Option(help="Version; default: the one before the current.")] = None,
) -> None:
    """Serve an earlier version again."""
    from index_jobs.publish import rollback

    typer.echo(f"{index}: version {rollback(index, to)} is current")
