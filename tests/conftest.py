"""A tiny real CLIP, checkpoints on it, and a small gallery: everything else in the
tests is the real thing too.
"""

import atexit
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

# A tiny model gains nothing from several threads, and loses much to them where other
# processes run.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from dcar_core import Encoder
from dcar_core.model.methods import find_method
from index_jobs.jobs.build import RebuildSummary
from index_jobs.rebuild import rebuild
from tests.support import parts
from tests.support.images import draw
from tests.support.random_clip import checkpoint_on, write_model
from tests.support.versions import Build

torch.set_num_threads(1)

# A run syncs thousands of small files, which costs nothing in memory.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 6 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("square", "circle", "triangle", "cross")
# Keep exported models out of the user's cache. Few tests are about the runtime `auto`.
for name in [
    each
    for each in os.environ
    if each.startswith("DCAR_") and each not in ("DCAR_REQUIRE_ALL", "DCAR_RUNTIME")
]:
    del os.environ[name]  # of the shell; a service refuses names that it does not know
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dcar-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("DCAR_RUNTIME", "torch")
# Every httpx client reads all trusted certificates, which takes 10 ms; servers of tests
# speak plain HTTP.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.environ["XDG_CACHE_HOME"]
# OpenVINO works without this package, which reports every conversion to its makers.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    parts.skip_without_parts(items)
    # the longest first, so that none is last
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell for each missing part how many tests it took, and what brings it."""
    skipped = terminalreporter.stats.get("skipped", [])
    for line in parts.summary(
        [report.longrepr[2].removeprefix("Skipped: ") for report in skipped]
    ):
        terminalreporter.write_line(line)


def pytest_collection_finish() -> None:
    """Exempt what was imported and collected, which stays, from every later search for
    garbage.
    """
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """Undo levels of logs that a command has set, and exempt what a module has
    imported, once it has ended.
    """
    yield
    for package in ("app", "dcar_core", "index_jobs"):
        logging.getLogger(package).setLevel(logging.NOTSET)
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run `async def` tests on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a randomly initialised 32 px CLIP in open_clip's form."""
    return write_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same towers in a class of open_clip's that OpenVINO runs by an export
    alone.
    """
    return write_model(tmp_path_factory.mktemp("exported") / "base", custom_text=True)


def _checkpoint(
    model: Path,
    path: Path,
    seed: int,
    method: str = "dcar",
    noise: float = 0.02,
) -> Path:
    return checkpoint_on(model, find_method(method).config, path, seed, noise)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: Path) -> Path:
    return _checkpoint(tiny_model, tiny_model.parent / "checkpoint", 1)


@pytest.fixture(scope="session")
def exported_checkpoint(exported_model: Path) -> Path:
    return _checkpoint(exported_model, exported_model.parent / "checkpoint", 1)


@pytest.fixture(scope="session")
def other_checkpoint(tiny_model: Path) -> Path:
    """The same backbone, other trainables: another fingerprint."""
    return _checkpoint(tiny_model, tiny_model.parent / "other", 2)


@pytest.fixture(scope="session")
def reranking_checkpoint(tiny_model: Path) -> Path:
    """The same backbone with a second stage."""
    return _checkpoint(
        tiny_model,
        tiny_model.parent / "reranking",
        3,
        "query-prompts",
        noise=0.1,
    )


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def exports(exported_checkpoint: Path, run_folder: Path) -> Path:
    """OpenVINO's graphs of `exported_model`, exported once for all processes of a run:
    see `copy_exports`.
    """
    cache = run_folder / "runtime-cache"
    # waits while another exports them
    Encoder.load(exported_checkpoint, device="cpu", runtime="openvino", cache=cache)
    return cache / "exports"


@pytest.fixture(scope="session")
def tiny_gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw 24 images, in one folder per shape, with a metadata.jsonl."""
    root = tmp_path_factory.mktemp("gallery")
    lines = []
    for shape in SHAPES:
        (root / shape).mkdir()
        for color in COLORS:
            name = f"{shape}/{color}.png"
            draw(color, shape).save(root / name)
            lines.append(
                {
                    "file_name": name,
                    "caption": f"a {color} {shape}",
                    "category": shape,
                    "color": color,
                }
            )
    (root / "metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return root


@pytest.fixture(scope="session")
def tiny_data(tiny_gallery: Path) -> Path:
    """Write FDRD annotations of the gallery: 12 pairs for training, 6 for validation
    and 6 for testing.
    """
    rows = [
        json.loads(line)
        for line in (tiny_gallery / "metadata.jsonl").read_text().splitlines()
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    for split, part in (
        ("train", order[:12]),
        ("val", order[12:18]),
        ("test", order[18:]),
    ):
        content = {}
        for i in part:
            row = rows[i]
            wrong = [
                f"a {color} {row['category']}"
                for color in COLORS[:3]
                if color != row["color"]
            ]
            content[f"{row['category']}_{i}"] = {
                "file_name": row["file_name"],
                "file_path": f"/somewhere/else/{row['file_name']}",
                "positive": row["caption"],
                "negative": wrong,
                "class_name": row["category"],
            }
        (tiny_gallery / f"{split}.json").write_text(json.dumps(content))
    return tiny_gallery


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Draw two categories with two images each."""
    root = tmp_path / "photos"
    for name in ("red_fox/1.png", "red_fox/2.png", "owl/1.png", "owl/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw(
            "red" if "fox" in name else "blue", "circle" if "1" in name else "cross"
        ).save(root / name)
    return root


@pytest.fixture
def build(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> Build:
    """Build `tmp_path / "index"`, by default of the small gallery with the small
    checkpoint.
    """

    def run(
        gallery: Any = tiny_gallery,
        checkpoint: Path = tiny_checkpoint,
        out: Path = tmp_path / "index",
        **options: Any,
    ) -> RebuildSummary:
        return rebuild(gallery, checkpoint, out, progress=False, **options)

    return run
