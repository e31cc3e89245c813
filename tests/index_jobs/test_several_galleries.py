"""Several galleries in one index, galleries that have shrunk, and galleries or a model that were moved."""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app as command_line
from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, CheckpointError, DataError, GalleryShrunkError, ModelError
from index_jobs.gallery.scan import scan
from index_jobs.jobs.update import add, relocate, remove
from index_jobs.rebuild import main
from index_jobs.store.artifact import Artifact, ImageAccess
from index_jobs.store.versions import current_version, open_current, verify_index
from tests.support.images import draw
from tests.support.versions import Build


def camera(path: Path, *colors: str) -> Path:
    """Write images named by numbers, as cameras do."""
    path.mkdir(parents=True)
    for number, color in enumerate(colors):
        draw(color, "square").save(path / f"IMG_{number}.png")
    return path


@pytest.fixture
def cameras(tmp_path: Path) -> list[Path]:
    return [camera(tmp_path / "cam1", "red", "blue"), camera(tmp_path / "cam2", "green", "pink")]


def images(artifact: Artifact) -> dict[str, bytes]:
    rows = range(artifact.rows)
    return {artifact.item(row).metadata["file_name"]: artifact.image_bytes(row) for row in rows if artifact.live[row]}


def test_same_names_in_two_galleries_are_two_items(
    build: Build, cameras: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    build(list(map(str, cameras)))
    artifact = open_current(tmp_path / "index")
    artifact.image_access = ImageAccess()  # the service reads the images of both
    found = images(artifact)
    assert list(found) == ["IMG_0.png", "IMG_1.png", "cam2/IMG_0.png", "cam2/IMG_1.png"]
    assert found["cam2/IMG_0.png"] == (cameras[1] / "IMG_0.png").read_bytes()
    arguments = [argument for path in cameras for argument in ("--gallery", str(path))]
    assert main([*arguments, "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "index"), "--quiet"]) == 0
    assert current_version(tmp_path / "index") == 1, "nothing has changed"


def test_ids_and_names_of_several_galleries(cameras: list[Path]) -> None:
    """Those of the first one stay when another is added, and given ids never collide."""
    alone, both = scan(cameras[0]), scan(list(map(str, cameras)))
    assert both.table["id"].to_pylist()[:2] == alone.table["id"].to_pylist()
    names = scan([f"north={cameras[0]}", f"south={cameras[1]}"]).table["name"].to_pylist()
    assert names == ["north/IMG_0.png", "north/IMG_1.png", "south/IMG_0.png", "south/IMG_1.png"]
    for path in cameras:
        (path / "metadata.jsonl").write_text('{"file_name": "IMG_0.png", "id": "first"}\n')
    ids = scan(list(map(str, cameras))).table["id"].to_pylist()
    assert (ids[0], ids[2]) == ("first", "cam2/first")


def test_an_own_name_that_is_taken_gets_a_number(cameras: list[Path], tmp_path: Path) -> None:
    camera(cameras[0] / "cam2", "cyan")
    third = camera(tmp_path / "other" / "cam2", "black")
    names = scan([*map(str, cameras), str(third)]).table["name"].to_pylist()
    assert names[2:] == ["cam2/IMG_0.png", "cam2-2/IMG_0.png", "cam2-2/IMG_1.png", "cam2-3/IMG_0.png"]


def test_a_gallery_or_a_name_given_twice_is_refused(cameras: list[Path]) -> None:
    for galleries, said in (
        ([str(cameras[0])] * 2, "cam1 is given twice"),
        ([f"x={path}" for path in cameras], "the name x is given twice; choose another"),
        ([*map(str, cameras), f"cam2={cameras[0].parent}"], "the name cam2 is given twice"),
    ):
        with pytest.raises(DataError, match=said):
            scan(galleries)


def test_adding_a_photo_of_the_same_name_advises_nothing_that_loses_one(
    build: Build, cameras: list[Path], tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build(cameras[0])
    with pytest.raises(DataError, match=r"cam1/IMG_0.png there and .*cam2/IMG_0.png here; --gallery NAME="):
        add(index, cameras[1], progress=False)
    assert add(index, f"south={cameras[1]}", progress=False).count == 4
    artifact = open_current(index)
    artifact.image_access = ImageAccess()
    assert images(artifact)["south/IMG_1.png"] == (cameras[1] / "IMG_1.png").read_bytes()
    with pytest.raises(DataError, match="the same files; --replace indexes them again"):
        add(index, cameras[0], progress=False)


def test_a_gallery_that_lost_many_images_is_not_published(
    build: Build, gallery: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    build(gallery)
    for path in sorted((gallery / "circle").glob("*.png"))[:5]:
        path.unlink()
    arguments = ["--gallery", str(gallery), "--checkpoint", str(tiny_checkpoint), "--out", str(index), "--quiet"]
    assert main(arguments) == 7
    error = capsys.readouterr().err
    assert "5 of the 24 images of version 1 are gone" in error
    assert "circle/" in error
    assert current_version(index) == 1
    with pytest.raises(GalleryShrunkError, match="at most 10% may be"):
        build(gallery, max_vanished=0.1)
    assert main([*arguments, "--max-vanished", "0.3"]) == 0
    shutil.rmtree(gallery / "square")
    assert main([*arguments, "--force"]) == 0


def test_the_summary_counts_what_came_went_and_changed(build: Build, gallery: Path, tmp_path: Path) -> None:
    (gallery / "broken.png").write_bytes(b"\0")
    assert build(gallery).changes is None
    (gallery / "circle" / "green.png").write_bytes(b"\0")
    draw("pink", "circle").save(gallery / "new.png")
    (gallery / "circle" / "red.png").unlink()
    with (gallery / "circle" / "blue.png").open("ab") as file:
        file.write(b"\0" * 10)
    done = build(gallery, max_failed=0.1)
    assert done.changes == {"added": 1, "removed": 2, "changed": 1}
    assert "since the previous version: 1 images added, 2 images removed, 1 images changed" in done.to_text()


def test_a_moved_gallery_is_shown_from_its_new_place(build: Build, gallery: Path, tmp_path: Path) -> None:
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
    artifact = open_current(index, ImageAccess())
    assert artifact.find_gallery_fault() is None
    name = artifact.item(3).metadata["file_name"]
    assert artifact.image_bytes(3) == (tmp_path / "moved" / name).read_bytes()
    assert (artifact.path / "index.faiss").samefile(before.path / "index.faiss"), "nothing is copied"
    assert len(verify_index(index)) == 2
    assert build(tmp_path / "moved").reused


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
    artifact = open_current(index, ImageAccess())
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
    with pytest.raises(DataError, match=f"the images of {index} are in .* already"):
        relocate(index, gallery=open_current(index).manifest.root)
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
    for place in (open_current(index).checkpoint, checkpoint):  # its path is absolute there, and relative here
        with pytest.raises(
            ModelError,
            match=r"does not exist; if it was moved, name its new place: for an index by `dcar index relocate",
        ):
            Encoder.load(place, device="cpu")
    with pytest.raises(ModelError, match=rf"else as backbone\.model in {re.escape(str(checkpoint))}/config\.json"):
        build(checkpoint=checkpoint, out=tmp_path / "other index")
    relocate(index, model=tmp_path / "moved")
    artifact = open_current(index)
    artifact.require(Encoder.load(artifact.checkpoint, device="cpu").fingerprint)
    assert len(verify_index(index)) == 2
    (tmp_path / "moved").rename(tmp_path / "again")
    (tmp_path / "other").mkdir()
    with pytest.raises((CheckpointError, ModelError)):
        relocate(index, model=tmp_path / "other")
    assert current_version(index) == 2
