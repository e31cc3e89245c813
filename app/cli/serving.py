"""`dcar serve`, `dcar search` and `dcar demo`."""

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from app.cli.options import EXAMPLES, Device, Filter, IndexDir, example
from dcar_core.util.console import dump_json, show_progress
from dcar_core.util.errors import DcarError, ImageError, ImageFault
from dcar_core.util.files import require_writable
from index_jobs.jobs.cli import Runtime

commands = typer.Typer()


@commands.command(
    epilog=example("dcar serve --index index --port 8000", "dcar serve --index shoes --collection bags=bags-index")
)
def serve(
    index: Annotated[Path | None, Option(help="Directory or URL of a published index [DCAR_INDEX].")] = None,
    host: Annotated[str | None, Option(help="Address to listen on [DCAR_HOST].")] = None,
    port: Annotated[int | None, Option(min=0, max=65535, help="Port; 0 chooses a free one [DCAR_PORT].")] = None,
    workers: Annotated[int | None, Option(min=1, help="Processes that serve the port [DCAR_WORKERS].")] = None,
    runtime: Annotated[str | None, Option(help="Encoder runtime, such as auto or torch [DCAR_RUNTIME].")] = None,
    collection: Annotated[
        list[str] | None, Option(metavar="NAME=DIR", help="Another index, under /collections/NAME/; may be repeated.")
    ] = None,
) -> None:
    """Serve an index over HTTP, with a search page at / and the API's documentation at /docs.

    Every setting can come from the environment: DCAR_REDIS_URL, DCAR_ADMIN_KEY, DCAR_MAX_UPLOAD_BYTES, ...
    """
    if index is None and not os.environ.get("DCAR_INDEX"):
        raise DcarError("no index: give --index DIR, a directory that `dcar index build --out DIR` wrote")
    pairs = _pairs("--collection", "NAME=DIR", collection)
    collections = {name: Path(path) for name, path in pairs}
    if len(collections) < len(pairs):
        raise DcarError("--collection gives two indexes one name; give each a name of its own")
    serve_index(index=index, host=host, port=port, workers=workers, runtime=runtime, collections=collections or None)


@commands.command(
    epilog=example(
        'dcar search "red sports car" --index index -k 5',
        """dcar search photo.jpg --index index --filter '{"category": "shoes"}' --json""",
        """dcar search "red shoe" --index index --option more_like=4f1c0a --option fold=0.9""",
    )
)
def search(
    query: Annotated[str, Argument(help="Words, or the path of an image.")],
    index: IndexDir,
    image: Annotated[Path | None, Option(help="An image to combine with the words.")] = None,
    k: Annotated[int, Option("-k", min=1, max=1000, help="Number of results.")] = 10,
    without: Annotated[str, Option(help="Words for content that results should not show.")] = "",
    hybrid: Annotated[bool, Option("--hybrid", help="Look up the words in ids, texts and metadata as well.")] = False,
    filter: Filter = None,
    option: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Any other search option of the HTTP API; may be repeated.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    device: Device = "auto",
) -> None:
    """Search an index once, without a service.

    A line has rank, score (cosine), id, and caption, or title and file name. With --hybrid, words also count for the
    rank. An index with a --group-field lists each product once.
    """
    from dcar_core.images import has_image_suffix

    if has_image_suffix(query) or os.path.isfile(query):  # noqa: PTH113  False for words too long for a name
        query, image = "", Path(query)
    if image is not None and not image.is_file():  # before a model is loaded
        raise ImageError(f"{image}: No such file", ImageFault.MISSING)
    from app.search import Index
    from app.search.query import parse_fields

    given = {"k": k, "without": without, "hybrid": hybrid, "filter": filter}
    fields = given | parse_fields(_pairs("--option", "NAME=VALUE, such as fold=0.9", option))
    opened = Index.open(index, device=device)
    body, shown = opened.search(query, image=image, **fields), list[dict[str, object]]()
    for result in body["results"]:
        metadata = opened.metadata(result["id"])
        shown.append({**result, **{name: metadata.get(name, "") for name in ("title", "file_name")}})
    if as_json:
        typer.echo(dump_json({**body, "results": shown}))
        return
    if not shown:
        typer.echo("nothing found: no item fulfils the filter and reaches min_score", err=True)
    elif body["nothing_fits"]:
        typer.echo("nothing fits well; these are the nearest", err=True)
    for each in shown:
        name = f"{each['title']} ({each['file_name']})" if each["title"] else each["file_name"]
        typer.echo(f"{each['rank']:3}  {each['score']:.3f}  {each['id']:24}  {each['caption'] or name}")


