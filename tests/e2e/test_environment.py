"""Commands where streams, disks and galleries are not as one would have them."""

import json
import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from dcar_core.util.files import default_cache_directory
from index_jobs.index.publish import verify_index
from index_jobs.index.versions import open_current
from tests.support.commands import UNREAD, dcar, run
from tests.support.paths import ROOT

FULL = Path("/dev/full")

needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def build(gallery: Path, checkpoint: Path, out: Path, *more: object, **options: Any) -> CompletedProcess[str]:
    return run("index_jobs.rebuild", "--gallery", gallery, "--checkpoint", checkpoint, "--out", out, *more, **options)


@pytest.mark.parametrize(
    "streams",
    [{"stderr": None}, {"stderr": FULL}, {"stdout": FULL}, {"stdout": UNREAD}, {"stdout": None, "stderr": None}],
    ids=["stderr closed", "stderr full", "stdout full", "stdout unread", "both closed"],
)
@needs_full
def test_closed_or_full_streams_do_not_fail_a_job(
    streams: dict[str, Any], tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = build(tiny_gallery, tiny_checkpoint, tmp_path / "index", **streams)
    assert done.returncode == 0, done.stderr
    assert open_current(tmp_path / "index").manifest.count == 24
    assert "Traceback" not in done.stderr
    if streams == {"stdout": FULL}:
        assert "the summary is lost: the output cannot be written: No space left on device" in done.stderr


@needs_full
def test_training_continues_without_a_progress_bar(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    for number, stderr in enumerate((None, FULL)):
        train = ("train", "--data", tiny_data, "--model", tiny_model, "--out", tmp_path / str(number))
        done = dcar(*train, "--epochs", 1, "--batch-size", 6, stderr=stderr)
        assert done.returncode in (0, 3), "3: the untouched model is as good, as a tiny one may be"
        assert "Was it worth it?" in done.stdout


@needs_full
def test_output_that_cannot_be_written_is_one_line(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert build(tiny_gallery, tiny_checkpoint, tmp_path / "index").returncode == 0
    for buffered in ("", "1"):
        environment = {"PYTHONUNBUFFERED": buffered}
        done = dcar("index", "items", tmp_path / "index", stdout=FULL, environment=environment)
        assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")
    assert dcar("index", "items", tmp_path / "index", stdout=UNREAD).stderr == ""


def test_output_in_another_encoding_is_escaped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/emoji/query.png", tmp_path / "1.png")
    row = {"file_name": "1.png", "id": "日本 😀", "caption": "日本 😀"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    index = tmp_path / "index"
    assert build(tmp_path, tiny_checkpoint, index).returncode == 0
    search = ["search", "cat", "--index", index]
    for command in (["index", "items", index], [*search, "--json"], search):
        done = dcar(*command, environment={"PYTHONIOENCODING": "latin1"})
        assert done.returncode == 0, done.stderr
        if command is search:
            assert r"\u65e5\u672c" in done.stdout
        else:
            found = json.loads(done.stdout)
            assert (found["results"][0] if "results" in found else found)["caption"] == "日本 😀"


def test_special_files_are_unreadable_images(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    shutil.copytree(tiny_gallery, gallery)
    (gallery / "loop.png").symlink_to("loop.png")
    (gallery / "nothing.png").symlink_to("gone.png")
    (gallery / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(gallery / "pipe.png")
    (tmp_path / "elsewhere").mkdir()
    (gallery / "linked").symlink_to(tmp_path / "elsewhere")
    done = build(gallery, tiny_checkpoint, tmp_path / "index", "--max-failed", 0.5)
    assert done.returncode == 0, done.stderr
    assert "1 links to folders are not followed, such as " in done.stderr
    index = open_current(tmp_path / "index")
    lines = index.manifest.path(index.index, "failed.jsonl").read_text().splitlines()
    assert {row["name"]: row["reason"] for row in map(json.loads, lines)} == {
        "loop.png": "Too many levels of symbolic links",
        "nothing.png": "no such file",
        "pipe.png": "neither a file nor a link to one",
        "zero.png": "neither a file nor a link to one",
    }
    verify_index(tmp_path / "index")


def test_full_disk_ends_training_with_one_line(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """By the size that a file may have, which needs no disk of one's own."""
    endings = set()
    for blocks in (1, 8, 40, 200):
        train = ("train", "--data", tiny_data, "--model", tiny_model, "--out", tmp_path / str(blocks))
        done = dcar(*train, "--epochs", 2, "--batch-size", 6, file_size=blocks * 512)
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            assert done.returncode == 3 or done.returncode == 1
            assert "File too large" in done.stderr
            endings.add(done.stderr.strip().splitlines()[-1].partition(":")[2].split()[0])
    assert endings, "none met the end of its disk"


def test_user_without_a_home_directory_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "DCAR_RUNTIME_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="Not a directory"):
        default_cache_directory().mkdir(parents=True)
