"""Options of a rebuild, with their defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RebuildOptions:
    """Options of a rebuild.

    kind: "auto", a name of `index_jobs.building.kinds`, or a FAISS index_factory string.
    milvus: URI of the Milvus that stores the vectors, or a Milvus Lite file; None for a FAISS file.
    text_fields: metadata fields whose words hybrid searches look up, besides id, caption and category; None for every
        field with text.
    group_field: metadata field that names the product of an item: searches return each product once.
    memory: bytes that the index may take; None for half of the memory of the machine or container.
    target_recall: recall at 10 against exact search that search parameters are tuned to.
    workers: decoding processes; 0 for threads of this process, None to choose by gallery size.
    batch_size: images per forward pass.
    keep: versions to keep, the new one included.
    max_failed: share of images that may be unreadable, 0 to 1.
    validation: a data set; its val pairs compare the new index with the served one and calibrate `min_score: "auto"`.
        None compares by the gallery's captions and calibrates nothing.
    margin: recall that the new index may lose against the served one.
    force: publish although nothing has changed, or although the new index ranks worse or cannot be compared. Images
        that could not be read are tried again.
    notify: URLs of services to notify; see `index_jobs.jobs.notify`.
    keep_shards: keep the vectors in `out/work` for the next rebuild, those of a rejected index included.
    shard_rows: images per shard, which is the work that a killed run can lose.
    device: "auto" (every GPU, or the CPU), "cpu", "cuda:1", "cuda:0,cuda:1", ...
    exact: decode images bit for bit as open_clip does, instead of decoding JPEGs at reduced scale.
    pixel_cache: directory that keeps decoded images for the next rebuild.
    ray: address of a Ray cluster to encode on, "auto" or "local"; see `index_jobs.encoding.ray_cluster`.
    runtime: encoder runtime: "torch", "auto" (the fastest correct one on this machine), or another name of
        docs/how-to/choose-a-runtime.md.
    progress: show a progress bar on stderr.
    """

    kind: str = "auto"
    milvus: str | None = None
    text_fields: Sequence[str] | None = None
    group_field: str = ""
    memory: int | None = None
    target_recall: float = 0.99
    workers: int | None = None
    batch_size: int = 64
    keep: int = 3
    max_failed: float = 0.05
    validation: Path | None = None
    margin: float = 0.02
    force: bool = False
    notify: Sequence[str] = ()
    keep_shards: bool = True
    shard_rows: int = 1024
    device: str = "auto"
    exact: bool = False
    pixel_cache: Path | None = None
    ray: str | None = None
    runtime: str = "torch"
    progress: bool = True
