"""`dcar serve`, `dcar search`, `dcar key`, and two that index and serve at once: `dcar
demo` and `dcar quickstart`.
"""

import contextlib
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from app.cli import options
from app.cli.options import EXAMPLES, app
from dcar_core.model.catalogue import recommended_weights
from dcar_core.util.console import show_progress
from dcar_core.util.errors import (
    DataError,
    DcarError,
    HubUnavailableError,
    ImageError,
    ImageFault,
)
from dcar_core.util.options import command, option, with_options
from index_jobs.spec import IndexSpec

if TYPE_CHECKING:
    from index_jobs.gallery.scan import Gallery

HOST = option("127.0.0.1", "Address to listen on.")
PORT = option(8000, "Port to listen on.", min=1, max=65535)
_STANDS_IN = (
    "This model knows emoji, not photos. Run dcar quickstart again with a connection to"
    " the model hub, for {}."
)


@command(
    app,
    "serve",
    "dcar serve --index index --port 8000",
    "dcar serve --index shoes --collection bags=bags-index",
)
def serve(
    *,
    index: Path | None = option(
        None, "Directory or URL of a published index [DCAR_INDEX]."
    ),
    host: str | None = option(None, "Address to listen on [DCAR_HOST]."),
    port: int | None = option(
        None,
        "Port; 0 chooses a free one [DCAR_PORT].",
        min=0,
        max=65535,
    ),
    workers: int | None = option(
        None,
        "Processes that serve the port [DCAR_WORKERS].",
        min=1,
    ),
    runtime: str | None = option(
        None, "Encoder runtime, such as auto or torch [DCAR_RUNTIME]."
    ),
    collection: list[str] | None = option(
        None,
        "Another index, under /collections/NAME/; may be repeated.",
        metavar="NAME=DIR",
    ),
) -> None:
    """Serve an index over HTTP, with a search page at / and the API's documentation at
    /docs.

    Every setting can come from the environment: DCAR_REDIS_URL, DCAR_ADMIN_KEY,
    DCAR_MAX_UPLOAD_BYTES, ...
    """
    if index is None and not os.environ.get("DCAR_INDEX"):
        raise DcarError(
            "no index: give --index DIR, a directory that `dcar index build --out DIR`"
            " wrote"
        )
    collections = {
        name: Path(path)
        for name, path in _pairs("--collection", "NAME=DIR", collection)
    }
    serve_index(
        index=index,
        host=host,
        port=port,
        workers=workers,
        runtime=runtime,
        collections=collections or None,
    )


@command(
    app,
    "search",
    'dcar search "red sports car" --index index -k 5',
    """dcar search photo.jpg --index index --filter '{"category": "shoes"}' --json""",
    'dcar search "red shoe" --index index --option more_like=4f1c0a --option fold=0.9',
)
def search(
    query: str = option(help="Words, or the path of an image."),
    *,
    index: Path = options.INDEX,
    image: Path | None = option(None, "An image to combine with the words."),
    k: int = option(10, "Number of results.", flags=("-k",), min=1, max=1000),
    without: str = option("", "Words for content that results should not show."),
    hybrid: bool = option(
        False, "Look up the words in ids, texts and metadata as well."
    ),
    filter: dict[str, Any] | None = options.FILTER,
    option: list[str] | None = option(
        None,
        "Any other search option of the HTTP API; may be repeated.",
        metavar="NAME=VALUE",
    ),
    as_json: bool = option(False, "Print one JSON object.", flags=("--json",)),
    device: str = options.DEVICE,
) -> None:
    """Search an index once, without a service.

    A line has rank, score (cosine), id, and caption, or title and file name. With
    --hybrid, words also count for the rank. An index with a --group-field lists each
    product once.
    """
    from dcar_core.images import has_image_suffix

    if has_image_suffix(query) or os.path.isfile(query):  # noqa: PTH113  False for words too long for a name
        query, image = "", Path(query)
    if image is not None and not image.is_file():  # before a model is loaded
        raise ImageError(f"{image}: No such file", ImageFault.MISSING)
    from app.search import Index
    from app.search.query import parse_fields

    fields = {"k": k, "without": without, "hybrid": hybrid, "filter": filter}
    fields |= parse_fields(_pairs("--option", "NAME=VALUE, such as fold=0.9", option))
    opened = Index.open(index, device=device)
    body = opened.search(query, image=image, **fields)
    shown = list[dict[str, object]]()
    for result in body["results"]:
        metadata = opened.metadata(result["id"])
        shown.append(
            {
                **result,
                **{name: metadata.get(name, "") for name in ("title", "file_name")},
            }
        )
    if as_json:
        typer.echo(json.dumps({**body, "results": shown}, ensure_ascii=False))
        return
    if not shown:
        typer.echo(
            "nothing found: no item fulfils the filter and reaches min_score", err=True
        )
    elif body["nothing_fits"]:
        typer.echo("nothing fits well; these are the nearest", err=True)
    for row in shown:
        name = row["file_name"]
        if row["title"]:
            name = f"{row['title']} ({name})"
        typer.echo(
            f"{row['rank']:3}  {row['score']:.3f}  {row['id']:24} "
            f" {row['caption'] or name}"
        )


