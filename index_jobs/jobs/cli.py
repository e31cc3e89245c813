"""The command that builds and publishes an index: `dcar index build` and `python -m index_jobs.rebuild`.

- Both forms mount this one function, so options, checks, help, output and exit codes are the same. Only the default
  of `--json` differs.
- Nothing heavy is imported before the options are checked.
"""

import json
import logging
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dcar_core.util.errors import DcarError
from index_jobs.jobs.notify import SCHEMES
from index_jobs.jobs.summary import RebuildSummary, RejectedError
from index_jobs.spec import BuildOptions, IndexSpec

EPILOG = """\b
Example:
  dcar index build --gallery photos --checkpoint checkpoint --out index

\b
Exit codes:
  0    published, or nothing had changed ("reused": true in the JSON summary)
  1    the output cannot be written, an index or shard is corrupted, or another failure
  2    wrong usage
  3    the gallery cannot be used, or too many of its images are broken
  4    the checkpoint, its model or the served version's model cannot be loaded
  5    another job is writing to the same index
  6    not published: the new index ranks worse than the served one
  7    not published: too many images of the served index are gone from the gallery
  130  interrupted; run the same command again to resume
"""


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "800MiB"; a bare number is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is not a size; give one such as 800MiB or 4GiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_share(text: str | float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"must be a share from 0 to 1, not {text}")
    return value


def parse_service(text: str) -> str:
    if not text.startswith(SCHEMES):
        raise typer.BadParameter(f"must begin with one of {', '.join(SCHEMES)}, not {text!r}")
    return text


