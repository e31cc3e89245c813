"""`dcar`: train, evaluate, index, serve and search from the command line.

Heavy modules are imported by the command that needs them, so that `--help` answers at once. Errors that a user can
mend are one line on stderr and exit status 1.
"""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcar_core.errors import DcarError

if TYPE_CHECKING:
    from dcar_core.backbone import Backbone

app = typer.Typer(
    name="dcar",
    help="Image-text retrieval that knows fine-grained differences.\n\n"
    "Adapt CLIP to your catalogue (train), turn its pictures into an index (index build), and search it from the "
    "command line (search) or as a service (serve). `dcar demo` shows all of it on a bundled example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
index_app = typer.Typer(help="Build, list, verify and roll back published indexes.", no_args_is_help=True)
app.add_typer(index_app, name="index")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "emoji"

Data = Annotated[
    Path,
    typer.Option(help="Directory with train.json, val.json, test.json in FDRD's form, or pairs.jsonl / pairs.csv."),
]
ModelName = Annotated[
    str, typer.Option("--model", help="An open_clip model such as ViT-B-32-quickgelu, or a model directory.")
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Weights for a model name: a tag (openai) or a .safetensors / .pt file. Not for a directory."),
]
Images = Annotated[Path | None, typer.Option(help="Where the pictures are, when not beside the annotations.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Epochs = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option(min=2)]
LearningRate = Annotated[float, typer.Option("--lr", min=0)]
IndexDir = Annotated[Path, typer.Option("--index", help="Directory of a published index.")]
Checkpoint = Annotated[Path, typer.Option(help="What `dcar train --out` wrote, or a model directory.")]
Gallery = Annotated[Path, typer.Option(help="Folder of pictures and tars, or a list: .jsonl, .csv, .parquet.")]
Out = Annotated[Path, typer.Option(help="Directory to write to.")]


@app.command()
def train(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    method: Annotated[str, typer.Option(help="dcar, coop, maple, dual, ... (an unknown name lists all)")] = "dcar",
    images: Images = None,
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: LearningRate = 2e-3,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better validation recall.")] = 5,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Adapt CLIP to a domain: learns prompts of a few hundred KB, keeps the best epoch by validation recall."""
    from dcar_core.checkpoint import save_checkpoint
    from dcar_core.config import TrainConfig
    from dcar_core.data import load_split
    from dcar_core.evaluate import seeded_model
    from dcar_core.methods import method as method_config
    from dcar_core.train import train as run

    chosen = method_config(method)
    config = TrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed)
    training, report = load_split(data, "train", images=images)
    validation, _ = load_split(data, "val", images=images)
    typer.echo(f"{len(training):,} training pairs, {len(validation):,} for validation\n{report}", err=True)
    prompted = seeded_model(_backbone(model, pretrained, device), chosen, seed)
    found = run(prompted, training, validation, config)
    mark = save_checkpoint(prompted, out, training={**config.to_dict(), "epoch": found.epoch, "validation": found.best})
    (out / "history.json").write_text(json.dumps(found.history, indent=1) + "\n")
    typer.echo(
        f"{out}: epoch {found.epoch}, validation text-to-image R@1 {found.best['t2i_r1']:.1f}, "
        f"image-to-text R@1 {found.best['i2t_r1']:.1f}, {found.seconds:.0f} s, fingerprint {mark[:12]}"
    )


@app.command()
def evaluate(
    data: Data,
    out: Out,
    model: ModelName = "ViT-B-32-quickgelu",
    pretrained: Pretrained = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; an unknown name lists all.")] = "clip,coop,maple,dcar",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    images: Images = None,
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: LearningRate = 2e-3,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better validation recall.")] = 5,
    device: Device = "auto",
) -> None:
    """Train and test several methods with several seeds; prints a table and writes results.json to --out."""
    from dcar_core.config import TrainConfig
    from dcar_core.evaluate import compare, table

    names = [name.strip() for name in methods.split(",") if name.strip()]
    config = TrainConfig(epochs=epochs, batch_size=batch_size, lr=lr, patience=patience)
    results = compare(_backbone(model, pretrained, device), data, names, seeds, out, config, images=images)
    typer.echo(table(results))


@index_app.command("build")
def index_build(
    gallery: Gallery,
    checkpoint: Checkpoint,
    out: Out,
    kind: Annotated[str, typer.Option(help="auto, flat, hnsw, ivf, or any faiss index_factory string.")] = "auto",
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
        gallery, checkpoint, out, kind=kind, workers=workers, batch_size=batch_size, keep=keep,
        max_failed=max_failed, device=device, force=force,
    )  # fmt: skip
    what = "is up to date with" if found.reused else "published:"
    typer.echo(f"{out}: version {found.version} {what} {found.count:,} pictures, {found.kind}, {found.failed} broken")


@index_app.command("list")
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


@index_app.command("verify")
def index_verify(index: Annotated[Path, typer.Argument(help="Directory of a published index.")]) -> None:
    """Check every file of every version against its checksum."""
    from index_jobs.artifact import verify_index

    for manifest in verify_index(index):
        typer.echo(f"version {manifest.version}: {len(manifest.files)} files are as published")


@index_app.command("rollback")
def index_rollback(
    index: Annotated[Path, typer.Argument(help="Directory of a published index.")],
    to: Annotated[int | None, typer.Option(help="Version; default: the one before the current.")] = None,
) -> None:
    """Serve an earlier version again."""
    from index_jobs.publish import rollback

    typer.echo(f"{index}: version {rollback(index, to)} is current")


@app.command()
def serve(
    index: Annotated[Path | None, typer.Option(help="Directory of a published index [DCAR_INDEX].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [DCAR_HOST].")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="[DCAR_PORT]")] = None,
) -> None:
    """Serve an index over HTTP, with a search page at / and the API's documentation at /docs.

    Every setting can come from the environment: DCAR_REDIS_URL, DCAR_ADMIN_KEY, DCAR_MAX_UPLOAD_BYTES, ...
    """
    _serve(index=index, host=host, port=port)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="Words, or the path of a picture.")],
    index: IndexDir,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many results.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    device: Device = "auto",
) -> None:
    """Search an index once, without a service."""
    import numpy as np

    from dcar_core import Encoder
    from dcar_core.images import IMAGE_SUFFIXES
    from index_jobs.artifact import open_current

    if not query.strip():
        raise DcarError("the query is empty: give words or the path of a picture")
    artifact = open_current(index)
    encoder = Encoder.load(artifact.checkpoint, device=device)
    artifact.require(encoder.fingerprint)
    path = Path(query)
    is_picture = path.suffix.lower() in IMAGE_SUFFIXES
    vector = encoder.encode_images([path]) if is_picture else encoder.encode_text([query])
    scores, rows = artifact.search(vector, min(k, artifact.manifest.count))
    results: list[dict[str, Any]] = []
    for score, row in zip(np.atleast_2d(scores)[0], np.atleast_2d(rows)[0], strict=True):
        if row >= 0:
            item = artifact.item(int(row))
            results.append(
                {"rank": len(results) + 1, "id": item.id, "score": round(float(score), 4), "caption": item.caption,
                 "category": item.category}
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"index_version": artifact.manifest.version, "results": results}, ensure_ascii=False))
        return
    for hit in results:
        typer.echo(f"{hit['rank']:3}  {hit['score']:.3f}  {hit['id']:24}  {hit['caption']}")


