"""Encoded galleries, and harm to files."""

from pathlib import Path
from typing import Any

import numpy as np

from dcar_core import Encoder
from dcar_core.util.arrays import Floats
from index_jobs.encoding.encode import EncodedGallery, encode_gallery
from index_jobs.gallery.scan import scan
from index_jobs.spec import BuildOptions


def encode(
    gallery: Path,
    encoders: Encoder | list[Encoder],
    work: Path,
    **options: Any,
) -> EncodedGallery:
    """Encode a gallery with small windows and shards."""
    given = BuildOptions.of(
        {"batch_size": 4, "shard_rows": 8, "progress": False, **options}
    )
    replicas = encoders if isinstance(encoders, list) else [encoders]
    return encode_gallery(scan(gallery), replicas, work, given)


def vectors_of(encoded: EncodedGallery) -> Floats:
    return np.concatenate(list(encoded.blocks()))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Remove the last bytes of a file."""
    path.write_bytes(path.read_bytes()[:-3])