_LOCATION_HELP = (
    "a folder (with tars and metadata.jsonl, if any), an uncompressed .tar, or a .jsonl, .csv or .parquet list with a "
    "column file_name, image, path or url. A path, or a URL: s3://, gs://, https://."
)
Gallery = Annotated[
    str,
    typer.Option(
        metavar="[NAME=]LOCATION",
        help=f"Images to add: {_LOCATION_HELP} NAME= puts NAME/ before ids and names, so that they differ from others.",
    ),
]
Galleries = Annotated[
    list[str],
    typer.Option(
        "--gallery",
        metavar="[NAME=]LOCATION",
        help=f"Images to index: {_LOCATION_HELP} May be repeated: ids and names in further galleries begin with NAME/, "
        "or with the location's own name.",
    ),
]
Checkpoint = Annotated[
    Path, typer.Option(metavar="DIR", help="Checkpoint directory that `dcar train` or `dcar zero-shot` wrote.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Decoding processes; 0 decodes in threads of the job, without limits. Default: all cores, of more than 4 "
        "all but one, and fewer for a small gallery.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
Keep = Annotated[int, typer.Option(min=1, help="Versions to keep for rollback, the new one included.")]
MaxFailed = Annotated[
    float,
    typer.Option(
        parser=parse_share,
        metavar="SHARE",
        help="Share of images that may be unreadable, 0 to 1; the version's failed.jsonl lists them.",
    ),
]
Device = Annotated[str, typer.Option(help="auto (every GPU, or the CPU), cpu, cuda:1, mps, or several: cuda:0,cuda:1.")]
Runtime = Annotated[
    str,
    typer.Option(
        envvar="DCAR_RUNTIME",
        help="Encoder runtime: auto (by what is installed and the processor), torch, openvino-bf16, and others of "
        "docs/how-to/choose-a-runtime.md.",
    ),
]


def build_command(
    galleries: Galleries,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Index directory; created if missing.")],
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of index: auto (by count, dimensions, memory and device), flat (exact), hnsw, "
            "ivf, ivf-pq-fp16, ivf-pq, pq, gpu-flat, gpu-ivf, gpu-cagra, or a FAISS index_factory string such as "
            "IVF1024,SQ8."
        ),
    ] = IndexSpec.kind,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME[=URI]",
            help="What stores and searches the vectors: faiss, a file of the index, or another engine and its "
            "location; see docs/explanation/index-kinds.md.",
        ),
    ] = IndexSpec.engine,
    text_fields: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Metadata fields whose words hybrid searches look up, separated by commas. Default: every field with "
            "text. Id, caption and category are always looked up.",
        ),
    ] = None,
    group_field: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Metadata field that names the product of an item: searches return each product once."
        ),
    ] = IndexSpec.group_field,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory that the index may take, such as 800MiB or 4GiB. Building it also holds a sample of the "
            "vectors. Default: half of the machine's or container's memory.",
        ),
    ] = None,
    target_recall: Annotated[
        float,
        typer.Option(
            parser=parse_share,
            metavar="SHARE",
            help="Recall at 10 against exact search that search parameters are tuned to.",
        ),
    ] = IndexSpec.target_recall,
    workers: Workers = None,
    batch_size: BatchSize = BuildOptions.batch_size,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Encode on a Ray cluster: its address, auto for the cluster of this machine, or local to start one. "
            "--workers is then the number of its workers.",
        ),
    ] = None,
    keep: Keep = BuildOptions.keep,
    max_failed: MaxFailed = IndexSpec.max_failed,
    max_vanished: Annotated[
        float,
        typer.Option(
            parser=parse_share,
            metavar="SHARE",
            help="Share of the served index's images that may be gone from the gallery, 0 to 1; with more, nothing is "
            "published.",
        ),
    ] = BuildOptions.max_vanished,
    device: Device = BuildOptions.device,
    exact: Annotated[
        bool, typer.Option("--exact", help="Decode every JPEG at full size, bit for bit as open_clip does.")
    ] = False,
    pixel_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep decoded images here for the next rebuild: 150 KB an image at 224 pixels."
        ),
    ] = None,
    runtime: Runtime = "auto",
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Images per shard, which is the work that a killed run can lose.")
    ] = BuildOptions.shard_rows,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Data set as for `dcar train --data`. Its val pairs with images in the gallery compare the new index "
            'with the served one and calibrate `min_score: "auto"`. Default: compare by the gallery\'s captions.',
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            parser=parse_share,
            metavar="SHARE",
            help="Recall at 1 or 10, or nDCG at 100, that the new index may lose and still pass.",
        ),
    ] = BuildOptions.margin,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Publish although nothing has changed, the new index ranks worse or cannot be compared, or the "
            "gallery has shrunk. Images that failed are tried again.",
        ),
    ] = False,
    notify: Annotated[
        list[str] | None,
        typer.Option(
            parser=parse_service,
            metavar="URL",
            help="Notify services of the new version; may be repeated. redis://HOST reaches every service on that "
            "Redis, http://HOST:PORT one service, with the key in DCAR_ADMIN_KEY. Default: services poll.",
        ),
    ] = None,
    keep_shards: Annotated[
        bool,
        typer.Option(
            help="Keep the vectors in OUT/work, those of a rejected index included, so that the next rebuild encodes "
            "only new images."
        ),
    ] = True,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json/--text",
            help="Print the summary as JSON or as text. `python -m index_jobs.rebuild` prints JSON by default, `dcar "
            "index build` text.",
            show_default=False,
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only, no progress.")] = False,
) -> None:
    """Encode a gallery with a checkpoint, build an index, verify it and publish it as the current version.

    Running services load the new version by themselves. An interrupted build resumes when the same command is run
    again; an unchanged gallery and checkpoint finish at once. The summary goes to stdout, progress to stderr.
    """
    from index_jobs.jobs.build import rebuild

    logging.getLogger("index_jobs").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        summary = rebuild(
            galleries, checkpoint, out, kind=kind, engine=engine, text_fields=_names(text_fields),
            group_field=group_field, memory=memory, target_recall=target_recall, workers=workers,
            batch_size=batch_size, ray=ray, keep=keep, max_failed=max_failed, max_vanished=max_vanished, device=device,
            exact=exact, pixel_cache=pixel_cache, runtime=runtime, shard_rows=shard_rows, validation=validation,
            margin=margin, force=force, notify=notify or (), keep_shards=keep_shards, progress=not quiet,
        )  # fmt: skip
    except RejectedError as error:
        _print(error.summary, as_json)
        raise
    _print(summary, as_json)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else sorted({name.strip() for name in text.split(",") if name.strip()})


def _print(summary: RebuildSummary, as_json: bool) -> None:
    """Print the summary; a job that is done does not fail because stdout is closed or full."""
    try:
        sys.stdout.write((json.dumps(asdict(summary), indent=2) if as_json else summary.to_text()) + "\n")
        sys.stdout.flush()
    except (DcarError, OSError) as error:
        sys.stderr.write(f"the summary is lost: {error}\n")
