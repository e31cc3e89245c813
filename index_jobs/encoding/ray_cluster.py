"""Encoding on Ray Data, when one machine is outgrown: the same shards, made by many workers.

- A worker makes whole shards, out of the windows that one machine would take, and leaves them where one machine would:
  resuming, checksums and everything after are the same, and a job may go on with or without Ray.
- A worker that dies is Ray's to replace; a shard counts only when it is whole, so what it had begun is made again.
- All workers encode with one runtime, plain PyTorch where none is named: what is fastest here may not run there.
- Every machine sees the output directory under one path, as on a shared file system; the gallery too, or by its URL.
- Workers read where pictures lie from one memory-mapped file; nothing but shard numbers travels through Ray.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dcar_core.util import cpu_features
from dcar_core.util.errors import DcarError, MissingExtraError
from dcar_core.util.files import atomic_writer
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.devices import ImageEncoder, encode_windows, load_replicas
from index_jobs.encoding.encode import save_shard, split_windows
from index_jobs.encoding.encoding_state import LOCATION_COLUMNS, EncodedGallery, EncodingState, image_locations
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.encoding.shards import Shard, ShardStore
from index_jobs.gallery.scan import Gallery
from index_jobs.options import RebuildOptions

PLACES = "places.arrow"
_CORES = 4  # of a worker without a GPU
_BLOCKS = 10_000  # of shard numbers; a block is what Ray starts anew when a worker dies
_BLOCK_BYTES = 1_000_000  # of shard numbers; what Ray keeps room for
_STORE_BYTES = 200_000_000  # of Ray's own object store on this machine, which sees shard numbers alone


@dataclass(frozen=True)
class Task:
    """What a worker needs to know; sent once."""

    store: ShardStore
    root: str
    checkpoint: Path
    fingerprint: str
    device: str
    runtime: str
    exact: bool
    batch_size: int
    pixel_cache: Path | None


class Worker:
    """Loads the model once, then makes one shard after the other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.lanes = load_replicas(task.checkpoint, task.device, exact=task.exact, runtime=task.runtime)
        if self.lanes[0].fingerprint != task.fingerprint:
            raise DcarError(f"a worker loaded another model from {task.checkpoint}; is it the same file everywhere?")
        with pa.memory_map(str(task.store.path / PLACES)) as source:
            self.places = pa.ipc.open_file(source).read_all()
        self.cache = PixelCache.open(task.pixel_cache, self.lanes[0].preprocess) if task.pixel_cache else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the shards of batch["shard"]; gives back the numbers of those that are there."""
        for number in batch["shard"].tolist():
            if self.task.store.load(number) is None:
                self._make(number)
        return batch

    def _make(self, number: int) -> None:
        store = self.task.store
        places = image_locations(self.places, store.span(number))
        windows = split_windows(self.task.root, places, self.task.batch_size)
        decoded = decode_windows(windows, self.lanes[0].preprocess, 0, self.cache)
        with closing(decoded), closing(encode_windows(decoded, self.lanes)) as vectors:
            save_shard(store, number, places, vectors)


def encode_on_ray(
    gallery: Gallery,
    encoder: ImageEncoder,
    work: Path,
    *,
    address: str,
    checkpoint: Path,
    device: str = "auto",
    runtime: str = "torch",
    exact: bool = False,
    workers: int | None = None,
    batch_size: int = RebuildOptions.batch_size,
    shard_rows: int = RebuildOptions.shard_rows,
    max_failed: float = RebuildOptions.max_failed,
    progress: bool = True,
    pixel_cache: Path | None = None,
) -> EncodedGallery:
    """Encode every picture that has no vector yet, on the machines of a Ray cluster.

    Args:
        encoder: the model, here; not used to encode.
        address: of the cluster, "auto" for the one that this machine is part of, "local" to start one here.
        checkpoint: the same model, for the workers.
        device: "auto" and "cuda" give each worker a GPU where the cluster has any.
        runtime: by name, what every worker encodes with.
        workers: how many; by default one for each GPU, or one for four cores.
        work, exact, batch_size, shard_rows, max_failed, progress: as `encode` and `load_replicas` take them.

    Raises:
        MissingExtraError: Ray is not installed.
        DcarError: the cluster cannot be reached, or a worker failed by an error of its own.
        DataError, ArtifactError, OSError: as `encode`.
    """
    job = EncodingState(gallery, encoder, work, runtime=runtime, batch_size=batch_size, shard_rows=shard_rows,
                   max_failed=max_failed, progress=progress, whole=True)  # fmt: skip
    if job.todo:
        _write_places(job.store.path / PLACES, gallery.table)
        task = Task(job.store, gallery.root, checkpoint.absolute(), encoder.fingerprint, device, runtime, exact,
                    batch_size, pixel_cache and pixel_cache.absolute())  # fmt: skip
        with _ray(address, workers or 1), job.bar() as bar:
            for number in _made(job.todo, task, workers):
                job.shards[number] = shard = _load(job.store, number)
                job.guard.add(shard.failed)
                job.advance(bar, shard.stop - shard.start)
    return job.encoded()


def _made(todo: list[int], task: Task, workers: int | None) -> Iterator[int]:
    """The numbers of shards as they are finished, in any order."""
    import ray
    import ray.data

    have = ray.cluster_resources()
    cores, gpus = int(have.get("CPU", 1)), int(have.get("GPU", 0)) if task.device in {"auto", "cuda"} else 0
    size = workers or gpus or max(1, cores // _CORES)
    share = {"num_gpus": 1} if gpus else {"num_cpus": max(1, (cores - 1) // size)}
    numbers = ray.data.from_items([{"shard": number} for number in todo], override_num_blocks=min(len(todo), _BLOCKS))
    made = numbers.map_batches(
        Worker, fn_constructor_args=(task,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=size), **share
    )
    try:
        for batch in made.iter_batches(batch_size=1, prefetch_batches=0):
            yield from batch["shard"].tolist()
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise DcarError(
            f"encoding on Ray failed: {str(cause).strip().splitlines()[-1]}; whole shards are kept, and the "
            f"same command goes on where it stopped"
        ) from error


def _load(store: ShardStore, number: int) -> Shard:
    shard = store.load(number)
    if shard is None:
        raise DcarError(
            f"a worker has made shard {number}, but {store.path} does not have it; every machine of the cluster must "
            f"see that directory under this path"
        )
    return shard


def _write_places(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    places = table.select(LOCATION_COLUMNS)
    with atomic_writer(path) as file, pa.ipc.new_file(file, places.schema) as writer:
        writer.write_table(places)


@contextmanager
def _ray(address: str, workers: int) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a job tells nobody outside of it
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the rest is in Ray's log files
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("encoding on Ray", "ray") from error
    own: dict[str, Any] = {}
    if address == "local":
        cores = 1 + max(workers, cpu_features.available_cores())  # one for Ray Data itself
        own = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        own["_node_ip_address"] = "127.0.0.1"  # nobody else is to reach it
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # Ray, and what it starts, write remarks to stdout, which is the summary's alone
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DcarError(f"no Ray cluster at {address!r}: {error}; start one with `ray start --head`") from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = _BLOCK_BYTES
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
