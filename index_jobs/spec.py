"""What was asked for in a build: `IndexSpec`, which a version's manifest stores, and
`BuildOptions`, how the job runs.

A field declared by `option` is an option of `dcar index build`; its help describes it.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dcar_core.util.errors import DataError
from dcar_core.util.options import option

KEEP_WRITES = 5  # versions that changes over HTTP or by a watch keep of theirs
_EXPONENTS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}  # of the prefix of a size
_SHARE = {"metavar": "SHARE", "min": 0, "max": 1}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "800MiB"; a bare number is bytes, and less
    than a megabyte is refused.
    """
    match = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?B?",
        text.strip(),
        re.IGNORECASE | re.ASCII,
    )
    size = 0
    if match:
        number, prefix, is_binary = match.groups()
        base = 1024 if is_binary else 1000
        size = int(float(number) * base ** _EXPONENTS[prefix.upper()])
    if size < 1_000_000:
        raise ValueError(
            f"{text!r} is not a size of a megabyte or more; give one such as 800MiB or"
            " 4GiB"
        )
    return size


def parse_names(text: str) -> list[str]:
    return sorted({name.strip() for name in text.split(",") if name.strip()})


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """Everything that decides the contents of a version. A build whose spec is that of
    the served version is done.

    The first four fields are of the inputs; a build fills them in. Raise ValueError if
    a number is out of range.
    """

    gallery: str = ""  # its location, or several with commas between them
    gallery_signature: str = ""  # of the names, files and metadata of the images
    fingerprint: str = ""  # of the encoder
    pairs_signature: str = ""  # of the validation pairs; "" without
    kind: str = option(
        "auto",
        "Kind of index: auto (by count, dimensions and memory), flat (exact), hnsw,"
        " ivf, ivf-pq-fp16, ivf-pq, pq, gpu-flat, gpu-ivf, or a FAISS index_factory"
        " string such as IVF1024,SQ8.",
    )
    engine: str = option(
        "faiss",
        "What searches the vectors: faiss, or another engine and its location; see"
        " docs/explanation/index-kinds.md.",
        metavar="NAME[=URI]",
    )
    memory: int | None = option(
        None,
        "Memory that the index may take, such as 800MiB or 4GiB. Building it also holds"
        " a sample of the vectors. Default: half of the machine's or container's"
        " memory.",
        metavar="SIZE",
        parser=parse_size,
    )
    target_recall: float = option(
        0.99,
        "Recall at 10, against exact search, to tune parameters to.",
        **_SHARE,
    )
    text_fields: tuple[str, ...] | None = option(
        None,
        "Metadata fields whose words hybrid searches look up, separated by commas."
        " Default: every field with text. Id, caption and category are always"
        " looked up.",
        metavar="NAMES",
        parser=parse_names,
    )
    group_field: str = option(
        "",
        "Metadata field that names the product: searches return each once.",
        metavar="NAME",
    )
    max_failed: float = option(
        0.05,
        "Share of images that may be unreadable; failed.jsonl lists them.",
        **_SHARE,
    )
    exact: bool = option(
        False, "Decode every JPEG at full size, bit for bit as open_clip does."
    )
    runtime: str = option(
        "torch",
        "Encoder runtime: auto (by what is installed and the processor), openvino,"
        " openvino-bf16, torch or cuda; see docs/how-to/choose-a-runtime.md.",
        envvar="DCAR_RUNTIME",
        command_default="auto",
    )

    def __post_init__(self) -> None:
        _require_ranges(self)
        if self.text_fields is not None:
            object.__setattr__(self, "text_fields", tuple(self.text_fields))

    @property
    def is_local(self) -> bool:
        """True if the vectors are in files of the index."""
        return "=" not in self.engine


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a build runs. Apart from the spec, nothing here changes what is published."""

    spec: IndexSpec = field(default_factory=IndexSpec)
    workers: int | None = option(
        None,
        "Decoding processes; 0: threads, without limits. Default: by the cores.",
        min=0,
    )
    batch_size: int = option(64, "Images per forward pass.", min=1)
    ray: str | None = option(
        None,
        "Encode on a Ray cluster: its address, auto for the cluster of this machine, or"
        " local to start one. --workers is then the number of its workers.",
        metavar="ADDRESS",
    )
    keep: int = option(
        3,
        "Versions to keep, with the new one. Changes over HTTP or by a watch are kept"
        " apart.",
        min=1,
    )
    max_vanished: float = option(
        0.2,
        "Share of the served images that may be gone from the gallery.",
        **_SHARE,
    )
    model: Path | None = option(
        None,
        "New directory or file of the checkpoint's backbone, if it was moved.",
        metavar="PLACE",
        exists=True,
    )
    device: str = option(
        "auto",
        "auto (every GPU, or the CPU), cpu, cuda:1, mps, or several: cuda:0,cuda:1.",
    )
    shard_rows: int = option(
        1024,
        "Images per shard, which is the work that a killed run can lose.",
        min=1,
    )
    validation: Path | None = option(
        None,
        "Data set as for `dcar train --data`. Its val pairs with images in the gallery"
        ' compare the new index with the served one and calibrate `min_score: "auto"`.'
        " Default: compare by the gallery's captions.",
        metavar="DATA",
    )
    margin: float = option(
        0.02,
        "Recall at 1 or 10, or nDCG, that the new index may lose and still pass.",
        **_SHARE,
    )
    force: bool = option(
        False,
        "Publish without a comparison, although nothing has changed or the gallery has"
        " shrunk.",
    )
    # as in the manifest; with one, `keep` is the length of the history of changes
    origin: str = ""
    progress: bool = True
    # called with a number of images once they have vectors
    on_encoded: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        _require_ranges(self)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "BuildOptions":
        """Return the options of flat names, those of the spec included. Raise DataError
        if a number is out of range.
        """
        names = {own.name for own in fields(IndexSpec)}
        try:
            spec = IndexSpec(
                **{name: value for name, value in options.items() if name in names}
            )
            return cls(
                spec=spec,
                **{name: value for name, value in options.items() if name not in names},
            )
        except ValueError as error:
            raise DataError(str(error)) from None


def _require_ranges(options: IndexSpec | BuildOptions) -> None:
    for own in fields(options):
        value = getattr(options, own.name)
        least = own.metadata.get("min")
        most = own.metadata.get("max", math.inf)
        # nor if it is not a number
        if least is not None and value is not None and not least <= value <= most:
            allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise ValueError(f"{own.name} must be {allowed}, not {value}")
