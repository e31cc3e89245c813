"""Jobs killed at the n-th call that makes something durable: fsync, rename, or a write
to an object store.

A process that has imported everything forks one for each case, and for each step of an
attempt: to prepare an index, to run a job on it until it is killed, and to check what
is left, which the job, repeated, completes.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from index_jobs.index.changes import change_metadata
from index_jobs.index.job_queue import JobQueue
from index_jobs.index.stores import ObjectStore, index_path, store_of
from index_jobs.index.versions import (
    current_version,
    list_versions,
    new_version,
    open_current,
    pull,
    rollback,
    verify_index,
)
from index_jobs.jobs.update import add, apply_waiting, remove
from index_jobs.rebuild import rebuild
from tests.support.jobs import delete, patch, picture, put
from tests.support.object_store import ObjectStore as Server
from tests.support.parts import PARTS, needs
from tests.support.versions import publish_copy

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

static long calls, last;

void arm(long number) { calls = 0; last = number; }
long count(void) { return calls; }
void step(void) { if (++calls == last) kill(getpid(), SIGKILL); }

#define WRAP(name, given, passed) \\
    int name given { \\
        int (*real) given = (int (*) given)dlsym(RTLD_NEXT, #name); \\
        step(); \\
        return real passed; \\
    }

WRAP(fsync, (int file), (file))
WRAP(fdatasync, (int file), (file))
WRAP(rename, (const char *from, const char *to), (from, to))
WRAP(renameat, (int one, const char *from, int other, const char *to),
     (one, from, other, to))
"""
# Moments of a job, evenly spread where it has more.
MOST = int(os.environ.get("KILLS") or (12 if PARTS["time"].is_present else 3))


class Given(NamedTuple):
    """What cases are made of: two galleries and a model, and an index of the first
    one.
    """

    gallery: Path
    more: Path
    checkpoint: Path
    published: Path

    def item(self, row: int) -> str:
        return open_current(self.published).item(row).id


class Case(NamedTuple):
    """prepare: makes an index below a folder. job: changes it, and may be repeated.
    require: what holds then.
    """

    prepare: Callable[[Given, Path], Path]
    job: Callable[[Given, Path], object]
    require: Callable[[Given, Path], object] = lambda given, index: None


def library(folder: Path) -> Path:
    """Compile the library that counts calls."""
    (folder / "killing.c").write_text(SOURCE)
    subprocess.run(
        [
            "cc",
            "-shared",
            "-fPIC",
            "-o",
            folder / "killing.so",
            folder / "killing.c",
            "-ldl",
        ],
        check=True,
    )
    return folder / "killing.so"


def _copied(given: Given, folder: Path) -> Path:
    return Path(shutil.copytree(given.published, folder / "index"))


def _with_changes(given: Given, folder: Path) -> Path:
    index = _copied(given, folder)
    put(
        index,
        "a",
        "bad",
        data=[picture("pink"), b"no picture"],
    )
    put(index, "b")
    patch(index, given.item(1), price=1)
    patch(index, given.item(1), caption="a guitar")
    delete(index, given.item(3), "b")
    _change(given, index)
    return index


def _in_a_store(given: Given, folder: Path) -> Path:
    index = index_path(f"s3://bucket/{folder.name}/index")
    publish_copy(index, source=given.published)
    return index


def _build(given: Given, index: Path) -> None:
    rebuild(given.gallery, given.checkpoint, index, workers=0, progress=False)


def _add(given: Given, index: Path) -> None:
    add(
        index,
        given.more,
        replace_existing=True,
        workers=0,
        progress=False,
    )


def _remove(given: Given, index: Path) -> None:
    remove(
        index,
        [given.item(3)],
        missing_ok=True,
        keep=1,
    )


def _change(given: Given, index: Path) -> None:
    change_metadata(
        index,
        [(given.item(5), {"price": 1, "caption": "a guitar"})],
        "a table",
    )


def _apply(_: Given, index: Path) -> None:
    apply_waiting(index, device="cpu", workers=0)


def _require_applied(given: Given, index: Path) -> None:
    jobs = JobQueue(index).newest(9)[::-1]
    opened = open_current(index)
    assert [job["status"] for job in jobs] == ["done"] * 5
    assert [each["id"] for each in jobs[0]["failed"]] == ["bad"]
    published = [opened.manifest]
    manifests = {each.version: each for each in list_versions(index)}
    while published[-1].replaced:
        published.append(manifests[published[-1].replaced])
    assert len(published) == 5, "nothing is published twice"
    assert [opened.row_of(each) for each in ("b", given.item(3))] == [None, None]
    assert opened.image_bytes(opened.row_of("a") or 0) == picture("pink")
    item = opened.item(1)
    assert item.caption == "a guitar"
    assert item.metadata["price"] == 1


def _accept(_: Given, index: Path) -> None:
    with index.with_name("accepted").open("a", buffering=1) as file:
        file.writelines(put(index, name) + "\n" for name in ("c", "d"))


