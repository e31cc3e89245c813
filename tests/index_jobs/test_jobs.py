"""Accepted changes of items, applied by `dcar index apply`: in order, killed, refused,
without disk space, repeated.
"""

import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dcar_core import Encoder
from dcar_core.util.errors import DcarError, LockedError
from index_jobs.gallery.scan import Gallery
from index_jobs.index import versions
from index_jobs.index.changes import FieldChanges
from index_jobs.index.created_collections import (
    create_collection,
    drop_collection,
    list_collections,
)
from index_jobs.index.job_queue import JobQueue
from index_jobs.index.versions import (
    current_version,
    list_versions,
    open_current,
    verify_index,
)
from index_jobs.jobs import update as updates
from index_jobs.jobs.update import add, apply_waiting
from index_jobs.rebuild import rebuild
from tests.support.commands import dcar, run
from tests.support.jobs import delete, patch, picture, put, status


def die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def items_of(index: Path) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return caption, category and metadata of every item that can be found, by its
    id.
    """
    opened = open_current(index)
    items = [opened.item(row) for row in opened.live.nonzero()[0].tolist()]
    return {item.id: (item.caption, item.category, item.metadata) for item in items}


def image_of(index: Path, item_id: str) -> bytes:
    opened = open_current(index)
    row = opened.row_of(item_id)
    assert row is not None
    return opened.image_bytes(row)


def stored_images(index: Path) -> set[bytes]:
    return {path.read_bytes() for path in (index / "images").glob("[0-9a-f]*")}


def test_waiting_puts_become_one_version_with_their_images(
    index: Path, encoder: Encoder
) -> None:
    jobs = [put(index, "a", "b", price=3), put(index, "c", color="cyan", price=4.5)]
    assert [status(index, job)["status"] for job in jobs] == ["waiting", "waiting"]
    assert apply_waiting(index) == 2
    opened = open_current(index)
    assert opened.manifest.version == 2
    assert opened.manifest.count == 27
    caption, category, metadata = items_of(index)["c"]
    assert caption == "a cyan c"
    assert category == "new"
    assert metadata["price"] == 4.5
    assert image_of(index, "c") == picture("cyan")
    assert opened.search(encoder.encode_images([picture("cyan")]), 1)[1][
        0, 0
    ] == opened.row_of("c")
    ended = status(index, jobs[0])
    assert ended.pop("accepted") <= ended.pop("ended")
    assert ended == {
        "id": jobs[0],
        "kind": "put",
        "items": 2,
        "status": "done",
        "index_version": 2,
        "failed": [],
    }
    assert [each["id"] for each in JobQueue(index).newest(5)] == jobs[::-1]
    assert apply_waiting(index) == 0
    assert verify_index(index)[-1].version == 2
    moved = index.rename(index.with_name("moved"))
    assert image_of(moved, "c") == picture("cyan"), "images are beside the index"
    put(moved, "d")
    apply_waiting(moved)
    assert image_of(moved, "c") == picture("cyan")


def test_jobs_change_items_in_their_order_by_ids_and_by_filter(index: Path) -> None:
    first, second, third, *_ = before = items_of(index)
    jobs = [
        patch(index, first, second, "unknown", price=3, stock=1),
        patch(index, first, price=20),
        patch(index, filter={"price": {"lt": 10}}, sale=True),
        patch(index, second, price="cheap"),
        patch(index, filter={"colour": "red"}, sale=True),
        put(index, "a", "b", price=1),
        put(index, "a", color="cyan", price=1),
        delete(index, "b", third, "unknown"),
        patch(index, "a", price=2, stock=None, caption="last"),
        put(index, "c", price=7),
        delete(index, filter={"price": 7}),
    ]
    apply_waiting(index, workers=0)
    found = [status(index, job) for job in jobs]
    after = items_of(index)
    assert [each["status"] for each in found] == ["done"] * 3 + ["failed"] * 2 + [
        "done"
    ] * 6
    assert [each.get("changed") for each in found[:3]] == [2, 1, 1]
    assert found[0]["unknown"] == ["unknown"]
    assert "'price' is int64 in the index, not string" in found[3]["reason"]
    assert "colour: no item has this field" in found[4]["reason"]
    assert after[first][2] == before[first][2] | {"price": 20, "stock": 1}
    assert after[second][2] == before[second][2] | {
        "price": 3,
        "stock": 1,
        "sale": True,
    }
    assert after["a"][0] == "last"
    assert after["a"][2]["price"] == 2
    assert image_of(index, "a") == picture("cyan")
    assert after.keys() == before.keys() - {third} | {"a"}
    assert {
        each.change.rpartition(" over")[0] for each in list_versions(index)[1:]
    } <= {
        "1 item changed",
        "2 items changed",
        "1 image added, 1 item removed or replaced",
        "2 images added",
        "1 image added",
        "1 item removed",
        "2 items removed",
    }


def test_repeated_put_publishes_nothing(index: Path) -> None:
    jobs = [put(index, "a", "b", price=1)]
    apply_waiting(index)
    jobs += [
        put(index, "b", price=1),
        put(
            index,
            "unknown",
            data=[picture("pink")],
            price=1,
        ),
    ]
    apply_waiting(index)
    assert [status(index, job)["index_version"] for job in jobs] == [2, 3, 3]
    put(index, "a", "b", price=1)
    apply_waiting(index)
    assert current_version(index) == 3


def test_bad_job_ends_alone(index: Path) -> None:
    gone, *old = items_of(index)
    jobs = [
        put(index, "a", price=1),
        put(index, "b", data=[b"no picture"]),
        put(index, "c", price="cheap"),
        delete(index, gone),
        put(
            index,
            "a",
            "d",
            data=[b"no picture", picture("gold")],
        ),
        put(index, gone, data=[b"none"]),
        delete(index, *old),
    ]
    apply_waiting(index)
    found = [status(index, job) for job in jobs]
    assert [each["status"] for each in found] == [
        "done",
        "failed",
        "failed",
        "done",
        "done",
        "failed",
        "done",
    ]
    assert "can be read" in found[1]["reason"]
    assert "'price' is int64 in the index and string" in found[2]["reason"]
    assert [each["id"] for each in found[4]["failed"]] == ["a"]
    assert {*items_of(index)} == {"a", "d"}
    assert image_of(index, "a") == picture("pink")
    last = delete(index, "a", "d")
    apply_waiting(index)
    assert (
        status(index, last)["reason"]
        == "no item would be left; delete the index or the collection instead"
    )


@pytest.mark.parametrize(
    "error",
    [LockedError("another job is writing"), OSError(28, "No space left on device")],
)
def test_jobs_wait_while_the_index_is_read_only(
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    job = put(index, "a")
    monkeypatch.setattr(updates, "add", fail)
    monkeypatch.setitem(updates.MAX_STARTS, "put", 3)
    for _ in range(4):
        with pytest.raises(
            DcarError, match=r"another job is writing|No space left on device"
        ):
            apply_waiting(index)
    assert status(index, job)["status"] == "waiting"
    monkeypatch.setattr(updates, "add", add)
    assert apply_waiting(index) == 1
    assert status(index, job)["status"] == "done"


def test_full_disk_leaves_the_jobs_waiting(index: Path) -> None:
    jobs = [put(index, "a", "b", "c", text="long " * 12_000), delete(index, "unknown")]
    done = run("app.cli", "index", "apply", index, "--device", "cpu", file_size=200_000)
    assert done.returncode == 1
    assert current_version(index) == 1
    assert "cannot be written: " in done.stderr
    assert [status(index, job)["status"] for job in jobs] == ["waiting"] * 2
    apply_waiting(index)
    assert [status(index, job)["index_version"] for job in jobs] == [2, 2]


def test_two_processes_never_apply_the_same_jobs(index: Path) -> None:
    put(index, "a")
    with JobQueue(index).lock():
        done = dcar("index", "apply", index, "--device", "cpu")
        assert done.returncode == LockedError.exit_code
        assert current_version(index) == 1
        assert "another process applies" in done.stderr
    with versions.new_version(index), pytest.raises(LockedError):
        apply_waiting(index)
    assert dcar("index", "apply", index, "--device", "cpu").stdout.endswith(
        "1 jobs applied\n"
    )


def test_service_leaves_images_and_begun_jobs_to_a_process(index: Path) -> None:
    queue = JobQueue(index)
    first = next(iter(items_of(index)))
    patch(index, first, price=1)
    queue.show_progress(queue.next_batch())  # as before a kill
    assert status(index, queue.newest(1)[0]["id"])["progress"] == {
        "done": 0,
        "total": 1,
    }
    assert apply_waiting(index, images=False) == 0
    assert queue.waiting() == 1
    assert apply_waiting(index) == 1
    patch(index, first, price=2)
    delete(index, first)
    put(index, "a")
    assert apply_waiting(index, images=False) == 2
    assert queue.waiting() == 1
    assert first not in items_of(index)


@pytest.mark.parametrize("kind", ["put", "patch"])
def test_job_that_ends_its_process_is_given_up(
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The jobs beside it are applied."""
    first, second, third, *_ = items_of(index)
    if kind == "put":
        jobs = [
            put(index, "a"),
            put(index, "deadly"),
            put(index, "c"),
        ]
    else:
        jobs = [
            patch(index, first, price=1),
            patch(index, second, text="deadly"),
            patch(index, third, price=1),
        ]

    def die_of_images(index: Path, gallery: Gallery, **options: Any) -> Any:
        if "deadly" in gallery.table["id"].to_pylist():
            raise SystemExit("killed")
        return add(index, gallery, **options)

    def die_of_text(draft: FieldChanges, changes: Any) -> int:
        if any("deadly" in fields.values() for _, fields in changes):
            raise SystemExit("killed")
        return merge(draft, changes)

    monkeypatch.setattr(updates, "add", die_of_images)
    merge = FieldChanges.merge
    monkeypatch.setattr(FieldChanges, "merge", die_of_text)
    monkeypatch.setitem(updates.MAX_STARTS, "put", 5)
    for killed in count():
        try:
            apply_waiting(index)
        except SystemExit:
            assert killed < 7
        if not JobQueue(index).waiting():
            break
    assert [status(index, job)["status"] for job in jobs] == ["done", "failed", "done"]
    assert f"ended {updates.MAX_STARTS[kind]} times" in status(index, jobs[1])["reason"]


