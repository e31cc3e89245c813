"""Encoding on Ray Data across machines: the same shards, made by many workers.

- A worker makes complete shards from the windows that one machine would use, and stores them in the same folder.
  Resuming, checksums and every later step are the same, so a job can continue with or without Ray.
- Ray replaces a worker that dies. A shard counts only when it is complete, so an unfinished one is made again.
- All workers use one runtime, plain PyTorch unless one is named: the fastest runtime here may not run there.
- Every machine sees the output directory under one path, as on a shared file system; likewise the gallery, or its URL.
- Of an index in an object store, machines exchange shards, locations and checkpoint through the store instead.
- Workers read the locations from one memory-mapped file. Only shard numbers travel through Ray.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from dcar_core import Encoder
from dcar_core.model.checkpoint import PORTABLE
from dcar_core.util.errors import DcarError, MissingExtraError
from dcar_core.util.files import atomic_writer
from dcar_core.util.machine import available_cores
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.devices import encode_windows, load_replicas
from index_jobs.encoding.encode import LOCATION_COLUMNS, EncodedGallery, EncodingState, save_shard, split_windows
from index_jobs.encoding.shards import ShardStore
from index_jobs.gallery.scan import Gallery
from index_jobs.spec import BuildOptions
from index_jobs.store.location import store_of
from index_jobs.store.manifest import CHECKPOINT
from index_jobs.store.remote import IndexStore

_LOCATIONS = "locations.arrow"
_CORES_PER_WORKER = 4  # without a GPU
_MAX_BLOCKS = 10_000  # of shard numbers; Ray restarts a block when a worker dies
_BLOCK_BYTES = 1_000_000  # of shard numbers; Ray reserves this much
_OBJECT_STORE_BYTES = 200_000_000  # of Ray on this machine, which holds only shard numbers


class ShardWorker:
    """Loads the model once, then makes shards."""

    def __init__(
        self,
        store: ShardStore,
        root: str,
        checkpoint: Path,
        image_key: str,
        runtime: str,
        options: BuildOptions,
        url: str = "",
        shared: Sequence[str] = (),
    ) -> None:
        """url, shared: the object store of the index, and the names of files in it; "" for a shared file system."""
        self.remote = None
        if url:
            self.scratch = tempfile.TemporaryDirectory(prefix="dcar-ray-")
            self.remote, store.path = IndexStore(Path(self.scratch.name), url), Path(self.scratch.name, store.path.name)
            checkpoint = store.path / CHECKPOINT
            for name in shared:
                self.remote.receive(f"{store.path.name}/{name}", store.path / name)
        self.store, self.root, self.options = store, root, options
        self.replicas = load_replicas(checkpoint, options.device, exact=options.spec.exact, runtime=runtime)
        if self.replicas[0].image_key != image_key:
            raise DcarError(f"a worker loaded another model from {checkpoint}; give every machine the same checkpoint")
        with pa.memory_map(str(store.path / _LOCATIONS)) as source:
            self.table = pa.ipc.open_file(source).read_all()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the shards of batch["shard"] and return the batch."""
        workers = min(_CORES_PER_WORKER, available_cores())
        for number in batch["shard"].tolist():
            path = self.store.path_of(number)
            name = f"{self.store.path.name}/{path.name}"
            if self.remote is not None:
                self.remote.receive(name, path)
            shard = self.store.load(number)
            if shard.missing:
                windows = split_windows(shard, self.root, self.table, self.options.batch_size)
                decoded = decode_windows(self.root, windows, self.replicas[0].preprocess, workers)
                with closing(decoded), closing(encode_windows(decoded, self.replicas)) as encoded:
                    save_shard(self.store, number, encoded)
            if self.remote is not None:
                self.remote.share(name, path)
                path.unlink()
        return batch


