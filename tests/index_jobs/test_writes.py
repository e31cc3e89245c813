"""Changes that a service accepted, applied by `dcar index apply`: killed, refused, without disk space, repeated."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.util.errors import DcarError, LockedError
from index_jobs.jobs import apply
from index_jobs.jobs.apply import apply_writes
from index_jobs.jobs.update import add
from index_jobs.rebuild import rebuild
from index_jobs.store import changes as store_changes
from index_jobs.store import publish
from index_jobs.store.artifact import Artifact
from index_jobs.store.versions import current_version, open_current, verify_index
from index_jobs.store.writes import WriteQueue, create_collection, drop_collection, list_collections, sweep
from tests.support.commands import Command, dcar, run
from tests.support.files import write_file
from tests.support.jobs import delete, patch, picture, put, status


def ids_of(artifact: Artifact) -> set[str]:
    return {artifact.item(row).id for row in artifact.live.nonzero()[0].tolist()}


def images_of(index: Path) -> list[str]:
    return sorted(path.parent.name for path in (index / "writes" / "images").glob("*/*"))


def test_waiting_jobs_become_one_version_with_their_images(index: Path, encoder: Encoder) -> None:
    jobs = [put(index, "a", "b", price=3), put(index, "c", color="cyan", price=4.5)]
    assert [status(index, job)["status"] for job in jobs] == ["waiting", "waiting"]
    assert apply_writes(index) == 2
    artifact = open_current(index)
    assert (artifact.manifest.version, artifact.manifest.count) == (2, 27)
    row = artifact.row_of("c")
    assert row is not None
    item = artifact.item(row)
    assert (item.caption, item.category, item.metadata["price"]) == ("a cyan c", "new", 4.5)
    assert artifact.image_bytes(row) == picture("cyan")
    found = artifact.search(encoder.encode_images([picture("cyan")]), 1)[1][0, 0]
    assert found == row
    ended = status(index, jobs[0])
    assert ended.pop("accepted") <= ended.pop("ended")
    assert ended == {"kind": "put", "items": 2, "status": "done", "index_version": 2, "failed": []}
    assert apply_writes(index) == 0
    assert verify_index(index)[-1].version == 2


def test_the_status_of_a_waiting_job_is_read_without_its_items(index: Path) -> None:
    ids = [f"{number:01000d}" for number in range(10_000)]
    job = delete(index, *ids)
    (path,) = (index / "writes" / "queue").glob("*.json")
    path.write_bytes(path.read_bytes()[:200])
    found = status(index, job)
    assert (found["kind"], found["items"], found["status"]) == ("delete", 10_000, "waiting")


def test_last_change_of_an_id_wins(index: Path) -> None:
    put(index, "a", "b", color="pink")
    put(index, "a", color="cyan")
    delete(index, "b", "unknown")
    last = put(index, "c")
    apply_writes(index)
    artifact = open_current(index)
    row = artifact.row_of("a")
    assert row is not None
    assert artifact.image_bytes(row) == picture("cyan")
    assert (artifact.row_of("b"), artifact.row_of("c") is not None) == (None, True)
    assert status(index, last)["index_version"] == 2, "nothing that was published had to be deleted"
    again = [put(index, "a", color="cyan"), delete(index, "b")]
    apply_writes(index)
    assert ids_of(open_current(index)) == ids_of(artifact)
    assert {status(index, job)["status"] for job in again} == {"done"}


def test_jobs_keep_their_order_although_the_clock_is_set_back(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(index, "a")
    hour_ago = time.time_ns() - 3_600_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago)
    delete(index, "a")
    put(index, "b", color="pink")
    put(index, "b", color="cyan")
    apply_writes(index)
    artifact = open_current(index)
    row = artifact.row_of("b")
    assert row is not None
    assert (artifact.row_of("a"), artifact.image_bytes(row)) == (None, picture("cyan"))


def test_bad_job_ends_alone(index: Path) -> None:
    jobs = [
        put(index, "a", price=1),
        put(index, "b", data=[b"no picture"]),
        put(index, "c", price="cheap"),
        delete(index, *ids_of(open_current(index))),
    ]
    apply_writes(index)
    found = [status(index, job) for job in jobs]
    assert [each["status"] for each in found] == ["done", "failed", "failed", "done"]
    assert "can be read" in found[1]["reason"]
    assert "'price' is int64 in the index and string" in found[2]["reason"]
    assert ids_of(open_current(index)) == {"a"}
    last = delete(index, "a")
    apply_writes(index)
    assert status(index, last)["reason"] == "no item would be left; delete the index or the collection instead"


@pytest.mark.parametrize("others", [0, 1])
def test_repeated_batch_ends_as_an_undisturbed_one(index: Path, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """As after a kill between the publication and the record of the jobs' ends."""
    queue, jobs = WriteQueue(index), [put(index, "good", "bad", data=[picture("pink"), b"no picture"])]
    jobs += [put(index, "worse", data=[b"no picture"]) for _ in range(others)]
    queue.set_progress(jobs, 1, 0, 2 + others)
    with monkeypatch.context() as patch:
        patch.setattr(WriteQueue, "end", lambda *_, **__: None)
        apply._publish(queue, index, [queue.read(job) for job in jobs], {"workers": 0})
    assert (current_version(index), status(index, jobs[0])["status"]) == (2, "running")
    apply_writes(index)
    assert current_version(index) == 2
    found = status(index, jobs[0])
    assert (found["status"], found["index_version"], [each["id"] for each in found["failed"]]) == ("done", 2, ["bad"])
    for job in jobs[1:]:
        assert status(index, job)["reason"].startswith("no image can be read")