def test_images_that_no_version_shows_are_removed(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = JobQueue(index)
    put(index, "a", data=[picture("red")])
    put(index, "b", data=[picture("blue")])
    apply_waiting(index)
    delete(index, "a")
    done = put(index, "b", data=[picture("cyan")])
    (queue.images / ("0" * 64)).write_bytes(b"of a job that was never accepted")
    apply_waiting(index, keep=2)
    put(index, "d", data=[picture("gold")])
    with queue.lock():
        queue.sweep(older_s=0)
    assert stored_images(index) == {
        picture("blue"),
        picture("cyan"),
        picture("gold"),
    }, "an earlier version shows blue"
    delete(index, "b")
    put(index, "e", data=[picture("red")])
    assert apply_waiting(index, keep=1) == 3
    queue.sweep(older_s=0)
    assert stored_images(index) == {picture("gold"), picture("red")}
    assert status(index, done)["status"] == "done"
    verify_index(index)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 1e11)
        delete(index, "unknown")
        apply_waiting(index)
    assert JobQueue(index).status(done) is None, "forgotten after a week"


def test_first_items_of_a_collection_are_its_first_version(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "created"
    create_collection(folder, "lamps", tiny_checkpoint)
    create_collection(folder, "lamps", tiny_checkpoint)
    (index,) = list_collections(folder).values()
    drop_collection(index)
    # as a drop that has waited for another one leaves it
    (index / ".jobs.lock").parent.mkdir()
    create_collection(folder, "lamps", tiny_checkpoint)
    early: list[Callable[..., str]] = [delete, patch]
    jobs = [change(index, "a") for change in early]
    apply_waiting(index)
    assert {status(index, job)["status"] for job in jobs} == {"done"}
    job = put(index, "a", "b")
    for moment in (
        "index_jobs.jobs.build.rebuild",
        "index_jobs.index.job_queue.JobQueue.end",
    ):
        with pytest.MonkeyPatch.context() as killed:  # before and after its version
            killed.setattr(moment, die)
            with pytest.raises(KeyboardInterrupt):
                apply_waiting(index)
    put(index, "c")
    apply_waiting(index)
    assert items_of(index).keys() == {"a", "b", "c"}
    assert status(index, job)["status"] == "done"
    index = index.rename(index.with_name("0" * 32))
    assert [image_of(index, each) for each in ("a", "c")] == [picture("pink")] * 2
    listed = index / "items.jsonl"
    listed.write_text(dcar("index", "items", index).stdout)
    rebuild(listed, tiny_checkpoint, index, progress=False, force=True)
    JobQueue(index).sweep(older_s=0)
    assert {*items_of(index)} == {"a", "b", "c"}
    assert not open_current(index).manifest.additions
    assert image_of(index, "a") == picture("pink")
    verify_index(index)
    drop_collection(index)
    assert list_collections(folder) == {}
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_lock_that_makes_a_dropped_index_again_removes_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it was dropped between the look and the lock."""
    shutil.rmtree(index)
    monkeypatch.setattr(Path, "is_dir", lambda *_, **__: True)
    with pytest.raises(FileNotFoundError), JobQueue(index).lock():
        pass
    assert not index.exists()
