"""Encoding on a real Ray of two workers on this machine, one of which is killed in the middle."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar_core.util.errors import MissingExtraError
from index_jobs.index.versions import open_current, verify_index
from index_jobs.rebuild import rebuild
from tests.support.commands import Command
from tests.support.files import write_file
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import children_of, is_alive

IMAGES = 40  # beside a broken one


def encoders_of(pid: int) -> list[int]:
    """Ray's processes that encode, by the title that Ray gives them."""
    titles = dict.fromkeys(children_of(pid), b"")
    for child in titles:
        with suppress(OSError):
            titles[child] = Path(f"/proc/{child}/cmdline").read_bytes()
    return [child for child, title in titles.items() if title.startswith(b"ray::") and b"ShardWorker" in title]


@needs("ray")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's workers in /proc")
def test_killed_ray_worker_changes_no_vector(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of images that are slow to decode, one of them broken."""
    index, gallery = tmp_path / "index", tmp_path / "gallery"
    cells = np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), dtype=np.uint8)
    write_file(gallery / "broken.png", b"no picture")
    for number in range(IMAGES):
        Image.fromarray(cells[number % 8]).resize((1200, 900)).save(gallery / f"{number:03}.png", compress_level=1)
    small = ("--batch-size", 2, "--shard-rows", 2, "--workers", 2, "--device", "cpu")
    environment = {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}  # beside other tests, nice workers starve
    process = Command(
        "index_jobs.rebuild", "--ray", "local", "--gallery", gallery, "--checkpoint", tiny_checkpoint, "--out", index,
        *small, environment=environment,
    )  # fmt: skip
    limit = time.monotonic() + 200
    while len(list(index.glob("work/*/*.npz"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)
    victim = encoders_of(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    done = len(list(index.glob("work/*/*.npz")))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert done < IMAGES / 2 - 5, "the job was over before a worker could be killed"
    assert not is_alive(victim)
    summary = json.loads(out)
    assert (summary["count"], summary["failed"], summary["encoded"]) == (IMAGES, 1, IMAGES + 1)
    assert f"{IMAGES + 1}/{IMAGES + 1}" in err
    verify_index(index)
    options = {"batch_size": 2, "shard_rows": 2, "device": "cpu", "progress": False}
    rebuild(gallery, tiny_checkpoint, tmp_path / "alone", **options)
    ours, theirs = open_current(index), open_current(tmp_path / "alone")
    assert ours.manifest.spec == theirs.manifest.spec
    assert [*map(ours.item, range(IMAGES))] == [*map(theirs.item, range(IMAGES))]
    every = np.arange(IMAGES)
    np.testing.assert_allclose(ours.vectors(every), theirs.vectors(every), atol=1e-5)
    assert ours.manifest.files["failed.jsonl"] == theirs.manifest.files["failed.jsonl"]


def test_missing_ray_names_its_extra(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"encoding on Ray needs .* pip install 'dcar\[ray\]'"):
        rebuild(tiny_gallery, tiny_checkpoint, tmp_path / "index", ray="local", device="cpu", progress=False)
