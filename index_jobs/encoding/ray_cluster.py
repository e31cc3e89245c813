"""Encoding on the machines of a Ray cluster: workers encode shards, and this process
writes them.

- Shards and their windows are those of one machine, so a job can continue with or
  without Ray.
- Checkpoint, locations and vectors travel through Ray. Every machine needs the gallery
  under one path or URL.
- Ray replaces a worker that dies, and repeats its shard.
- All workers use one runtime, plain PyTorch unless one is named: the fastest runtime
  here may not run there.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dcar_core import Encoder
from dcar_core.util.errors import DcarError, MissingExtraError
from dcar_core.util.machine import available_cores
from index_jobs.encoding.decode import decode_windows
from index_jobs.encoding.encode import (
    EncodedGallery,
    EncodedWindow,
    EncodingRun,
    encode_windows,
    load_replicas,
)
from index_jobs.gallery.locations import ImageLocation
from index_jobs.gallery.scan import Gallery
from index_jobs.spec import BuildOptions

_CORES = 4  # of a worker without a GPU


class ShardWorker:
    """Loads the model once, then encodes shards. checkpoint: the contents of its files,
    by their names.
    """

    def __init__(
        self,
        checkpoint: dict[str, bytes],
        root: str,
        device: str,
        exact: bool,
        runtime: str,
    ) -> None:
        with TemporaryDirectory() as folder:
            for name, data in checkpoint.items():
                Path(folder, name).write_bytes(data)
            self._models = load_replicas(
                Path(folder),
                device,
                exact=exact,
                runtime=runtime,
            )
        self._root = root

    def encode(self, windows: Sequence[Sequence[ImageLocation]]) -> list[EncodedWindow]:
        decoded = decode_windows(
            self._root,
            windows,
            self._models[0].preprocess,
            min(_CORES, available_cores()),
        )
        with (
            closing(decoded),
            closing(encode_windows(decoded, self._models)) as encoded,
        ):
            return list(encoded)


def encode_on_ray(
    gallery: Gallery,
    encoder: Encoder,
    checkpoint: Path,
    work: Path,
    options: BuildOptions,
) -> EncodedGallery:
    """Encode as `encode_gallery` does, on a Ray cluster. Its workers load the encoder
    from the checkpoint.
    """
    run = EncodingRun(gallery, encoder, work, options)
    if not run.todo:
        return run.complete(())
    ray = _connect(options.ray)
    files = {
        path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()
    }
    try:
        task = (
            ray.put(files),
            gallery.root,
            options.device,
            options.spec.exact,
            encoder.runtime.name,
        )
        with redirect_stdout(sys.stderr):  # stdout is for the summary
            return run.complete(_encode_shards(ray, run, options, task))
    except ray.exceptions.RayError as error:
        cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        raise DcarError(
            f"encoding on Ray failed: {cause}; the same command continues where it"
            " stopped"
        ) from error
    finally:
        ray.shutdown()


def _connect(address: str | None) -> Any:
    os.environ.update(
        {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"} | os.environ
    )
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("encoding on Ray", "ray") from error
    # no other machine can reach it
    local_only: Any = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local_only if address == "local" else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DcarError(
            f"no Ray cluster at {address!r}: {error}; start one with `ray start --head`"
        ) from error
    return ray


def _encode_shards(
    ray: Any,
    run: EncodingRun,
    options: BuildOptions,
    task: Any,
) -> Iterator[tuple[int, Any]]:
    """Yield the shards as workers complete them. task: the arguments of
    `ShardWorker`.
    """
    room = ray.cluster_resources()
    gpus = int(room.get("GPU", 0)) if options.device in {"auto", "cuda"} else 0
    count = options.workers or gpus or max(1, int(room.get("CPU", 1)) // _CORES)
    if gpus:
        share = {"num_gpus": 1}
    else:
        share = {"num_cpus": max(1, int(room.get("CPU", 1)) // count)}
    kind = ray.remote(ShardWorker).options(
        max_restarts=-1,
        max_task_retries=-1,
        **share,
    )
    workers = [kind.remote(*task) for _ in range(min(count, len(run.todo)))]
    pending: dict[Any, tuple[Any, int | None]] = {
        worker.__ray_ready__.remote(): (worker, None) for worker in workers
    }
    todo = iter(run.todo)
    left = len(run.todo)
    while left:
        (done,), _ = ray.wait([*pending])
        worker, number = pending.pop(done)
        windows = ray.get(done)
        if (following := next(todo, None)) is not None:
            pending[worker.encode.remote(run.windows(following))] = (
                worker,
                following,
            )
        if number is not None:
            left -= 1
            yield number, windows
