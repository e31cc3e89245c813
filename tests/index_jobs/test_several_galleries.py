"""Several galleries in one index, galleries that have shrunk, and galleries or a model
that were moved.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    GalleryShrunkError,
    ModelError,
)
from index_jobs.gallery.scan import scan
from index_jobs.index.index_version import ImageAccess, IndexVersion
from index_jobs.index.versions import current_version, open_current
from index_jobs.jobs.update import add
from index_jobs.rebuild import main
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
    return [
        camera(tmp_path / "cam1", "red", "blue"),
        camera(tmp_path / "cam2", "green", "pink"),
    ]


def images(opened: IndexVersion) -> dict[str, bytes]:
    rows = range(opened.rows)
    return {
        opened.item(row).metadata["file_name"]: opened.image_bytes(row)
        for row in rows
        if opened.live[row]
    }


def test_same_names_in_two_galleries_are_two_items(
    build: Build,
    cameras: list[Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    build(list(map(str, cameras)))
    opened = open_current(tmp_path / "index")
    opened.image_access = ImageAccess()  # the service reads the images of both
    found = images(opened)
    assert list(found) == ["IMG_0.png", "IMG_1.png", "cam2/IMG_0.png", "cam2/IMG_1.png"]
    assert found["cam2/IMG_0.png"] == (cameras[1] / "IMG_0.png").read_bytes()
    arguments = [argument for path in cameras for argument in ("--gallery", str(path))]
    assert (
        main(
            [
                *arguments,
                "--checkpoint",
                str(tiny_checkpoint),
                "--out",
                str(tmp_path / "index"),
                "--quiet",
            ]
        )
        == 0
    )
    assert current_version(tmp_path / "index") == 1, "nothing has changed"


def test_ids_and_names_of_several_galleries(
    cameras: list[Path], tmp_path: Path
) -> None:
    """Those of the first one stay when another is added, and given ids never
    collide.
    """
    first, second = map(str, cameras)
    assert (
        scan([first, second]).table["id"].to_pylist()[:2]
        == scan(first).table["id"].to_pylist()
    )
    named = scan([f"north={first}", f"south={second}"]).table["name"].to_pylist()
    assert named == [
        "north/IMG_0.png",
        "north/IMG_1.png",
        "south/IMG_0.png",
        "south/IMG_1.png",
    ]
    for galleries, said in (
        ([first, first], "cam1 is given twice"),
        ([f"x={first}", f"x={second}"], "the name x is given twice; choose another"),
    ):
        with pytest.raises(DataError, match=said):
            scan(galleries)
    for path in cameras:
        (path / "metadata.jsonl").write_text(
            '{"file_name": "IMG_0.png", "id": "first"}\n'
        )
    ids = scan([first, second]).table["id"].to_pylist()
    assert ids[0] == "first"
    assert ids[2] == "cam2/first"


def test_adding_a_photo_of_the_same_name_keeps_both(
    build: Build,
    cameras: list[Path],
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    build(cameras[0])
    with pytest.raises(DataError, match=r"--gallery NAME=LOCATION keeps both"):
        add(index, cameras[1], progress=False)
    assert add(index, f"south={cameras[1]}", progress=False).count == 4
    opened = open_current(index)
    opened.image_access = ImageAccess()
    assert images(opened)["south/IMG_1.png"] == (cameras[1] / "IMG_1.png").read_bytes()


def test_a_gallery_that_lost_many_images_is_not_published(
    build: Build,
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = tmp_path / "index"
    build(gallery)
    for path in sorted((gallery / "circle").glob("*.png"))[:5]:
        path.unlink()
    arguments = [
        "--gallery",
        str(gallery),
        "--checkpoint",
        str(tiny_checkpoint),
        "--out",
        str(index),
        "--quiet",
    ]
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


def test_the_summary_counts_what_came_and_went(build: Build, gallery: Path) -> None:
    (gallery / "broken.png").write_bytes(b"\0")
    assert build(gallery).changes is None
    (gallery / "circle" / "green.png").write_bytes(b"\0")
    draw("pink", "circle").save(gallery / "new.png")
    (gallery / "circle" / "red.png").unlink()
    done = build(gallery, max_failed=0.1)
    assert done.changes == {"added": 1, "removed": 2}
    assert (
        "since the previous version: 1 images added, 2 images removed" in done.to_text()
    )


def test_a_moved_gallery_is_built_from_its_new_place_without_encoding(
    build: Build,
    gallery: Path,
    cameras: list[Path],
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    build([str(gallery), f"more={cameras[0]}", str(cameras[1])])
    before = open_current(index)
    disk = tmp_path / "new disk"
    disk.mkdir()
    gallery.rename(disk / "gallery")
    with pytest.raises(
        ArtifactError,
        match=r"image of item '\w+' cannot be read from the gallery .*: No such file",
    ):
        before.image_bytes(0)
    for path in cameras:
        path.rename(disk / path.name)
    draw("cyan", "circle").save(disk / "cam1" / "IMG_1.png")
    done = build([str(disk / "gallery"), f"more={disk / 'cam1'}", str(disk / "cam2")])
    assert done.version == 2
    assert done.count == 28
    assert done.encoded == 1
    assert done.resumed == 27
    opened = open_current(index, ImageAccess())
    assert opened.image_bytes(27) == (disk / "cam2" / "IMG_1.png").read_bytes()
    assert (
        opened.manifest.spec.gallery
        == f"{disk / 'gallery'}, more={disk / 'cam1'}, cam2={disk / 'cam2'}"
    )
    same = np.array(
        [
            row
            for row in range(28)
            if opened.item(row).metadata["file_name"] != "more/IMG_1.png"
        ]
    )
    np.testing.assert_array_equal(opened.vectors(same), before.vectors(same))
    assert [opened.item(row).id for row in range(28)] == [
        before.item(row).id for row in range(28)
    ]


def test_a_moved_model_is_named_to_the_build_and_encodes_nothing(
    build: Build,
    tiny_model: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "models" / tiny_model.name))
    checkpoint = Path(
        shutil.copytree(tiny_checkpoint, tmp_path / "models" / tiny_checkpoint.name)
    )
    index = tmp_path / "index"
    build(checkpoint=checkpoint)
    base.rename(tmp_path / "moved")
    published = open_current(index)
    # its path is absolute there, and relative here
    for place in (published.checkpoint, checkpoint):
        with pytest.raises(
            ModelError, match="does not exist; if it was moved, name its new place"
        ):
            Encoder.load(place, device="cpu")
    assert build(checkpoint=checkpoint).reused, "its own place is as it was"
    done = build(checkpoint=checkpoint, model=tmp_path / "moved")
    assert done.version == 2
    assert done.encoded == 0
    opened = open_current(index)
    opened.require(Encoder.load(opened.checkpoint, device="cpu").fingerprint)
    assert build(checkpoint=checkpoint, model=tmp_path / "moved").reused
    assert current_version(index) == 2