@app.command()
def demo(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    domain: Annotated[str, typer.Option(help="twemoji or openmoji.")] = "twemoji",
    data: Annotated[Path, typer.Option(help="Where the demo keeps its index.")] = Path("data"),
) -> None:
    """Index the bundled emoji gallery (once) and serve it."""
    from app.main import require_free_port
    from index_jobs.rebuild import rebuild

    example = EXAMPLES / domain
    if not (example / "gallery.tar").is_file():
        known = (
            ", ".join(sorted(p.parent.name for p in EXAMPLES.glob("*/gallery.tar"))) or "none: use a source checkout"
        )
        raise DcarError(f"no bundled domain is named {domain!r}; there are: {known}")
    require_free_port(host, port)
    index = data / "index" / domain
    found = rebuild(example, example / "checkpoint", index)
    state = "already indexed" if found.reused else f"indexed in {found.seconds:.0f} s"
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    typer.echo(
        f"\n{found.count:,} {domain} pictures, {state}. Try:\n"
        f"  the page    {url}/\n"
        f"  by text     curl -s {url}/search/text -H 'content-type: application/json' "
        f"""-d '{{"query": "crying cat", "k": 3}}'\n"""
        f"  by picture  curl -s {url}/search/image -F file=@{EXAMPLES / 'query.png'} -F k=3\n"
        f"Stop with Ctrl-C.\n"
    )
    sys.stdout.flush()
    _serve(index=index, host=host, port=port)


def _serve(**given: object) -> None:
    from app.main import serve as run
    from app.settings import load_settings

    run(load_settings(**given))


def _backbone(model: str, pretrained: str | None, device: str) -> "Backbone":
    from dcar_core.backbone import BackboneSource, load_backbone
    from dcar_core.encoder import pick_device

    return load_backbone(BackboneSource(model, pretrained), pick_device(device))


def main() -> None:
    """Entry point: a DcarError is a message for the user, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        app()
    except DcarError as error:
        typer.echo(f"dcar: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
