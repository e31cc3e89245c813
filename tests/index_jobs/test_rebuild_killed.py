"""A job that is killed at any moment, or whose disk is full."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dcar_core.util.errors import DcarError
from index_jobs.gallery.scan import scan
from index_jobs.store.publish import verify_index
from index_jobs.store.versions import current_version, list_versions, open_current
from tests.support.commands import Command, run
from tests.support.processes import children_of, is_alive
from tests.support.versions import Build


def contents(index: Path) -> list[str]:
    """The names of an index's blobs and manifests."""
    return sorted(path.name for folder in ("blobs", "versions") for path in (index / folder).glob("*"))


@pytest.mark.slow
def test_full_disk_changes_no_published_version(
    build: Build, gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """No file may grow beyond a limit: first the checkpoint fails, then the items."""
    index = tmp_path / "index"
    build(gallery)
    captions = (gallery / "metadata.jsonl").read_text().replace('"a ', '"' + "very " * 1000)
    (gallery / "metadata.jsonl").write_text(captions)
    before = contents(index)
    arguments = ["--gallery", gallery, "--checkpoint", tiny_checkpoint, "--out", index, "--quiet"]
    for limit in (10_000, 50_000):
        done = run("index_jobs.rebuild", *arguments, file_size=limit)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "cannot be written: File too large" in done.stderr
        assert "published versions are unchanged" in done.stderr
    assert contents(index) == before
    assert [manifest.version for manifest in verify_index(index)] == [1]
    summary = build(gallery)
    assert (summary.version, summary.resumed) == (2, 24)  # the second failure came after encoding


def test_missing_disk_space_is_an_error_before_encoding(
    build: Build, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 vectors of 32 take 3,072 bytes as shards, and as many again in the index."""
    index = tmp_path / "index"
    usage = shutil.disk_usage(tmp_path)

    def left(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    table = scan(gallery).table.nbytes
    left(table + 2 * 3072 - 1)
    with pytest.raises(DcarError, match=r"takes at least 0\.0 GB more, 0\.0 of them for vectors.* GB left; make room"):
        build(gallery)
    assert (list(index.glob("work*")), contents(index)) == ([], [])
    left(table + 2 * 3072)
    assert build(gallery).encoded == 24
    left(table + 3072)  # the vectors are there already
    assert build(gallery, force=True).encoded == 0


JOB = """
import sys
from pathlib import Path
from index_jobs.store.versions import open_current
from index_jobs.rebuild import rebuild
from index_jobs.jobs.update import add, remove
what, gallery, more, checkpoint, index = sys.argv[1], *map(Path, sys.argv[2:])
settings = {"workers": 0, "batch_size": 2, "progress": False}
if what == "rebuild":
    rebuild(gallery, checkpoint, index, shard_rows=2, force=True, keep_shards=False, **settings)
elif what == "add":
    add(index, more, replace_existing=True, **settings)
else:
    remove(index, [open_current(index).item(int(open_current(index).live.argmax())).id])
"""


def run_or_kill(delay: float, *arguments: object) -> tuple[str, float]:
    """Run a job, kill it after `delay` seconds, and return how it ended and the seconds it had."""
    started = time.monotonic()
    process = Command("-c", JOB, *arguments)
    try:
        _, errors = process.communicate(delay)
    except subprocess.TimeoutExpired:
        return "killed", delay
    ended = f"exit {process.returncode}"
    return (f"{ended}: {errors}" if process.returncode else ended), time.monotonic() - started


def vectors_of(index: Path) -> dict[str, np.ndarray]:
    """The vector of every item that can be found, by its id."""
    artifact = open_current(index)
    rows = np.flatnonzero(artifact.live)
    return {artifact.item(int(row)).id: vector for row, vector in zip(rows, artifact.vectors(rows), strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_index_verifies_after_each_of_eight_killed_jobs(
    build: Build, gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    index, more = tmp_path / "index", tmp_path / "more"
    shutil.copytree(gallery / "circle", more / "round")  # other names, other ids
    run = partial(build, workers=0, batch_size=2, shard_rows=2)
    undisturbed: dict[str, np.ndarray] = {}
    for number, source in enumerate((gallery, more)):
        run(source, out=tmp_path / str(number))
        undisturbed |= vectors_of(tmp_path / str(number))
    run(gallery)
    generator, delays, versions = np.random.default_rng(), [], [1]
    longest = {"rebuild": 3.0, "add": 3.0, "remove": 3.0}
    outcomes: list[str] = []
    fewest = 24
    while outcomes.count("killed") < 8:
        what = ("rebuild", "add", "rebuild", "remove")[len(outcomes) % 4]
        delays.append((what, generator.uniform(0.005, longest[what])))
        outcome, seconds = run_or_kill(delays[-1][1], what, gallery, more, tiny_checkpoint, index)
        outcomes.append(outcome)
        assert outcomes[-1] in {"killed", "exit 0"}, f"delays {delays}"
        if outcome == "exit 0":  # kill later ones before their ends
            longest[what] = min(longest[what], seconds)
        if what == "remove":  # also a killed one may have published its version
            fewest -= 1
        elif (what, outcome) == ("rebuild", "exit 0"):
            fewest = 24
        assert {manifest.version for manifest in verify_index(index)} >= {current_version(index)}
        versions.append(open_current(index).manifest.version)
        assert versions[-1] >= versions[-2]
        found = vectors_of(index)
        assert len(found) >= fewest, f"delays {delays}"
        assert all(np.allclose(undisturbed[name], found[name], atol=1e-6) for name in found), f"delays {delays}"
    assert "exit 0" in outcomes, "no job got to its end, so nothing was published under threat"
    summary = run(gallery, force=True, keep_shards=False)
    assert summary.version > versions[-1]
    assert len(vectors_of(index)) == 24
    named = {info.sha256 for manifest in list_versions(index) for info in manifest.files.values()}
    assert {path.name for path in (index / "blobs").iterdir()} == named
    assert not (index / "work").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_killed_command_ends_its_workers_and_resumes(
    build: Build, gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for copy in range(8):
        shutil.copytree(gallery / "circle", gallery / f"copy{copy}")
    index = tmp_path / "index"
    arguments = [
        "--gallery", gallery, "--checkpoint", tiny_checkpoint, "--out", index,
        "--workers", 2, "--batch-size", 1, "--shard-rows", 1, "--quiet",
    ]  # fmt: skip
    others = {*children_of(os.getpid())}
    process = Command("index_jobs.rebuild", *arguments, stdout=os.devnull, stderr=os.devnull)
    limit = time.monotonic() + 60
    while len(list(index.glob("work/*/*.npz"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    workers = {*children_of(os.getpid())} - others - {process.pid}
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    limit = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < limit, "a worker outlived its job"
        time.sleep(0.05)
    assert current_version(index) is None
    summary = build(gallery, workers=0, batch_size=1, shard_rows=1)
    assert summary.resumed >= 5
    assert (summary.count, summary.resumed + summary.encoded) == (72, 72)
    verify_index(index)


def test_shard_of_a_killed_job_is_removed(build: Build, gallery: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build(gallery)
    (shard,) = index.glob("work/*/*.npz")
    leftover = shard.with_name(f".{shard.name}.{'0' * 32}.tmp")
    leftover.touch()
    assert build(gallery, force=True).encoded == 0
    assert (leftover.exists(), shard.exists()) == (False, True)