@command(app, "key", "dcar key webshop")
def key(
    name: str = option(help="Name of the key's owner, which appears in the log."),
) -> None:
    """Create an API key. The service stores its hash only: add the last line of the
    output to DCAR_API_KEYS, or set DCAR_ADMIN_KEY to it.
    """
    from app.core.callers import key_hash, new_key, parse_keys

    secret = new_key()
    line = f"{name}:{key_hash(secret)}"
    try:
        parse_keys(line)
    except ValueError:
        raise DcarError(
            f"the name {name!r} is not allowed: use 1 to 64 letters, digits, dots,"
            " dashes"
        ) from None
    typer.echo(f"for {name}, shown this once: {secret}\n{line}")


@command(app, "demo", "dcar demo", "dcar demo --port 9000 --domain openmoji")
@with_options(IndexSpec, "runtime")
def demo(
    *,
    host: str = HOST,
    port: int = PORT,
    domain: str = option("twemoji", "Gallery: twemoji or openmoji."),
    data: Path = option(Path("data"), "Directory for the demo's indexes."),
    **build: Any,
) -> None:
    """Index a bundled emoji gallery (once) and serve it, also by the unadapted model,
    as collections over one backbone.

    Routes without a collection, such as /search/text, search by the adapted model;
    /collections/DOMAIN-clip/search/text by the other. The page can show both side by
    side.
    """
    show_progress()
    from app.server import base_url, listen
    from index_jobs.rebuild import rebuild

    domains = sorted(path.parent.name for path in EXAMPLES.glob("*/gallery.tar"))
    if domain not in domains:
        available = ", ".join(domains) or "none: use a source checkout"
        raise DcarError(
            f"no bundled domain is named {domain!r}; there are: {available}"
        )
    listen(host, port).close()  # a taken port is said before the work
    clip = f"{domain}-clip"
    gallery = EXAMPLES / domain
    indexes = {name: data / "index" / name for name in (domain, clip)}
    typer.echo()
    for number, name in enumerate(indexes, 1):
        if name == clip:
            checkpoint = bundled_checkpoint(data / "zero-shot")
        else:
            checkpoint = gallery / "checkpoint"
        summary = rebuild(
            gallery,
            checkpoint,
            indexes[name],
            validation=gallery,
            workers=0,
            **build,
        )
        if summary.reused:
            state = "already indexed"
        else:
            state = f"indexed in {summary.seconds:.0f} s"
        typer.echo(f"{number} of 2: {summary.count:,} {name} images, {state}")
    url = base_url(host, port)
    body = (
        """-H 'content-type: application/json' -d '{"query": "crying cat", "k": 3}'"""
    )
    typer.echo(
        f"Try:\n  the page    {url}/\n  beside CLIP"
        f" {url}/#q=woman+running+dark+skin&beside={clip}&words=0"
    )
    for prefix in ("", f"/collections/{clip}"):
        typer.echo(f"  by text     curl -s {url}{prefix}/search/text {body}")
    typer.echo(
        f"  by image    curl -s {url}/search/image -F file=@{EXAMPLES / 'query.png'} -F"
        " k=3\nStop with Ctrl-C.\n"
    )
    sys.stdout.flush()
    serve_index(
        index=indexes.pop(domain),
        collections=indexes,
        host=host,
        port=port,
        **build,
    )


