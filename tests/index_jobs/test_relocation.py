"""An index whose gallery or model was moved."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app as command_line
from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, CheckpointError, DataError, ModelError
from index_jobs.jobs.update import add, relocate, remove
from index_jobs.rebuild import rebuild
from index_jobs.store.versions import current_version, open_current, verify_index
from tests.support.images import draw
from tests.support.versions import Build


def test_a_moved_gallery_is_shown_from_its_new_place(
    build: Build, gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build(gallery)
    before = open_current(index)
    assert before.find_gallery_fault() is None
    gallery.rename(tmp_path / "moved")
    assert "16 of 16 sampled images are not in the gallery" in (before.find_gallery_fault() or "")
    with pytest.raises(ArtifactError, match=r"image of item '\w+' cannot be read from the gallery .*: No such file"):
        before.image_bytes(0)
    done = CliRunner().invoke(command_line, ["index", "relocate", str(index), "--gallery", str(tmp_path / "moved")])
    assert done.output == f"{index}: version 2, images at {tmp_path / 'moved'}\n"
    artifact = open_current(index, image_roots=())
    assert artifact.find_gallery_fault() is None
    name = artifact.item(3).metadata["file_name"]
    assert artifact.image_bytes(3) == (tmp_path / "moved" / name).read_bytes()
    assert (artifact.path / "index.faiss").samefile(before.path / "index.faiss"), "nothing is copied"
    assert len(verify_index(index)) == 2
    assert rebuild(tmp_path / "moved", tiny_checkpoint, index, progress=False).reused


def test_images_of_additions_and_further_galleries_move_with_their_folder(
    build: Build, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index, disk = tmp_path / "index", tmp_path / "disk"
    for name in ("second", "third"):
        (disk / name).mkdir(parents=True)
        draw("pink", "circle" if name == "second" else "square").save(disk / name / "pink.png")
    build([str(gallery), str(disk / "second")])
    add(index, f"third={disk / 'third'}", progress=False)
    remove(index, [open_current(index).item(0).id])
    disk.rename(tmp_path / "new disk")
    assert "a folder of the gallery is gone, with images such as" in (open_current(index).find_gallery_fault() or "")
    relocate(index, gallery=str(tmp_path / "new disk" / "second"), former=str(disk / "second"))
    assert f"{disk / 'third'} is missing as well" in caplog.text
    monkeypatch.chdir(tmp_path)
    relocate(index, gallery="new disk", former="disk")
    artifact = open_current(index, image_roots=())
    for row in (1, 24, 25):
        assert artifact.image_bytes(row)
    assert artifact.manifest.root == str(gallery)
    assert artifact.manifest.spec.gallery == f"{gallery}, second={tmp_path / 'new disk' / 'second'}"
    assert artifact.manifest.count == 25
    assert len(verify_index(index)) == 3


def test_places_with_an_equals_sign_move(build: Build, gallery: Path, tmp_path: Path) -> None:
    index, disk = tmp_path / "index", tmp_path / "disk=1"
    disk.mkdir()
    first, second = gallery.rename(disk / "first"), disk / "second"
    second.mkdir()
    draw("pink", "circle").save(second / "pink.png")
    build([str(first), f"more={second}"])
    moved = disk.rename(tmp_path / "disk=2")
    relocate(index, gallery=str(moved), former=str(disk))
    assert open_current(index).manifest.spec.gallery == f"{moved / 'first'}, more={moved / 'second'}"


def test_a_place_without_the_images_is_refused(index: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing is published: 16 of 16 sampled images are not in the gallery"):
        relocate(index, gallery=str(tmp_path / "empty"))
    with pytest.raises(DataError, match=f"no image of .* is below {tmp_path}; they are in "):
        relocate(index, gallery=str(tmp_path / "empty"), former=str(tmp_path))
    assert current_version(index) == 1


def test_images_of_a_folder_with_a_longer_name_are_not_taken_for_those_of_the_new_place(
    build: Build, gallery: Path, tmp_path: Path
) -> None:
    index, second = tmp_path / "index", tmp_path / "second"
    for folder in (second, tmp_path / "new"):
        folder.mkdir()
    draw("pink", "circle").save(second / "pink.png")
    places = [str(gallery.rename(tmp_path / "new2")), str(second)]
    build(places)
    with pytest.raises(DataError, match="nothing is published: 1 of 1 sampled images"):
        relocate(index, gallery=str(tmp_path / "new"), former=str(second))
    assert current_version(index) == 1


def test_a_moved_model_is_found_at_its_new_place(
    build: Build, tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "models" / tiny_model.name))
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "models" / tiny_checkpoint.name)
    index = tmp_path / "index"
    build(checkpoint=checkpoint)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"does not exist; if it was moved, name its new place: for an index by `dcar index relocate"
    ):
        Encoder.load(open_current(index).checkpoint, device="cpu")
    relocate(index, model=tmp_path / "moved")
    artifact = open_current(index)
    artifact.require(Encoder.load(artifact.checkpoint, device="cpu").fingerprint)
    assert len(verify_index(index)) == 2
    (tmp_path / "moved").rename(tmp_path / "again")
    (tmp_path / "other").mkdir()
    with pytest.raises((CheckpointError, ModelError)):
        relocate(index, model=tmp_path / "other")
    assert current_version(index) == 2
