"""Files of a gallery by their format: those that are read, and those that are skipped and counted."""

from pathlib import Path

import pytest

from dcar_core.images import formats
from index_jobs.gallery.scan import scan
from tests.support.files import write_file, write_tar
from tests.support.images import png
from tests.support.parts import needs


@pytest.mark.parametrize(("kind", "place"), [("folder", ""), ("tar", "shard.tar"), ("tar", "")])
def test_files_of_image_kinds_that_are_not_read_are_counted(
    kind: str, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.png": png(), **dict.fromkeys(("b.svg", "c.SVG", "d.mp4", "e.pef", "._f.svg", "notes.txt"), b"")}
    if kind == "tar":
        write_tar(tmp_path / "shard.tar", files)
    else:
        for name, content in files.items():
            write_file(tmp_path / name, content)
    assert len(scan(tmp_path / place)) == 1
    assert "2 SVG files are skipped: convert them to PNG" in caplog.text
    assert "1 video file is skipped: extract frames as images" in caplog.text
    assert "1 RAW file is skipped: convert them to JPEG" in caplog.text
    assert "notes" not in caplog.text


def test_heic_files_are_counted_without_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(formats, "IMAGE_SUFFIXES", formats.IMAGE_SUFFIXES - formats.HEIC_SUFFIXES)
    for name in ("a.png", "b.heic", "c.HIF"):
        write_file(tmp_path / name, png())
    assert len(scan(tmp_path)) == 1
    assert "2 HEIC files are skipped: pip install 'dcar[heic]'" in caplog.text


@needs("heic")
def test_heic_files_are_images_with_their_extra(tmp_path: Path) -> None:
    names = ["a.png", "b.heic", "c.HEIF", "d.hif"]
    for name in names:
        write_file(tmp_path / name, png())
    assert scan(tmp_path).table["name"].to_pylist() == names
