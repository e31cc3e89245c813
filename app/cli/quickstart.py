"""`dcar quickstart`: from a folder of images to a search page in one command."""

import contextlib
import hashlib
import os
import shlex
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from app.cli.options import EXAMPLES, ModelName, Pretrained, example
from app.cli.serving import bundled_checkpoint, serve_index
from dcar_core.model.recommended import DEFAULT, recommended_weights
from dcar_core.util.console import show_progress
from dcar_core.util.errors import DataError, DcarError, HubUnavailableError
from dcar_core.util.files import require_writable
from dcar_core.util.processes import process_context
from index_jobs.jobs.cli import Runtime

commands = typer.Typer()

_BUNDLED = EXAMPLES / "base"
_POLL_S = 0.5  # between looks for what the watch has published
_END_S = 10.0
_STANDS_IN = "This model knows emoji, not photos. Run dcar quickstart again with a connection to the model hub, for {}."


@commands.command(epilog=example("dcar quickstart photos", "dcar quickstart photos --model ViT-L-14 --port 9000"))
def quickstart(
    gallery: Annotated[Path, Argument(help="Folder of images, an uncompressed tar, or a list.")],
    model: ModelName = DEFAULT.name,
    pretrained: Pretrained = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    data: Annotated[Path, Option(help="Directory for the checkpoint and the index.")] = Path("data"),
    runtime: Runtime = "auto",
    watch: Annotated[bool, Option("--watch", help="Follow new, changed and removed images while serving.")] = False,
    page: Annotated[bool, Option("--open/--no-open", help="Open the search page in a browser.")] = True,
) -> None:
    """Index a folder of images with an unadapted model, and serve it with a search page.

    Without a metadata file, file names become titles and sub-folders become categories. The bundled model takes over if
    the model hub cannot be reached and has the weights. An interrupted run resumes with the same command.
    """
    typer.echo(f"looking for images in {gallery}", err=True)
    show_progress()
    from app.server import base_url, listen
    from index_jobs.gallery.scan import scan
    from index_jobs.rebuild import rebuild

    listen(host, port).close()  # report a taken port before minutes are spent on an index
    place = gallery.absolute()
    if not place.exists():
        raise DataError(f"there is no gallery {gallery}; name a folder of images")
    require_writable(data)
    scanned = scan(place)  # report its faults before weights are fetched
    typer.echo(f"1 of 3: model {model}")
    checkpoint, source = _checkpoint(model, pretrained or recommended_weights(model), data / "zero-shot")
    typer.echo(f"2 of 3: index {gallery}")
    out = data / "quickstart" / _short_hash(place) / (place.stem or "gallery")
    options = {"max_failed": 1.0, "max_vanished": 1.0}  # broken images are counted below, deleted ones are meant to be
    summary = rebuild(scanned, checkpoint, out, runtime=runtime, **options)
    state = "already indexed" if summary.reused else f"indexed in {summary.seconds:.0f} s"
    url = base_url(host, port) + "/"
    typer.echo("\n".join([f"{summary.count:,} images, {state}", *summary.notes(), f"3 of 3: serve {url}"]))
    typer.echo(_hints(gallery, out, source, has_captions=any(scanned.table["caption"].to_pylist())))
    sys.stdout.flush()
    if page and has_browser():
        threading.Thread(target=open_when_ready, args=(url,), daemon=True).start()
    with _watching(out, runtime) if watch else contextlib.nullcontext():
        poll_s = _POLL_S if watch else None
        serve_index(index=out, host=host, port=port, runtime=runtime, poll_s=poll_s)


@contextlib.contextmanager
def _watching(index: Path, runtime: str) -> Iterator[None]:
    """Follow the gallery in a process of its own, so that encoding holds up no search."""
    process = process_context().Process(target=_watch, args=(index, runtime))
    process.start()
    try:
        yield
    finally:
        process.terminate()  # it ends between two jobs
        process.join(_END_S)
        process.kill()


def _watch(index: Path, runtime: str) -> None:
    from index_jobs.jobs.watch import watch

    try:
        watch(index, typer.echo, runtime=runtime)
    except DcarError as error:
        typer.echo(f"warning: not watched: {error}", err=True)


def _checkpoint(model: str, pretrained: str | None, folder: Path) -> tuple[Path, list[str]]:
    """Return a checkpoint of the unadapted model, and the options of `dcar train` that name the model.

    If the weights cannot be fetched, the bundled model takes its place. A checkpoint of local files is always written
    again, since the files may have changed.
    """
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.checkpoint import is_checkpoint, save_zero_shot

    is_directory = Path(model).is_dir()
    weights = Path(model if is_directory else pretrained or "").resolve()
    is_local = is_directory or weights.is_file()
    name = f"{weights.name}-{_short_hash(weights)}" if is_local else f"{model}-{pretrained or 'own'}"
    out = folder / name.replace("/", "-").replace(":", "-")
    source = ["--model", model, *(["--pretrained", pretrained] if pretrained else [])]
    if is_checkpoint(out) and not is_local:
        return out, source
    try:
        backbone = load_backbone(BackboneSource(model, pretrained))
    except HubUnavailableError:
        if not _BUNDLED.is_dir():
            raise
        typer.echo(
            f"the model hub cannot be reached, so the bundled model is used, which knows drawings better than photos; "
            f"run this again with a connection, or give --model DIR, for {model}"
        )
        return bundled_checkpoint(folder / "bundled", _STANDS_IN.format(model)), ["--model", str(_BUNDLED)]
    save_zero_shot(backbone, out)
    return out, source


def _short_hash(place: Path) -> str:
    """Return eight hexadecimal digits that distinguish a path from others with the same last part."""
    return hashlib.sha256(str(place).encode()).hexdigest()[:8]


def _hints(gallery: Path, index: Path, source: list[str], *, has_captions: bool) -> str:
    images = shlex.quote(str(gallery))
    written = (
        " to the captions, and serve the result" if has_captions else ", write a table of captions (docs/tutorial.md)"
    )
    return (
        f"To adapt the model{written}:\n"
        f"  dcar train --data {images} {shlex.join(source)} --out adapted\n"
        f"  dcar index build --gallery {images} --checkpoint adapted --out {shlex.quote(str(index))}"
        f" --validation {images}\n"
        f"Stop with Ctrl-C."
    )


def has_browser() -> bool:
    """Return True if a graphical browser can be opened; one for text would take over this terminal."""
    is_desktop = sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return is_desktop and sys.stdout.isatty()


def open_when_ready(url: str) -> None:
    while True:
        try:
            urllib.request.urlopen(f"{url}readyz", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            webbrowser.open(url)
            return
