"""Commands where streams, disks, galleries and their own arguments are not as one would
have them.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from index_jobs.index.versions import open_current, verify_index
from tests.support.commands import dcar, run

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    done = dcar("models", stdout=FULL, environment={"PYTHONUNBUFFERED": "1"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device;")
    assert len(done.stderr.splitlines()) == 1


def test_special_files_are_unreadable_images(
    tiny_gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    gallery = Path(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    for name, target in (
        ("loop", "loop.png"),
        ("nothing", "gone.png"),
        ("zero", "/dev/zero"),
    ):
        (gallery / f"{name}.png").symlink_to(target)
    os.mkfifo(gallery / "pipe.png")
    (tmp_path / "elsewhere").mkdir()
    (gallery / "linked").symlink_to(tmp_path / "elsewhere")
    options = (
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        tmp_path / "index",
        "--max-failed",
        0.5,
    )
    done = run("index_jobs.rebuild", "--gallery", gallery, *options)
    assert done.returncode == 0, done.stderr
    index = open_current(tmp_path / "index")
    lines = index.manifest.path(index.index, "failed.jsonl").read_text().splitlines()
    assert {row["name"]: row["reason"] for row in map(json.loads, lines)} == {
        "loop.png": "Too many levels of symbolic links",
        "nothing.png": "no such file",
        "pipe.png": "neither a file nor a link to one",
        "zero.png": "neither a file nor a link to one",
    }
    verify_index(tmp_path / "index")


def test_full_disk_ends_training_with_one_line(
    tiny_data: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """By the size that a file may have, which needs no disk of one's own."""
    ends = 0
    for blocks in (1, 8, 40, 200):
        options = ("--out", tmp_path / f"{blocks}", "--batch-size", 6, "--epochs", 2)
        done = dcar(
            "train",
            "--data",
            tiny_data,
            "--model",
            tiny_model,
            *options,
            file_size=blocks * 512,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, 1, 3)
        assert done.returncode == 0 or "File too large" in done.stderr
        ends += done.returncode != 0
    assert ends, "none met the end of its disk"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search dog --index /nowhere", "/nowhere"),
        ("serve --index /nowhere", "dcar index build"),
        ("serve", "no index: give --index DIR"),
        (
            "serve --index /nowhere --collection one",
            "--collection is NAME=DIR, not 'one'",
        ),
        (
            "evaluate --data /nowhere --methods dcarr --out /tmp/x --model {model}",
            "there are: clip",
        ),
        ("train --data /nowhere --out /tmp/x", "/nowhere"),
        ("demo --domain notoemoji", "twemoji"),
        ("data check /nowhere", "/nowhere does not exist; give a directory"),
        ("index list /nowhere", "/nowhere holds no published index"),
        ("index rollback /nowhere", "/nowhere holds no published index"),
    ],
)
def test_mistakes_are_one_line(command: str, message: str, tiny_model: Path) -> None:
    done = dcar(*command.format(model=tiny_model).split())
    assert done.returncode == (3 if command.startswith(("train", "data")) else 1), (
        "3 where it is the data"
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
