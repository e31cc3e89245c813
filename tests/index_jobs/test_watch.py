"""A watched gallery: its index follows new, changed, renamed and removed files, and
keeps what is not the gallery's.
"""

import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcar_core.util.errors import ArtifactError, DataError
from index_jobs.index.manifest import WAITING
from index_jobs.index.versions import list_versions, open_current, version_numbers
from index_jobs.jobs.update import apply_waiting, remove
from index_jobs.jobs.watch import watch as watch_index
from tests.support.commands import Command
from tests.support.images import draw, encoded, exif_of
from tests.support.jobs import patch, put
from tests.support.page import until
from tests.support.versions import Build

Watch = Callable[..., "Watching"]
SETTLE_S = 0.25
CODE = f"""
from app.cli import main
from index_jobs.jobs import watch

watch.SETTLE_S, watch.RETRY_S, watch.TICK_MS = {SETTLE_S}, 0.2, 50
main()
"""


class Watching:
    """A running `dcar index watch`, and the lines that it prints."""

    def __init__(self, index: Path, *options: object) -> None:
        self.process = Command("-c", CODE, "index", "watch", index, *options)
        self._lines = queue.Queue[str]()
        threading.Thread(
            target=lambda: [*map(self._lines.put, self.process.stdout)], daemon=True
        ).start()

    def line(self) -> str:
        return self._lines.get(timeout=30).strip()

    def is_silent(self, seconds: float = 0.5) -> bool:
        time.sleep(seconds)
        return self._lines.empty()

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.fixture
def index(gallery: Path, build: Build, tmp_path: Path) -> Path:
    # no scan tells it
    draw("blue", "cross").save(
        gallery / "cross" / "blue.png", exif=exif_of("2024:07:01 10:20:30")
    )
    build(gallery)
    return tmp_path / "index"


@pytest.fixture
def watch(index: Path) -> Iterator[Watch]:
    started = list[Watching]()

    def start(*options: object) -> Watching:
        started.append(Watching(index, *options))
        return started[-1]

    yield start
    for each in started:
        each.process.send_signal(signal.SIGKILL)
        each.process.wait()
        each.process.close()


def names(index: Path) -> set[str]:
    opened = open_current(index)
    return {
        opened.item(row).metadata["file_name"]
        for row in opened.live.nonzero()[0].tolist()
    }


def test_new_changed_renamed_and_removed_files_are_one_update_each(
    gallery: Path,
    index: Path,
    watch: Watch,
) -> None:
    (gallery / "clip.mp4").touch()
    watching = watch("--keep-writes", 2)
    for color in ("pink", "cyan", "lime"):
        draw(color, "square").save(gallery / f"{color}.png")
    assert watching.line().startswith("3 added: version 2, 27 images")
    before = open_current(index).vectors(open_current(index).live.nonzero()[0])
    draw("navy", "circle").save(gallery / "pink.png")
    assert watching.line().startswith("1 changed: version 3, 27 images")
    assert not (
        open_current(index).vectors(open_current(index).live.nonzero()[0]) == before
    ).all()
    (gallery / "square" / "red.png").rename(gallery / "square" / "scarlet.png")
    assert watching.line().startswith("1 added, 1 removed: version 4, 27 images")
    (gallery / "cyan.png").unlink()
    assert watching.line().startswith("1 removed: version 5, 26 images")
    assert {"pink.png", "square/scarlet.png"} < names(index)
    assert {"cyan.png", "square/red.png"} & names(index) == set()
    assert watching.end() == 0
    assert watching.process.stderr.read().count("not read: 1 .mp4") == 1
    assert version_numbers(index) == [1, 4, 5], "the build is kept"
    assert [each.origin for each in list_versions(index)] == [
        "",
        "by a watch",
        "by a watch",
    ]
    assert open_current(index).manifest.change == "1 item removed by a watch"


