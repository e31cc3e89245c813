"""A server process and galleries for the benchmarks of the service.

- `emoji`: the bundled example, indexed once by `dcar index build`.
- `random_vit`: ViT-B/32 with random weights over 100,000 clustered vectors, with the
  size and speed of a real model. Published by the code that publishes every index.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.processes import free_port

if TYPE_CHECKING:
    from dcar_core.util.arrays import Floats

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """A `dcar serve` process on some cores, with settings as in DCAR_*."""

    def __init__(
        self,
        index: Path,
        *,
        cores: set[int] | None = None,
        **settings: Any,
    ) -> None:
        """Start it, and wait until it is ready."""
        self.port = free_port()
        environment = {
            "DCAR_LOG_LEVEL": "warning",
            "DCAR_DEVICE": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        environment |= {
            f"DCAR_{name.upper()}": str(value) for name, value in settings.items()
        }
        command = [
            sys.executable,
            "-m",
            "app.cli",
            "serve",
            "--index",
            str(index),
            "--port",
            str(self.port),
        ]

        def prepare() -> None:
            if cores:
                os.sched_setaffinity(0, cores)

        self._start = lambda: subprocess.Popen(
            command,
            env=os.environ | environment,
            preexec_fn=prepare,
        )
        self.start()

    def start(self) -> None:
        """Start the process, again if it was killed, and wait until it is ready."""
        began = time.perf_counter()
        self.process = self._start()
        while not self._ready():
            if self.process.poll() is not None or time.perf_counter() - began > 300:
                self.stop()
                raise SystemExit("the server does not become ready")
            time.sleep(0.05)
        self.ready_s = time.perf_counter() - began

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/readyz", timeout=1
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def memory_mb(self, *, shared: bool = False) -> float:
        """Return the resident memory of all its processes in millions of bytes. shared:
        count shared pages once.
        """
        total = 0
        pids = [self.process.pid]
        name = "Pss:" if shared else "Rss:"
        for pid in pids:
            with suppress(OSError, IndexError):  # it has ended
                total += int(
                    Path(f"/proc/{pid}/smaps_rollup")
                    .read_text()
                    .split(name)[1]
                    .split()[0]
                )
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += map(int, (task / "children").read_text().split())
        return total * 1024 / 1e6

    def cpu_s(self) -> float:
        """Return the seconds of processor time so far."""
        fields = (
            Path(f"/proc/{self.process.pid}/stat")
            .read_text()
            .rpartition(")")[2]
            .split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def batches(self) -> tuple[float, float]:
        """Return the number of encoded queries and of forward passes so far."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/metrics", timeout=10
        ) as answer:
            lines = answer.read().decode().splitlines()
        values = {
            line.split()[0]: float(line.split()[1])
            for line in lines
            if line.startswith("dcar_batch_size_")
        }
        return values["dcar_batch_size_sum"], values["dcar_batch_size_count"]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)


@contextmanager
def serving(index: Path, **settings: Any) -> Iterator[Server]:
    """Run a server and stop it at the end."""
    server = Server(index, **settings)
    try:
        yield server
    finally:
        server.stop()


def emoji(work: Path) -> Path:
    """Return an index of the bundled twemoji gallery."""
    return index_of(ROOT / "examples" / "emoji" / "twemoji", work / "twemoji")


def index_of(gallery: Path, out: Path) -> Path:
    """Return an index of a gallery, made anew by the model of the bundled twemoji
    gallery.
    """
    checkpoint = ROOT / "examples" / "emoji" / "twemoji" / "checkpoint"
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "index",
        "build",
        "--gallery",
        str(gallery),
    ]
    command += ["--checkpoint", str(checkpoint), "--out", str(out), "--force"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return out


def vit_checkpoint(work: Path) -> Path:
    """Return a ViT-B/32 with random weights and DCAR's prompts; made once."""
    checkpoint = work / "vit-checkpoint"
    if (checkpoint / "config.json").exists():
        return checkpoint
    from encode import random_model

    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.checkpoint import save_checkpoint
    from dcar_core.model.config import ModelConfig
    from dcar_core.model.dcar import DCAR

    base = random_model(work / "vit-base", "ViT-B-32")
    save_checkpoint(
        DCAR(load_backbone(BackboneSource(str(base))), ModelConfig()), checkpoint
    )
    return checkpoint


def random_vit(work: Path, count: int = 100_000) -> Path:
    """Return an index of `count` random vectors under a random ViT-B/32; made once."""
    from clusters import Clusters

    captions = [f"item {i}" for i in range(count)]
    draw = Clusters(count, 512).draw
    return made_index(
        work / f"vit-{count}",
        vit_checkpoint(work),
        lambda: draw(count, seed=1),
        captions,
    )


def made_index(
    out: Path,
    checkpoint: Path,
    draw: "Callable[[], Floats]",
    captions: Sequence[str],
) -> Path:
    """Return an index of drawn vectors and captions whose images do not exist; made
    once.
    """
    if (out / "CURRENT").exists():
        return out
    import numpy as np
    import pyarrow as pa

    from dcar_core import Encoder
    from dcar_core.model.checkpoint import copy_checkpoint
    from index_jobs.engines.protocol import HeldOutQueries, NewIndex, load_engine
    from index_jobs.gallery.scan import scan
    from index_jobs.index import versions
    from index_jobs.index.items import SIZE_COLUMNS, Items, write_items
    from index_jobs.index.lexical import item_texts, write_lexical
    from index_jobs.index.manifest import CHECKPOINT, ITEMS, LEXICAL, Manifest
    from index_jobs.spec import IndexSpec

    vectors = draw()
    count, dim = vectors.shape
    listed = out.with_suffix(".jsonl")
    listed.parent.mkdir(parents=True, exist_ok=True)
    with listed.open("w") as file:
        for i, caption in enumerate(captions):
            row = {
                "file_name": f"{i}.jpg",
                "id": f"{i}",
                "caption": caption,
                "category": f"c{i % 50}",
            }
            file.write(json.dumps(row) + "\n")
    gallery = scan(listed)
    table = gallery.table
    for name in SIZE_COLUMNS:
        table = table.append_column(name, pa.nulls(count, pa.int32()))
    with versions.new_version(out) as new:
        folder = new.folder
        copy_checkpoint(checkpoint, folder / CHECKPOINT)
        encoder = Encoder.load(folder / CHECKPOINT, device="cpu")
        source = {
            "gallery": gallery.location,
            "gallery_signature": gallery.content_signature,
        }
        spec = IndexSpec(**source, fingerprint=encoder.fingerprint)
        write_items(folder / ITEMS, table, np.arange(count))
        stored = NewIndex(
            name=str(out),
            folder=folder,
            version=1,
            blocks=lambda: iter([vectors]),
            count=count,
            dim=dim,
            queries=HeldOutQueries(vectors[:: 1 + count // 1000], ""),
            fields=Items(folder / ITEMS).field_table(),
        )
        created = load_engine(spec.engine).create(spec, stored)
        write_lexical(folder / LEXICAL, item_texts(table, None))
        manifest = Manifest(
            spec=spec,
            dim=dim,
            count=count,
            kind=created.kind,
            reason=created.reason,
            root=gallery.root,
            checkpoint=str(checkpoint),
            measured=created.measured,
        )
        new.publish(manifest)
    return out
