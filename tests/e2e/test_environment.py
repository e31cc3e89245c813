"""Commands where streams, disks and galleries are not as one would have them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dcar_core.runtimes.export_cache import default_cache_directory
from index_jobs.store.versions import open_current, verify_index

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")

needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's command; $PY is Python, $1, $2, .. the arguments."""
    words = ["sh", "-c", script, "sh", *map(str, arguments)]
    settings = {**os.environ, "PY": sys.executable, **environment}
    return subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)


BUILD = '"$PY" -m index_jobs.rebuild --gallery "$1" --checkpoint "$2" --out "$3"'


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", ">/dev/full", "| true", ">&- 2>&-"])
@needs_full
def test_nobody_who_listens_is_no_reason_to_fail(
    streams: str, tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run(f"{BUILD} {streams}", tiny_gallery, tiny_checkpoint, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert open_current(tmp_path / "index").manifest.count == 24
    assert "Traceback" not in done.stderr
    if streams == ">/dev/full":
        assert "the summary is lost: the output cannot be written: No space left on device" in done.stderr


@needs_full
def test_training_is_not_ended_by_a_bar(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    train = '"$PY" -m app.cli train --data "$1" --model "$2" --out "$3" --epochs 1 --batch-size 6'
    for number, streams in enumerate(("2>&-", "2>/dev/full")):
        done = run(f"{train} {streams}", tiny_data, tiny_model, tmp_path / str(number))
        assert done.returncode == 0
        assert "validation text-to-image R@1" in done.stdout


@needs_full
def test_output_that_cannot_be_written_is_one_line(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert run(BUILD, tiny_gallery, tiny_checkpoint, tmp_path / "index").returncode == 0
    for buffered in ("", "1"):
        done = run('"$PY" -m app.cli index items "$1" >/dev/full', tmp_path / "index", PYTHONUNBUFFERED=buffered)
        assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")
    assert run('"$PY" -m app.cli index items "$1" | head -1', tmp_path / "index").stderr == ""


def test_output_of_another_encoding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples/emoji/query.png", tmp_path / "1.png")
    row = {"file_name": "1.png", "id": "日本 😀", "caption": "日本 😀"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert run(BUILD, tmp_path, tiny_checkpoint, tmp_path / "index").returncode == 0
    for command in ('index items "$1"', 'search cat --index "$1" --json', 'search cat --index "$1"'):
        done = run(f'"$PY" -m app.cli {command}', tmp_path / "index", PYTHONIOENCODING="latin1")
        assert done.returncode == 0, done.stderr
        if command.endswith('"$1"') and "search" in command:
            assert r"\u65e5\u672c" in done.stdout
        else:
            found = json.loads(done.stdout)
            assert (found["results"][0] if "results" in found else found)["caption"] == "日本 😀"


def test_what_is_no_file_is_a_picture_that_cannot_be_read(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    gallery = tmp_path / "gallery"
    shutil.copytree(tiny_gallery, gallery)
    (gallery / "loop.png").symlink_to("loop.png")
    (gallery / "nothing.png").symlink_to("gone.png")
    (gallery / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(gallery / "pipe.png")
    (tmp_path / "elsewhere").mkdir()
    (gallery / "linked").symlink_to(tmp_path / "elsewhere")
    done = run(f"{BUILD} --max-failed 0.5", gallery, tiny_checkpoint, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert "1 links to folders are not followed, such as " in done.stderr
    index = open_current(tmp_path / "index")
    lines = (index.path / "failed.jsonl").read_text().splitlines()
    assert {row["name"]: row["reason"] for row in map(json.loads, lines)} == {
        "loop.png": "Too many levels of symbolic links",
        "nothing.png": "no such file",
        "pipe.png": "neither a file nor a link to one",
        "zero.png": "neither a file nor a link to one",
    }
    verify_index(tmp_path / "index")


def test_a_disk_that_is_full_ends_training_with_a_line(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """By the size that a file may have, which needs no disk of one's own."""
    train = 'ulimit -f "$4"; exec "$PY" -m app.cli train --data "$1" --model "$2" --out "$3" --epochs 2 --batch-size 6'
    endings = set()
    for blocks in (1, 8, 40, 200):
        done = run(train, tiny_data, tiny_model, tmp_path / str(blocks), blocks)
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            assert done.returncode == 3 or done.returncode == 1
            assert "File too large" in done.stderr
            endings.add(done.stderr.strip().splitlines()[-1].partition(":")[2].split()[0])
    assert endings, "none met the end of its disk"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "DCAR_RUNTIME_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="Not a directory"):
        default_cache_directory().mkdir(parents=True)