def test_unreadable_image_takes_no_earlier_change_of_its_id_away(index: Path) -> None:
    """As if the jobs had been applied one by one."""
    gone = min(ids_of(open_current(index)))
    jobs = [put(index, "a"), delete(index, gone)]
    jobs.append(put(index, "a", "b", data=[b"no picture", picture("gold")]))
    jobs += [put(index, each, data=[b"no picture"]) for each in ("a", gone)] + [put(index, "c")]
    apply_writes(index)
    found = [status(index, job) for job in jobs]
    assert [each["status"] for each in found] == ["done", "done", "done", "failed", "failed", "done"]
    assert [each["id"] for each in found[2]["failed"]] == ["a"]
    assert {"a", "b", "c"} <= ids_of(open_current(index)) - {gone}
    assert gone not in ids_of(open_current(index))
    verify_index(index)


@pytest.mark.parametrize("error", [LockedError("another job is writing"), OSError(28, "No space left on device")])
def test_jobs_wait_while_the_index_cannot_be_written(
    index: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    job = put(index, "a")
    monkeypatch.setattr(apply, "add", fail)
    monkeypatch.setattr(apply, "MAX_STARTS", 3)
    for _ in range(4):
        with pytest.raises(DcarError, match=r"another job is writing|No space left on device"):
            apply_writes(index)
    assert status(index, job)["status"] == "waiting"
    monkeypatch.setattr(apply, "add", add)
    assert apply_writes(index) == 1
    assert status(index, job)["status"] == "done"


@pytest.mark.parametrize("most", [10_000, 200_000])
def test_full_disk_leaves_the_jobs_waiting(index: Path, most: int) -> None:
    """First the list of images cannot be written, then the items of the new version."""
    jobs = [put(index, "a", "b", "c", text="long " * 12_000), delete(index, "unknown")]
    done = run("app.cli", "index", "apply", index, "--device", "cpu", file_size=most)
    assert (done.returncode, current_version(index)) == (1, 1)
    assert "cannot be written: File too large" in done.stderr
    assert [status(index, job)["status"] for job in jobs] == ["waiting"] * 2
    assert not list((index / "versions").glob(".tmp*"))
    apply_writes(index)
    assert [status(index, job)["index_version"] for job in jobs] == [2, 2]


def test_two_processes_never_apply_the_same_jobs(index: Path) -> None:
    put(index, "a")
    with WriteQueue(index).lock():
        done = dcar("index", "apply", index, "--device", "cpu")
        assert (done.returncode, current_version(index)) == (LockedError.exit_code, 1)
        assert "another process applies" in done.stderr
    with publish.open_staging(index), pytest.raises(LockedError):
        apply_writes(index)
    assert dcar("index", "apply", index, "--device", "cpu").stdout.endswith("1 jobs applied\n")


def test_job_that_ends_its_process_is_given_up(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs beside it are applied."""
    monkeypatch.setattr(apply, "MAX_STARTS", 3)
    jobs = [put(index, "a"), put(index, "deadly"), put(index, "c")]
    killed = [0]

    def add_or_die(index: Path, gallery: Path, **options: Any) -> Any:
        if "deadly" in gallery.read_text():
            killed[0] += 1
            raise SystemExit("killed")
        return add(index, gallery, **options)

    monkeypatch.setattr(apply, "add", add_or_die)
    while WriteQueue(index).waiting():
        try:
            apply_writes(index)
        except SystemExit:
            assert killed[0] <= 4 * apply.MAX_STARTS
    assert [status(index, job)["status"] for job in jobs] == ["done", "failed", "done"]
    assert "given up" in status(index, jobs[1])["reason"]
    assert {"a", "c"} <= ids_of(open_current(index))


def test_change_of_metadata_that_ends_its_process_thrice_is_given_up(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [patch(index, filter={"id": {"not": "a"}}, text="deadly"), delete(index, "unknown")]

    def die(*_: Any) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr(store_changes, "apply_patches", die)  # by the service
    monkeypatch.setattr(apply, "apply_patches", die)
    with pytest.raises(SystemExit):
        store_changes.apply_waiting(index, 3)
    for _ in range(2):
        with pytest.raises(SystemExit):
            apply_writes(index)
    apply_writes(index)
    assert [status(index, job)["status"] for job in jobs] == ["failed", "done"]
    assert "ended 3 times" in status(index, jobs[0])["reason"]


def test_images_that_no_version_shows_are_removed(index: Path) -> None:
    queue = WriteQueue(index)
    first, second = put(index, "a", "b"), put(index, "c")
    apply_writes(index)
    delete(index, "a", "c")
    third = put(index, "b", color="cyan")
    orphan = queue.images / ("0" * 32)
    orphan.mkdir()
    (orphan / "0.png").write_bytes(b"of a job that was never accepted")
    apply_writes(index, keep=2)
    waiting = put(index, "d")
    sweep(queue, index, older_s=0)
    assert images_of(index) == sorted([first, first, second, third, waiting]), "an earlier version shows them"
    delete(index, "b")
    apply_writes(index, keep=1)
    sweep(queue, index, older_s=0)
    assert images_of(index) == [waiting]
    assert status(index, third)["status"] == "done"
    assert verify_index(index)[-1].count == 25


MOMENTS = [
    ("before", "index_jobs.store.writes.WriteQueue.set_progress"),
    ("before", "index_jobs.encoding.shards.ShardStore.save"),
    ("before", "index_jobs.store.publish.prepare_version"),
    ("before", "index_jobs.store.publish.write_current"),
    ("after", "index_jobs.store.publish.write_current"),
    ("before", "index_jobs.store.writes.WriteQueue.end"),
    ("after", "index_jobs.store.writes.WriteQueue.end"),
    ("before", "index_jobs.jobs.apply.sweep"),
]
KILLED_AT = """
import os, signal, sys, importlib
from pathlib import Path
from index_jobs.jobs.apply import apply_writes
place, after, index = sys.argv[1], sys.argv[2] == "after", Path(sys.argv[3])
module, _, name = place.rpartition(".")
try:
    owner = importlib.import_module(module)
except ImportError:
    module, _, cls = module.rpartition(".")
    owner = getattr(importlib.import_module(module), cls)
real = getattr(owner, name)


def killed(*given, **options):
    if after:
        real(*given, **options)
    os.kill(os.getpid(), signal.SIGKILL)


setattr(owner, name, killed)
apply_writes(index, device="cpu", workers=0)
"""


@pytest.mark.parametrize(("when", "moment"), MOMENTS)
@pytest.mark.slow
def test_killed_process_leaves_complete_versions_and_every_job_ends(index: Path, when: str, moment: str) -> None:
    gone = sorted(ids_of(open_current(index)))[:2]
    jobs = [put(index, "a", "b"), delete(index, *gone), put(index, "c")]
    command = Command("-c", KILLED_AT, moment, when, index)
    _, errors = command.communicate()
    assert command.returncode == -signal.SIGKILL, errors
    verify_index(index)
    found = ids_of(open_current(index))
    assert {"a", "b", "c"} <= found or not {"a", "b", "c"} & found, "the version has the batch, or nothing of it"
    apply_writes(index)
    assert [status(index, job)["status"] for job in jobs] == ["done"] * 3
    assert WriteQueue(index).waiting() == []
    assert {"a", "b", "c"} <= ids_of(open_current(index))
    assert not set(gone) & ids_of(open_current(index))
    assert verify_index(index)[-1].count == 25


MOMENTS_OF_PATCHES = [
    ("before", "index_jobs.store.writes.WriteQueue.set_progress"),
    ("after", "index_jobs.store.items.Items.write_changed"),
    ("before", "index_jobs.store.publish.write_current"),
    ("after", "index_jobs.store.publish.write_current"),
    ("after", "index_jobs.store.writes.WriteQueue.end"),
]


@pytest.mark.parametrize(("when", "moment"), MOMENTS_OF_PATCHES)
@pytest.mark.slow
def test_killed_process_loses_no_change_of_metadata(index: Path, when: str, moment: str) -> None:
    first, second = sorted(ids_of(open_current(index)))[:2]
    jobs = [patch(index, first, price=1), patch(index, second, price=2), patch(index, first, caption="a guitar")]
    command = Command("-c", KILLED_AT, moment, when, index)
    _, errors = command.communicate()
    assert command.returncode == -signal.SIGKILL, errors
    verify_index(index)
    apply_writes(index)
    assert [status(index, job)["status"] for job in jobs] == ["done"] * 3
    artifact = open_current(index)
    items = [artifact.item(row) for row in (artifact.row_of(first), artifact.row_of(second)) if row is not None]
    assert [each.metadata["price"] for each in items] == [1, 2]
    assert items[0].caption == "a guitar"
    verify_index(index)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_job_ends_although_its_process_is_killed_eight_times(index: Path) -> None:
    """At random times, while jobs keep arriving."""
    generator = np.random.default_rng(0)
    jobs, expected, kills, longest = list[str](), ids_of(open_current(index)), 0, 2.0
    while kills < 8:
        names = {f"n{number}" for number in generator.integers(0, 12, 2).tolist()}
        if generator.random() < 0.4:
            jobs.append(delete(index, *names))
            expected -= names
        else:
            jobs.append(put(index, *sorted(names), color=str(generator.choice(["pink", "cyan", "gold"]))))
            expected |= names
        started = time.monotonic()
        command = Command("app.cli", "index", "apply", index, "--device", "cpu", "--workers", 0)
        try:
            _, errors = command.communicate(generator.uniform(0.02, longest))
            assert command.returncode == 0, errors
            longest = min(longest, time.monotonic() - started)  # kill later ones before their ends
        except subprocess.TimeoutExpired:
            kills += 1
        verify_index(index)
    apply_writes(index)
    assert {status(index, job)["status"] for job in jobs} == {"done"}
    assert ids_of(open_current(index)) == expected
    assert not list((index / "versions").glob(".tmp*"))


def test_first_items_of_a_collection_are_its_first_version(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "created"
    create_collection(folder, "lamps", tiny_checkpoint)
    create_collection(folder, "lamps", tiny_checkpoint)
    (index,) = list_collections(folder).values()
    drop_collection(index)
    write_file(index / "writes" / ".lock", b"")  # as a drop that has waited for another one leaves it
    create_collection(folder, "lamps", tiny_checkpoint)
    early = delete(index, "a")
    apply_writes(index)
    assert status(index, early)["status"] == "done"
    job = put(index, "a", "b")
    for killed_at in ("prepare_version", "write_current"):  # without a version, and with one that is not yet current
        command = Command("-c", KILLED_AT, f"index_jobs.store.publish.{killed_at}", "before", index)
        command.communicate()
        assert (command.returncode, current_version(index)) == (-signal.SIGKILL, None)
    put(index, "c")
    apply_writes(index)
    assert ids_of(open_current(index)) == {"a", "b", "c"}
    assert status(index, job)["status"] == "done"
    listed = index / "writes" / "items.jsonl"
    listed.write_text(dcar("index", "items", index).stdout)
    rebuild(listed, tiny_checkpoint, index, progress=False, force=True)
    sweep(WriteQueue(index), index, older_s=0)
    rebuilt = open_current(index)
    assert (ids_of(rebuilt), rebuilt.manifest.additions) == ({"a", "b", "c"}, [])
    assert rebuilt.image_bytes(0) == picture("pink")
    verify_index(index)
    drop_collection(index)
    assert (list_collections(folder), [path.name for path in folder.iterdir()]) == ({}, [".lock"])