@commands.command(epilog=example("dcar demo", "dcar demo --port 9000 --domain openmoji"))
def demo(
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    domain: Annotated[str, Option(help="Default collection: twemoji or openmoji.")] = "twemoji",
    data: Annotated[Path, Option(help="Directory for the demo's indexes.")] = Path("data"),
    runtime: Runtime = "auto",
) -> None:
    """Index the bundled emoji galleries (once) and serve them as collections over one backbone.

    Routes without a collection, such as /search/text, search the default one; /collections/NAME/search/text searches
    another. DOMAIN-clip is the gallery of the default collection with the unadapted model; the page can show both side
    by side.
    """
    show_progress()
    from app.server import base_url, listen
    from index_jobs.rebuild import rebuild

    domains = sorted(path.parent.name for path in EXAMPLES.glob("*/gallery.tar"))
    if domain not in domains:
        available = ", ".join(domains) or "none: use a source checkout"
        raise DcarError(f"no bundled domain is named {domain!r}; there are: {available}")
    listen(host, port).close()  # report a taken port before minutes are spent on indexes
    require_writable(data)
    others = [name for name in domains if name != domain]
    sources = {name: (EXAMPLES / name, EXAMPLES / name / "checkpoint") for name in (domain, *others)}
    sources[f"{domain}-clip"] = EXAMPLES / domain, bundled_checkpoint(data / "zero-shot")
    others.append(f"{domain}-clip")
    typer.echo()
    for number, (name, (gallery, checkpoint)) in enumerate(sources.items(), 1):
        summary = rebuild(gallery, checkpoint, data / "index" / name, validation=gallery, runtime=runtime)
        state = "already indexed" if summary.reused else f"indexed in {summary.seconds:.0f} s"
        typer.echo(f"{number} of {len(sources)}: {summary.count:,} {name} images, {state}")
    typer.echo(_hints(base_url(host, port), others))
    sys.stdout.flush()
    collections = {name: data / "index" / name for name in others}
    index = data / "index" / domain
    serve_index(index=index, collections=collections, host=host, port=port, runtime=runtime)


def bundled_checkpoint(out: Path, note: str = "") -> Path:
    """Return a checkpoint of the unadapted bundled model, which is written once."""
    from dcar_core.model.checkpoint import is_checkpoint, save_zero_shot

    if not is_checkpoint(out):
        from dcar_core.model.backbone import BackboneSource, load_backbone

        save_zero_shot(load_backbone(BackboneSource(str(EXAMPLES / "base"))), out, note)
    return out


def _hints(url: str, others: list[str]) -> str:
    body = """-H 'content-type: application/json' -d '{"query": "crying cat", "k": 3}'"""
    prefixes = ["", *(f"/collections/{name}" for name in others)]
    texts = "".join(f"  by text     curl -s {url}{prefix}/search/text {body}\n" for prefix in prefixes)
    image = f"  by image    curl -s {url}/search/image -F file=@{EXAMPLES / 'query.png'} -F k=3\n"
    pages = f"  the page    {url}/\n  beside CLIP {url}/#q=woman+running+dark+skin&beside={others[-1]}&words=0\n"
    return f"Try:\n{pages}{texts}{image}Stop with Ctrl-C.\n"


def _pairs(option: str, form: str, values: list[str] | None) -> list[tuple[str, str]]:
    """Return the names and values of an option that may be repeated."""
    pairs = []
    for each in values or []:
        name, sign, value = each.partition("=")
        if not (name and sign):
            raise DcarError(f"{option} is {form}, not {each!r}")
        pairs.append((name, value))
    return pairs


def serve_index(**flags: object) -> None:
    """Serve with the settings of flags and the environment."""
    gc.disable()  # what is imported stays
    from app.core.settings import load_settings
    from app.server import serve as run

    gc.freeze()
    gc.enable()
    run(load_settings(**flags))