def _require_accepted(_: Given, index: Path) -> None:
    accepted = index.with_name("accepted").read_text().split()
    assert {JobQueue(index).status(each)["status"] for each in accepted} == {"waiting"}  # type: ignore[index]


CASES = {
    "a build": Case(lambda _, folder: folder / "index", _build),
    "an addition": Case(_copied, _add),
    "a removal": Case(_copied, _remove),
    "a change of metadata": Case(_copied, _change),
    "a rollback": Case(_with_changes, lambda _, index: rollback(index, 1)),
    "accepted changes": Case(_with_changes, _apply, _require_applied),
    "an acceptance": Case(_copied, _accept, _require_accepted),
    "a removal in a store": Case(_in_a_store, _remove),
    "an addition in a store": Case(_in_a_store, _add),
}


class CountedStore:
    """The obstore object of an index, whose writes are counted."""

    def __init__(self, real: Any, step: Callable[[], object]) -> None:
        self._real = real
        self._step = step

    def __getattr__(self, method: str) -> Any:
        if method in ("put", "delete"):
            self._step()
        return getattr(self._real, method)


def run(case: Case, given: Given, index: Path, number: int, counted: Path) -> None:
    """Run a job until its n-th call, or to its end."""
    counter = ctypes.CDLL(os.environ["LD_PRELOAD"])
    if isinstance(store := store_of(index), ObjectStore):
        store.objects = CountedStore(store.objects, counter.step)
    counter.arm(number)
    case.job(given, index)
    counted.write_text(str(counter.count()))


def check(case: Case, given: Given, index: Path) -> None:
    """Require that CURRENT names a complete version, and that the job, repeated,
    completes and cleans up.
    """
    pull(index, history=True)
    if current_version(index) is not None:
        verify_index(index)
    case.job(given, index)
    case.require(given, index)
    with new_version(index):
        pass  # the next writer removes what is left
    verify_index(index)
    named = {
        info.sha256
        for manifest in list_versions(index)
        for info in manifest.files.values()
    }
    assert {path.name for path in (index / "blobs").iterdir()} == named


def _forked(call: Callable[[], object]) -> int:
    """Return the status of a process that makes a call: 0, 1 with its traceback on
    stderr, or -9.
    """
    if (child := os.fork()) == 0:
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(name: str, folder: Path, given: Given, number: int) -> int:
    """Kill a job at its n-th call, 0 for never, and return the number of calls if it
    has ended before.
    """
    case = CASES[name]
    counted = folder / "count"
    prepared = folder / "index"
    (place := folder / f"{number}").mkdir()
    os.environ["DCAR_RUNTIME_CACHE"] = str(place / "cache")
    made = _forked(lambda: prepared.write_text(str(case.prepare(given, place))))
    index = Path(prepared.read_text())
    ended = _forked(lambda: run(case, given, index, number, counted))
    if made or ended not in (0, -9) or _forked(lambda: check(case, given, index)):
        sys.exit(f"{name}, killed at call {number}, fails")
    shutil.rmtree(place)
    return int(counted.read_text())


def attempt_all(
    environment: dict[str, str],
    name: str,
    folder: Path,
    given: Given,
) -> None:
    os.environ |= environment
    total = attempt(name, folder, given, 0)
    for number in sorted(
        {1 + round(each * (total - 1) / (MOST - 1)) for each in range(MOST)}
    ):
        attempt(name, folder, given, number)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """A function that runs `attempt_all` in a process that counts calls, and returns 0,
    or 1 after a traceback.
    """
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library(tmp_path_factory.mktemp("library"))),
    }
    command = [sys.executable, "-m", "tests.index_jobs.test_killed"]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def run(environment: dict[str, str], *given: object) -> int:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps([environment, *map(str, given)]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run


@needs("cc")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=needs("object-store") if "store" in case else ())
        for case in CASES
    ],
)
def test_current_names_a_complete_version_whenever_a_job_is_killed(
    case: str,
    attempts: Callable[..., int],
    published: Path,
    tiny_gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    # other names, other ids
    shutil.copytree(tiny_gallery / "circle", tmp_path / "more" / "round")
    (folder := tmp_path / "attempts").mkdir()
    with Server() if "store" in case else nullcontext() as store:
        environment = store.environment if store else {}
        assert (
            attempts(
                environment,
                case,
                folder,
                tiny_gallery,
                tmp_path / "more",
                tiny_checkpoint,
                published,
            )
            == 0
        )


if __name__ == "__main__":
    import tests.support.preloaded  # noqa: F401

    for line in sys.stdin:
        environment, name, folder, *given = json.loads(line)
        run_all = partial(
            attempt_all,
            environment,
            name,
            Path(folder),
            Given(*map(Path, given)),
        )
        sys.stdout.write(f"{_forked(run_all)}\n")
        sys.stdout.flush()
