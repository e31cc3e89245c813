"""A job that is killed at any moment, or whose disk is full."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from dcar_core.util.errors import DcarError
from index_jobs.gallery.scan import scan
from index_jobs.index.publish import verify_index
from index_jobs.index.versions import current_version
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
