"""The command line of `python -m index_jobs.rebuild`, written to teach."""

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any

from index_jobs.options import Options
from index_jobs.store.notify import KINDS

EXIT_CODES = """exit codes:
  0  published, or nothing had changed (the summary says "reused": true)
  1  the output cannot be written, an index or shard is corrupted, or another failure
  2  wrong usage
  3  the gallery cannot be used, or too many of its pictures are broken
  4  the checkpoint or its model cannot be loaded, or the model of the index that is served
  5  another job is writing to the same index
  6  not published: it ranks worse than the index that is served (the summary's "gate" says by how much)
130  interrupted; the same command goes on where it stopped"""


def parser() -> argparse.ArgumentParser:
    """The parser; its values are the arguments of `rebuild`, and `quiet`."""
    command = argparse.ArgumentParser(
        prog="python -m index_jobs.rebuild",
        description="Encode a gallery with a checkpoint, build a FAISS index, verify it and publish it as the current "
        "version. A running service takes it over by itself. Killed or interrupted, the same command goes on where it "
        "stopped; with nothing changed, it ends at once. Prints a JSON summary on stdout, progress on stderr.",
        epilog="example:\n  python -m index_jobs.rebuild --gallery pictures/ --checkpoint runs/best --out index\n\n"
        + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add(
        "--gallery", required=True, metavar="PLACE",
        help="a folder of pictures and tars, optionally with metadata.jsonl; or one uncompressed .tar; or a .jsonl, "
        ".csv or .parquet list with a column file_name of paths or URLs. A path, or a URL that fsspec reads: "
        "s3://, gs://, https://, ..",
    )  # fmt: skip
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `dcar train` or `dcar zero-shot --out DIR` wrote",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the index directory; made when it is missing")
    add(
        "--kind", default=Options.kind,
        help="auto (by count, dimensions, memory and device), flat (exact), pq, hnsw, hnsw-sq8, ivf, ivf-sq8, "
        "ivf-pq, ivf-rabitq, gpu-flat, gpu-ivf, gpu-cagra, or a FAISS index_factory string such as IVF1024,SQ8 "
        "(default: %(default)s)",
    )  # fmt: skip
    add(
        "--milvus", metavar="URI",
        help="put the vectors into this Milvus (kinds auto, flat, hnsw), with the token in DCAR_MILVUS_TOKEN; a file "
        "is Milvus Lite (default: a FAISS file)",
    )  # fmt: skip
    add(
        "--memory", type=_bytes, metavar="SIZE",
        help="what the index may take, such as 800MiB or 4GiB (default: half of the machine's or container's memory)",
    )  # fmt: skip
    add(
        "--target-recall", type=_share, default=Options.target_recall, metavar="SHARE",
        help="recall at 10, against exact search, that search parameters are tuned for (default: %(default)s)",
    )  # fmt: skip
    add(
        "--workers", type=_at_least(0), metavar="N",
        help="decoding processes; 0 decodes in threads of the job (default: all cores but one; 0 for a small gallery "
        "or up to 4 cores)",
    )  # fmt: skip
    add(
        "--batch-size", type=_at_least(1), default=Options.batch_size, metavar="N",
        help="pictures a forward pass (default: %(default)s)",
    )  # fmt: skip
    add(
        "--ray", metavar="ADDRESS",
        help="encode on a Ray cluster: its address, auto for the one this machine is part of, local to start one here; "
        "--workers is then the number of its workers",
    )  # fmt: skip
    add(
        "--keep", type=_at_least(1), default=Options.keep, metavar="N",
        help="versions kept for rollback (default: %(default)s)",
    )  # fmt: skip
    add(
        "--max-failed", type=_share, default=Options.max_failed, metavar="SHARE",
        help="how much of the gallery may be unreadable, 0 to 1; such pictures are listed in the version's "
        "failed.jsonl, each with its reason and its kind: reading or picture (default: %(default)s)",
    )  # fmt: skip
    add(
        "--device", default=Options.device,
        help="auto (every GPU, or the CPU), cpu, cuda:1, or several: cuda:0,cuda:1 (default: %(default)s)",
    )  # fmt: skip
    add("--exact", action="store_true", help="decode every JPEG whole, as open_clip does it, bit for bit")
    add(
        "--pixel-cache", type=Path, metavar="DIR",
        help="keep decoded pictures there, for the next rebuild; 150 KB a picture at 224 pixels",
    )  # fmt: skip
    add(
        "--runtime", default=os.environ.get("DCAR_RUNTIME") or "auto",
        help="what runs the encoder: auto (the fastest that is right here, measured once), torch, openvino-bf16, ..; "
        "with auto a job that has begun goes on with the one that began it, and Ray's workers take torch "
        "(default: %(default)s, from DCAR_RUNTIME)",
    )  # fmt: skip
    add(
        "--shard-rows", type=_at_least(1), default=Options.shard_rows, metavar="N",
        help="pictures in a shard, the most that a killed run loses (default: %(default)s)",
    )  # fmt: skip
    add(
        "--validation", type=Path, metavar="DATA",
        help="a data set as `dcar train --data` takes it: its val pairs whose pictures are in the gallery (the same "
        "files, or in a gallery elsewhere the same names) compare the new index with the one that is served, and give "
        "the cut-off for `min_score: \"auto\"` (default: captions of "
        "the gallery, no cut-off)",
    )  # fmt: skip
    add(
        "--margin", type=_share, default=Options.margin, metavar="SHARE",
        help="how much lower recall at 1 or at 10 may be than the served index's (default: %(default)s)",
    )  # fmt: skip
    add(
        "--force", action="store_true",
        help="publish although nothing has changed, or although it ranks worse or cannot be compared; pictures that "
        "could not be read are tried again",
    )  # fmt: skip
    add(
        "--notify", action="append", type=_service, default=[], metavar="URL",
        help="tell services, again for several: redis://HOST tells all that use this Redis, http://HOST:PORT one, with "
        "the key in DCAR_ADMIN_KEY (default: none; services look for new versions themselves)",
    )  # fmt: skip
    add(
        "--keep-shards", action=argparse.BooleanOptionalAction, default=True,
        help="keep the vectors in DIR/work, also of what was not published, so that another --kind needs no encoding",
    )  # fmt: skip
    add("--quiet", action="store_true", help="no progress on stderr, errors alone")
    return command


def _service(text: str) -> str:
    if not text.startswith(KINDS):
        raise argparse.ArgumentTypeError(f"must begin with one of {', '.join(KINDS)}, not {text!r}")
    return text


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_size(text: str) -> int:
    """ "800MiB" -> bytes; a bare number is bytes.

    Raises:
        ValueError: no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no size; give one such as 800MiB or 4GiB")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}")
        return value

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, not {text}")
    return value
