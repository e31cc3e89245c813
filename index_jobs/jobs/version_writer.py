"""What goes into a version besides the model: vectors in FAISS or Milvus, measured, and the items.

Beforehand, whether the disk has room for it all.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcar_core.util.errors import DcarError
from index_jobs.building import kinds
from index_jobs.building.build import build
from index_jobs.building.kinds import Choice
from index_jobs.building.tuning import MAX_QUERIES, Queries, Tuning, own_queries
from index_jobs.encoding.encoding_state import EncodedGallery
from index_jobs.encoding.failures import write_duplicates, write_failed
from index_jobs.encoding.shards import ShardStore
from index_jobs.gallery.scan import Gallery
from index_jobs.options import RebuildOptions
from index_jobs.store import milvus
from index_jobs.store.faiss_index import write_faiss
from index_jobs.store.items import write_items
from index_jobs.store.manifest import DUPLICATES, FAILED, ITEMS, VECTORS
from index_jobs.store.publish import next_version

if TYPE_CHECKING:
    import pyarrow as pa

    from dcar_core import Encoder

logger = logging.getLogger(__name__)

Measured = tuple[Choice, dict[str, Any]]


def choose(options: RebuildOptions, count: int, dim: int, gpu_memory: int) -> list[Choice]:
    """What may be built, the best first; see `kinds.choose`.

    Raises:
        DataError: FAISS or Milvus does not know the kind.
        MissingExtraError: a GPU kind without a GPU.
    """
    if not options.milvus:
        return kinds.choose(options.kind, count, dim, memory=options.memory, gpu_memory=gpu_memory)
    milvus.require_kind(options.kind)
    return [Choice(f"milvus {options.kind}", f"asked for: {options.kind} in Milvus")]


def require_room(out: Path, gallery: Gallery, store: ShardStore, choice: Choice) -> None:
    """Refuse what the disk cannot hold, before hours are spent; the least that it will take is compared.

    Raises:
        DcarError: there is less room; the message says how much it takes.
    """
    vectors = 4 * store.dim * (len(gallery) - store.stored_rows())
    needed = vectors + choice.bytes + gallery.table.nbytes
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DcarError(
            f"the index {out} takes at least {needed / 1e9:.1f} GB more, of which {vectors / 1e9:.1f} are vectors that "
            f"the next rebuild can use, but its disk has {free / 1e9:.1f} GB left; make room, or give another --out"
        )


def stage_vectors(staging: Path, out: Path, options: RebuildOptions, encoder: "Encoder", encoded: EncodedGallery,
                  choices: Sequence[Choice], queries: Queries | None) -> Measured:  # fmt: skip
    """Write the vectors into the staged version; what they became, and what was measured.

    Raises:
        DataError: the kind needs more vectors than there are.
        ArtifactError: Milvus cannot be reached.
        OSError: the disk is full or cannot be written.
    """
    target, dim, blocks = options.target_recall, encoder.dim, encoded.blocks
    if not options.milvus:
        built = build(blocks, len(encoded), dim, choices, queries, target=target)
        write_faiss(built.index, staging / VECTORS)
        return built.choice, built.measured | {"bytes": (staging / VECTORS).stat().st_size}
    number = next_version(out)
    place = milvus.create_collection(options.milvus, out, number, encoder.fingerprint, options.kind, blocks, dim)
    place.write(staging / milvus.MILVUS)
    tuning = Tuning(blocks, queries or own_queries(blocks, len(encoded)), target=target)
    return choices[0], tuning.measure(milvus.MilvusIndex(place))


def stage_items(staging: Path, gallery: Gallery, encoded: EncodedGallery) -> None:
    """Write items, failures and duplicates.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    write_items(staging / ITEMS, gallery.table, encoded.rows())
    write_failed(staging / FAILED, gallery, encoded.failed)
    duplicates = encoded.duplicates()
    write_duplicates(staging / DUPLICATES, gallery, duplicates)
    if duplicates:
        logger.info("%d pictures are the same as earlier ones; %s lists them", len(duplicates), DUPLICATES)


def caption_queries(table: "pa.Table", encoder: "Encoder") -> Queries | None:
    """Captions of a table of items as held-out queries, evenly spread, when half of the pictures have one."""
    step = max(1, -(-table.num_rows // MAX_QUERIES))
    column = table["caption"]  # one by one, since `take` joins the chunks of text first, which fails at 2 GiB
    picked = [column[row].as_py() for row in range(0, table.num_rows, step)]
    captions = [caption for caption in picked if caption]
    if 2 * len(captions) < len(picked):
        return None
    return Queries(encoder.encode_text(captions), "captions", np.full(len(captions), -1))