@command(
    app,
    "quickstart",
    "dcar quickstart photos",
    "dcar quickstart photos --model ViT-L-14 --port 9000",
)
@with_options(IndexSpec, "runtime")
def quickstart(
    gallery: Path = option(help="Folder of images, an uncompressed tar, or a list."),
    *,
    model: str = options.MODEL,
    pretrained: str | None = options.PRETRAINED,
    host: str = HOST,
    port: int = PORT,
    data: Path = option(Path("data"), "Directory for the checkpoint and the index."),
    watch: bool = option(
        False, "Follow new, changed and removed images while serving."
    ),
    **build: Any,
) -> None:
    """Index a folder of images with an unadapted model, and serve it with a search
    page.

    Without a metadata file, file names become titles and sub-folders become categories.
    The bundled model takes over if the model hub cannot be reached and has the weights.
    An interrupted run resumes with the same command.
    """
    show_progress()
    from app.server import base_url, listen
    from index_jobs.gallery.scan import scan
    from index_jobs.rebuild import rebuild

    source = gallery.absolute()
    if not source.exists():  # said before weights are fetched
        raise DataError(f"there is no gallery {gallery}; name a folder of images")
    listen(host, port).close()  # so is a taken port
    typer.echo(f"1 of 3: model {model}")
    checkpoint = _unadapted(
        model,
        pretrained or recommended_weights(model),
        data / "zero-shot",
    )
    typer.echo(f"2 of 3: index {gallery}")
    out = data / "quickstart" / _short_hash(str(source)) / (source.stem or "gallery")
    images = scan(source)
    if not out.exists() and (moved := _index_of_moved(images, data / "quickstart")):
        out.parent.mkdir(parents=True, exist_ok=True)
        moved.rename(out)
        typer.echo("This gallery was moved: its vectors are taken over.")
    # broken images are counted below, deleted ones are meant to be
    build |= {"max_failed": 1.0, "max_vanished": 1.0}
    summary = rebuild(images, checkpoint, out, **build)
    if summary.reused:
        state = "already indexed"
    else:
        state = f"indexed in {summary.seconds:.0f} s"
    typer.echo("\n".join([f"{summary.count:,} images, {state}", *summary.notes()]))
    follows = "New photos are followed." if watch else "`--watch` follows new photos."
    typer.echo(
        f"3 of 3: serve {base_url(host, port)}/\nStop with Ctrl-C. {follows}"
        " docs/tutorial.md adapts the model."
    )
    sys.stdout.flush()
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "index",
        "watch",
        str(out),
        "--runtime",
        build["runtime"],
    ]
    # so that encoding holds up no search
    watcher = subprocess.Popen(command) if watch else None
    if watch:
        # which ends the watcher, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        serve_index(index=out, host=host, port=port, runtime=build["runtime"])
    finally:
        if watcher is not None:
            watcher.terminate()
            watcher.wait()


def _index_of_moved(images: "Gallery", folder: Path) -> Path | None:
    """Return an index whose gallery is no longer there and had mostly these images."""
    from index_jobs.index.versions import open_current

    ids = {*images.table["id"].to_pylist()}
    for current in folder.glob("*/*/CURRENT"):
        with contextlib.suppress(DcarError):  # damaged
            served = open_current(current.parent)
            is_gone = (
                bool(served.manifest.root) and not Path(served.manifest.root).exists()
            )
            if (
                is_gone
                and 2 * len(ids.intersection(served.column("id").to_pylist()))
                > served.rows
            ):
                return current.parent
    return None


def _unadapted(model: str, pretrained: str | None, folder: Path) -> Path:
    """Return a checkpoint of the unadapted model, or of the bundled one if the weights
    cannot be fetched.

    That of local files is always written again, since the files may have changed.
    """
    from dcar_core.model.checkpoint import is_checkpoint, save_zero_shot
    from dcar_core.model.config import BackboneSource

    source = BackboneSource(model, pretrained)
    is_local = source.directory is not None or source.weights_file.is_file()
    out = folder / _short_hash(f"{model} {pretrained}")
    if is_checkpoint(out) and not is_local:
        return out
    try:
        save_zero_shot(source, out)
    except HubUnavailableError:
        if not EXAMPLES.is_dir():
            raise
        note = _STANDS_IN.format(model)
        typer.echo(
            f"the model hub cannot be reached, so the bundled model is used. {note}"
        )
        return bundled_checkpoint(folder / "bundled", note)
    return out


def bundled_checkpoint(out: Path, note: str = "") -> Path:
    """Return a checkpoint of the unadapted bundled model, which is written once."""
    from dcar_core.model.checkpoint import is_checkpoint, save_zero_shot
    from dcar_core.model.config import BackboneSource

    if not is_checkpoint(out):
        save_zero_shot(BackboneSource(str(EXAMPLES / "base")), out, note)
    return out


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _pairs(name: str, form: str, texts: list[str] | None) -> list[tuple[str, str]]:
    """Return the names and values of an option that may be repeated."""
    pairs = []
    for text in texts or []:
        key, sign, value = text.partition("=")
        if not (key and sign):
            raise DcarError(f"{name} is {form}, not {text!r}")
        pairs.append((key, value))
    return pairs


def serve_index(**flags: object) -> None:
    """Serve with the settings of flags and the environment."""
    gc.disable()  # what is imported stays
    from app.core.settings import load_settings
    from app.server import serve as run

    gc.freeze()
    gc.enable()
    run(load_settings(**flags))