def encode_on_ray(
    gallery: Gallery, encoder: Encoder, work: Path, options: BuildOptions, *, checkpoint: Path, runtime: str
) -> EncodedGallery:
    """Encode every image that has no vector yet on the machines of the Ray cluster `options.ray`.

    Args:
        encoder: the model on this machine, which does not encode.
        options: the devices "auto" and "cuda" give each worker a GPU if the cluster has any; by default there is one
            worker per GPU, or one per four cores.
        checkpoint: the same model, for the workers.
        runtime: the name of the runtime that every worker uses.
    """
    state = EncodingState(gallery, encoder, work, options, runtime)
    if state.todo:
        write_locations(state.store, gallery.table)
        task: tuple[Any, ...] = (state.store, gallery.root, checkpoint.absolute(), encoder.image_key, runtime, options)
        remote = store_of(work.parent)
        with ExitStack() as stack:
            if remote is not None:
                inputs = shared_inputs(remote, state.store, checkpoint, state.todo, runtime)
                task += (remote.url, stack.enter_context(inputs))
            stack.enter_context(_ray_session(options.ray or "auto", options.workers or 1))
            stack.enter_context(state.bar)
            for number in _make_shards(state.todo, task, options):
                if remote is not None:
                    path = state.store.path_of(number)
                    remote.receive(f"{state.store.path.name}/{path.name}", path)
                shard, known = state.store.load(number), state.shards[number]
                if shard.missing:
                    raise DcarError(
                        f"a worker has made shard {number}, but {state.store.path} does not have it; every machine of "
                        f"the cluster must see that directory under this path"
                    )
                state.shards[number] = shard
                state.add_failed([failure for failure in shard.failed if failure not in known.failed])
                state.advance(len(known.missing))
    return state.result()


@contextmanager
def shared_inputs(
    remote: IndexStore, store: ShardStore, checkpoint: Path, todo: Sequence[int], runtime: str
) -> Iterator[list[str]]:
    """Put what workers need into the object store, and yield the names of the files that all of them need.

    At the end, of a failed job too, everything that its machines have exchanged is deleted.
    """
    needed = [path for path in checkpoint.rglob("*") if runtime != "torch" or path.parent.name != PORTABLE]
    files = {f"{CHECKPOINT}/{path.relative_to(checkpoint)}": path for path in needed if path.is_file()}
    files[_LOCATIONS] = store.path / _LOCATIONS
    begun = {path.name: path for path in map(store.path_of, todo) if path.exists()}
    try:
        for name, path in (files | begun).items():
            remote.share(f"{store.path.name}/{name}", path)
        yield [*files]
    finally:
        remote.end_sharing(store.path.name)


def _make_shards(todo: list[int], task: tuple[Any, ...], options: BuildOptions) -> Iterator[int]:
    """Yield the numbers of shards as workers complete them, in any order. task: the arguments of `ShardWorker`."""
    import ray
    import ray.data

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if options.device in {"auto", "cuda"} else 0
    cores = int(resources.get("CPU", 1))
    size = options.workers or gpus or max(1, cores // _CORES_PER_WORKER)
    share = {"num_gpus": 1} if gpus else {"num_cpus": max(1, (cores - 1) // size)}
    blocks = min(len(todo), _MAX_BLOCKS)
    numbers = ray.data.from_items([{"shard": number} for number in todo], override_num_blocks=blocks)
    shards = numbers.map_batches(
        ShardWorker, fn_constructor_args=task, batch_size=1, compute=ray.data.ActorPoolStrategy(size=size), **share
    )
    try:
        for batch in shards.iter_batches(batch_size=1, prefetch_batches=0):
            yield from batch["shard"].tolist()
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise DcarError(
            f"encoding on Ray failed: {str(cause).strip().splitlines()[-1]}; complete shards are kept, and the same "
            f"command continues where it stopped"
        ) from error


def write_locations(store: ShardStore, table: pa.Table) -> None:
    """Write the file that workers read the images' locations from."""
    store.path.mkdir(parents=True, exist_ok=True)
    locations = table.select(LOCATION_COLUMNS)
    with atomic_writer(store.path / _LOCATIONS) as file, pa.ipc.new_file(file, locations.schema) as writer:
        writer.write_table(locations)


@contextmanager
def _ray_session(address: str, workers: int) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no statistics leave the machine
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's log files have the rest
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("encoding on Ray", "ray") from error
    local: dict[str, Any] = {}
    if address == "local":
        cores = 1 + max(workers, available_cores())  # one for Ray Data itself
        local = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        local["_node_ip_address"] = "127.0.0.1"  # no other machine can reach it
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # Ray writes remarks to stdout, which is for the summary
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
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