def test_file_in_copy_waits_and_a_broken_one_is_tried_again(
    gallery: Path,
    index: Path,
    watch: Watch,
) -> None:
    watching = watch()
    data = encoded(draw("pink", "circle"))
    assert watching.is_silent()
    with (gallery / "slow.png").open("wb", buffering=0) as file:
        for start in range(0, len(data), 1 + len(data) // 8):
            file.write(data[start : start + 1 + len(data) // 8])
            time.sleep(SETTLE_S / 2)
    assert watching.line().startswith("1 added: version 2")
    (gallery / "half.png").write_bytes(data[: len(data) // 2])
    line = watching.line()
    assert line.startswith("left out until they change: ")
    assert "none of the 1 images to encode can be read" in line
    assert "max-failed" not in line, "the watch has no such option"
    (gallery / "whole.png").write_bytes(data)
    assert watching.line().startswith("1 added: version 3"), (
        "a broken image is reported once"
    )
    with (gallery / "half.png").open("ab") as file:
        file.write(data[len(data) // 2 :])
    assert watching.line().startswith("1 added: version 4")


def test_a_gallery_that_is_gone_or_mostly_gone_empties_no_index(
    gallery: Path,
    index: Path,
    watch: Watch,
) -> None:
    watching = watch()
    aside = gallery.parent / "aside"
    assert watching.is_silent()
    gallery.rename(aside)
    line = watching.line()
    assert line.startswith("nothing is removed while this lasts: ")
    assert str(gallery) in line
    assert str(gallery) in (index / WAITING).read_text()
    aside.rename(gallery)
    draw("pink", "circle").save(gallery / "pink.png")
    assert watching.line().startswith("1 added: version 2, 25 images")
    shutil.rmtree(gallery / "square")
    assert watching.line().startswith("6 removed: version 3, 19 images")
    aside.mkdir()
    for shape in ("circle", "triangle"):
        (gallery / shape).rename(aside / shape)
    assert "12 images of" in watching.line()
    draw("navy", "circle").save(gallery / "navy.png")
    assert watching.line().startswith("1 added: version 4, 20 images")
    assert watching.is_silent(), "the reason is said once"
    (aside / "circle").rename(gallery / "circle")
    assert watching.line().startswith("6 removed: version 5, 14 images")
    (gallery / "circle" / "broken.png").write_bytes(b"no image")
    assert watching.line().startswith("left out until they change: ")
    for path in [gallery / "circle", *sorted((gallery / "cross").iterdir())[1:]]:
        path.rename(aside / path.name)
    assert "11 images of" in watching.line(), "the broken one was not in the index"
    opened = open_current(index)
    items = [opened.item(row) for row in opened.live.nonzero()[0].tolist()]
    remove(
        index,
        [
            item.id
            for item in items
            if not (gallery / item.metadata["file_name"]).exists()
        ],
    )
    until(lambda: not (index / WAITING).exists())
    assert watching.end() == 0
    assert not (index / WAITING).exists()


def test_most_of_a_gallery_in_a_renamed_folder_is_a_move(
    gallery: Path,
    index: Path,
    watch: Watch,
) -> None:
    (new := gallery / "by-shape").mkdir()
    for shape in ("circle", "triangle"):
        (gallery / shape).rename(new / shape)
    watching = watch()
    assert watching.line().startswith("12 added, 12 removed: version 2, 24 images"), (
        "moved before the watch began"
    )
    new.rename(gallery / "shapes")
    assert watching.line().startswith("12 added, 12 removed: version 3, 24 images")


def test_a_watch_without_an_index_or_a_gallery_on_this_machine_ends_with_an_error(
    gallery: Path,
    build: Build,
    tmp_path: Path,
) -> None:
    with pytest.raises(ArtifactError, match="holds no published index"):
        watch_index(tmp_path / "indx", print)
    build([str(gallery), f"more={gallery / 'square'}"])
    with pytest.raises(DataError, match="one gallery on this machine can be watched"):
        watch_index(tmp_path / "index", print)


def test_a_killed_watch_resumes_and_leaves_changes_over_http_alone(
    gallery: Path,
    index: Path,
    watch: Watch,
) -> None:
    watching = watch()
    assert watching.is_silent()
    watching.process.send_signal(signal.SIGKILL)
    watching.process.wait()
    opened = open_current(index)
    first, second = (opened.item(opened.rows - number) for number in (2, 1))
    put(index, "uploaded", first.id)
    patch(index, second.id, price=3)
    apply_waiting(index)
    draw("pink", "circle").save(gallery / "pink.png")
    draw("navy", "cross").save(gallery / "circle" / "red.png")
    (gallery / "circle" / "blue.png").unlink()
    again = watch()
    assert again.line().startswith(
        "1 added, 1 changed, 1 removed: version 4, 25 images"
    )
    opened = open_current(index)
    rows = [opened.row_of(each) for each in ("uploaded", first.id, second.id)]
    uploaded, replaced, patched = (opened.item(row) for row in rows if row is not None)
    assert uploaded.caption == "a pink uploaded"
    assert replaced.caption == f"a pink {first.id}"
    assert patched.metadata["price"] == 3
    assert again.is_silent()
