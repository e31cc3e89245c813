"""`dcar serve`, `dcar search` and `dcar demo`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.options import EXAMPLES, Device, IndexDir, Runtime
from dcar_core.util.console import json_text
from dcar_core.util.errors import DcarError

commands = typer.Typer()


@commands.command()
def serve(
    index: Annotated[Path | None, typer.Option(help="Directory of a published index [DCAR_INDEX].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [DCAR_HOST].")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one [DCAR_PORT].")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="What runs the encoder: auto, torch, openvino-bf16, .. [DCAR_RUNTIME]")
    ] = None,
    collection: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="One more index, under /collections/NAME/; may be repeated."),
    ] = None,
) -> None:
    """Serve an index over HTTP, with a search page at / and the API's documentation at /docs.

    Every setting can come from the environment: DCAR_REDIS_URL, DCAR_ADMIN_KEY, DCAR_MAX_UPLOAD_BYTES, ...
    """
    _serve(index=index, host=host, port=port, runtime=runtime, collections=_collections(collection or []))


@commands.command()
def search(
    query: Annotated[str, typer.Argument(help="Words, or the path of a picture.")],
    index: IndexDir,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many results.")] = 10,
    without: Annotated[str, typer.Option(help="Words for what results should not show.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    device: Device = "auto",
) -> None:
    """Search an index once, without a service."""
    from app.search.query import QueryPart, Weights, compose, normalise
    from dcar_core import Encoder
    from dcar_core.images import IMAGE_SUFFIXES
    from dcar_core.serving import adapter_cache
    from index_jobs.store.versions import open_current

    words = normalise(query)
    if not words:
        raise DcarError("the query is empty: give words or the path of a picture")
    unwanted = normalise(without)
    if without and not unwanted:
        raise DcarError("--without is empty: give words, or leave it out")
    artifact = open_current(index)
    kept = adapter_cache.has_entry(artifact.checkpoint, artifact.manifest.fingerprint, device)
    encoder = Encoder.load(artifact.checkpoint, device=device, runtime="auto" if kept else "torch")
    artifact.require(encoder.fingerprint)
    path = Path(query)
    is_picture = path.suffix.lower() in IMAGE_SUFFIXES
    vector = encoder.encode_images([path]) if is_picture else encoder.encode_text([words])
    parts = [QueryPart(1.0, vector[0])]
    if unwanted:
        parts.append(QueryPart(-Weights().without, encoder.encode_text([unwanted])[0]))
    scores, rows = artifact.search(compose(parts)[None], min(k, artifact.manifest.count))
    results: list[dict[str, Any]] = []
    for score, row in zip(scores[0], rows[0], strict=True):
        if row >= 0:
            item = artifact.item(int(row))
            results.append(
                {"rank": len(results) + 1, "id": item.id, "score": round(float(score), 4), "caption": item.caption,
                 "category": item.category, "file_name": item.metadata.get("file_name", "")}
            )  # fmt: skip
    if as_json:
        typer.echo(json_text({"index_version": artifact.manifest.version, "results": results}))
        return
    for hit in results:
        typer.echo(f"{hit['rank']:3}  {hit['score']:.3f}  {hit['id']:24}  {hit['caption'] or hit['file_name']}")


@commands.command()
def demo(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    domain: Annotated[str, typer.Option(help="The default collection: twemoji or openmoji.")] = "twemoji",
    data: Annotated[Path, typer.Option(help="Where the demo keeps its indexes.")] = Path("data"),
    runtime: Runtime = "auto",
) -> None:
    """Index the bundled emoji galleries (once) and serve them as collections over one backbone.

    Routes without a collection, such as /search/text, search the default one, /collections/NAME/search/text the others.
    DOMAIN-clip is the default one's gallery by the base model alone, to see what was learned: the page shows both side
    by side.
    """
    from app.server import require_free_port
    from index_jobs.rebuild import rebuild

    known = sorted(path.parent.name for path in EXAMPLES.glob("*/gallery.tar"))
    if domain not in known:
        there = ", ".join(known) or "none: use a source checkout"
        raise DcarError(f"no bundled domain is named {domain!r}; there are: {there}")
    require_free_port(host, port)
    others = [each for each in known if each != domain]
    made = {name: (EXAMPLES / name, EXAMPLES / name / "checkpoint") for name in (domain, *others)}
    made[f"{domain}-clip"] = EXAMPLES / domain, _base_model(data / "zero-shot")
    others.append(f"{domain}-clip")
    typer.echo()
    for name, (example, checkpoint) in made.items():
        found = rebuild(example, checkpoint, data / "index" / name, validation=example, runtime=runtime)
        state = "already indexed" if found.reused else f"indexed in {found.seconds:.0f} s"
        typer.echo(f"{found.count:,} {name} pictures, {state}")
    typer.echo(_hints(f"http://{f'[{host}]' if ':' in host else host}:{port}", others))
    sys.stdout.flush()
    collections = {name: data / "index" / name for name in others}
    _serve(index=data / "index" / domain, collections=collections, host=host, port=port, runtime=runtime)


def _base_model(out: Path) -> Path:
    """The checkpoint of the bundled base model as it is, made once."""
    from dcar_core.model.checkpoint import is_checkpoint, read_config
    from dcar_core.model.zero_shot import save_zero_shot

    wanted = {read_config(path)["backbone"]["sha256"] for path in EXAMPLES.glob("*/checkpoint")}
    if not is_checkpoint(out) or read_config(out)["backbone"]["sha256"] not in wanted:
        from dcar_core.model.backbone import BackboneSource, load_backbone

        save_zero_shot(load_backbone(BackboneSource(str(EXAMPLES / "base"))), out)
    return out


def _hints(url: str, others: list[str]) -> str:
    ask = """-H 'content-type: application/json' -d '{"query": "crying cat", "k": 3}'"""
    places = ["", *(f"/collections/{name}" for name in others)]
    texts = "".join(f"  by text     curl -s {url}{place}/search/text {ask}\n" for place in places)
    picture = f"  by picture  curl -s {url}/search/image -F file=@{EXAMPLES / 'query.png'} -F k=3\n"
    pages = f"  the page    {url}/\n  beside CLIP {url}/#q=woman+running+dark+skin&beside={others[-1]}\n"
    return f"Try:\n{pages}{texts}{picture}Stop with Ctrl-C.\n"


def _collections(given: list[str]) -> dict[str, Path] | None:
    """None leaves them to the environment."""
    pairs = [each.partition("=") for each in given]
    if wrong := [each for each, (name, _, place) in zip(given, pairs, strict=True) if not (name and place)]:
        raise DcarError(f"--collection is NAME=DIR, not {wrong[0]!r}")
    return {name: Path(place) for name, _, place in pairs} or None


def _serve(**given: object) -> None:
    # Before NumPy is loaded: its products are small here, and while the model works, two threads for one take up to
    # twenty times as long as one thread does.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from app.core.settings import load_settings
    from app.server import serve as run

    run(load_settings(**given))
