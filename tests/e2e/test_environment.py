"""Commands where streams, disks, galleries and their own arguments are not as one would have them."""

import json
import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from dcar_core.util.files import default_cache_directory
from index_jobs.index.versions import open_current, verify_index
from tests.support.commands import UNREAD, dcar, run
from tests.support.paths import ROOT

FULL = Path("/dev/full")
LOST = "error: the output cannot be written: No space left on device\n"

needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def build(gallery: Path, checkpoint: Path, out: Path, *more: object, **options: Any) -> CompletedProcess[str]:
    return run("index_jobs.rebuild", "--gallery", gallery, "--checkpoint", checkpoint, "--out", out, *more, **options)


def train(data: Path, model: Path, out: Path, *more: object, **options: Any) -> CompletedProcess[str]:
    done = dcar("train", "--data", data, "--model", model, "--out", out, "--batch-size", 6, *more, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@needs_full
def test_closed_or_full_streams_do_not_fail_a_job(
    tiny_data: Path, tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    closed: list[dict[str, Any]] = [{"stderr": None}, {"stderr": FULL}, {"stdout": None, "stderr": None}]
    for number, streams in enumerate([*closed, {"stdout": FULL}, {"stdout": UNREAD}]):
        done = build(tiny_data, tiny_checkpoint, index := tmp_path / f"{number}", **streams)
        assert done.returncode == 0, (streams, done.stderr)
        assert open_current(index).manifest.count == 24
        assert "Traceback" not in done.stderr
        is_told = "the summary is lost: the output cannot be written: No space left on device" in done.stderr
        assert is_told == (streams == {"stdout": FULL})
    for number, streams in enumerate(closed[:2]):
        done = train(tiny_data, tiny_model, tmp_path / f"model {number}", "--epochs", 1, **streams)
        assert done.returncode in (0, 3), "3: the untouched model is as good, as a tiny one may be"
        assert "Was it worth it?" in done.stdout
    for buffered in ("", "1"):
        environment = {"PYTHONUNBUFFERED": buffered}
        done = dcar("index", "items", index, stdout=FULL, environment=environment)
        assert (done.returncode, done.stderr) == (1, LOST)
    assert dcar("index", "items", index, stdout=UNREAD).stderr == ""


def test_output_in_another_encoding_is_escaped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/emoji/query.png", tmp_path / "1.png")
    row = {"file_name": "1.png", "id": "日本 😀", "caption": "日本 😀"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    index = tmp_path / "index"
    assert build(tmp_path, tiny_checkpoint, index).returncode == 0
    search = ["search", "cat", "--index", index]
    items, results, table = (
        dcar(*command, environment={"PYTHONIOENCODING": "latin1"}).stdout
        for command in (["index", "items", index], [*search, "--json"], search)
    )
    assert json.loads(items)["caption"] == json.loads(results)["results"][0]["caption"] == "日本 😀"
    assert r"\u65e5\u672c" in table


def test_special_files_are_unreadable_images(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    gallery = Path(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    for name, target in (("loop", "loop.png"), ("nothing", "gone.png"), ("zero", "/dev/zero")):
        (gallery / f"{name}.png").symlink_to(target)
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
    ends = 0
    for blocks in (1, 8, 40, 200):
        done = train(tiny_data, tiny_model, tmp_path / f"{blocks}", "--epochs", 2, file_size=blocks * 512)
        assert done.returncode in (0, 1, 3)
        assert done.returncode == 0 or "File too large" in done.stderr
        ends += done.returncode != 0
    assert ends, "none met the end of its disk"


def test_user_without_a_home_directory_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "DCAR_RUNTIME_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="Not a directory"):
        default_cache_directory().mkdir(parents=True)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search dog --index /nowhere", "/nowhere"),
        ("serve --index /nowhere", "dcar index build"),
        ("serve", "no index: give --index DIR"),
        ("serve --index /nowhere --collection one", "--collection is NAME=DIR, not 'one'"),
        ("serve --index /nowhere --collection one=/a --collection one=/b", "--collection gives two indexes one name"),
        ("evaluate --data /nowhere --methods dcarr --out /tmp/x --model {model}", "there are: clip"),
        ("train --data /nowhere --out /tmp/x", "/nowhere"),
        ("demo --domain notoemoji", "twemoji"),
        ("data check /nowhere", "/nowhere does not exist; give a directory"),
        ("index list /nowhere", "/nowhere holds no published index"),
        ("index rollback /nowhere", "/nowhere holds no published index"),
    ],
)
def test_mistakes_are_one_line(command: str, message: str, tiny_model: Path) -> None:
    done = dcar(*command.format(model=tiny_model).split())
    assert done.returncode == (3 if command.startswith(("train", "data")) else 1), "3 where it is the data"
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
