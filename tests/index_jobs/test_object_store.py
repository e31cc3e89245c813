"""An index in object storage, on a real server: publications, races, kills, damage, and
disks that do not fill up.
"""

import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError, LockedError, StoreUnavailableError
from index_jobs.engines.faiss.build import FaissEngine
from index_jobs.index.concepts import Concept, drop_concept, put_concept, read_concepts
from index_jobs.index.manifest import Current, FileInfo
from index_jobs.index.stores import Directory, store_of, verify
from index_jobs.index.versions import (
    current_version,
    list_versions,
    new_version,
    open_current,
    published_index,
    pull,
    rollback,
    verify_index,
    version_numbers,
)
from index_jobs.jobs.update import remove
from tests.support.commands import run
from tests.support.object_store import Machines, ObjectStore
from tests.support.parts import needs
from tests.support.versions import Build, copy_files, file_of, publish_copy

pytestmark = needs("object-store")


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as server:
        yield server


@pytest.fixture
def machines(
    server: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machines:
    """Machines of one index, which has no version yet."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Machines(tmp_path, f"s3://bucket/{uuid.uuid4().hex}/index")


@pytest.fixture
def mirror(machines: Machines, published: Path) -> Path:
    """The mirror of a machine that has published version 1."""
    assert publish_copy(machines["builder"], source=published) == 1
    return machines["builder"]


def remote(mirror: Path) -> Any:
    """The object store of a mirror, whose `objects` is that of obstore."""
    return store_of(mirror)


def store(mirror: Path) -> Any:
    return remote(mirror).objects


def numbers(mirror: Path) -> list[str]:
    """The manifests in the store."""
    return sorted(each["path"] for each in store(mirror).list("versions/").collect())


@contextmanager
def before(
    mirror: Path,
    method: str,
    act: Callable[[], object],
    key: str = "",
) -> Iterator[None]:
    """Call `act` before a machine's first call of a method of its store, for a key or
    for any.
    """
    found = remote(mirror)
    acted = list[bool]()

    class Store:
        def __getattr__(self, name: str) -> Any:
            def call(*given: Any, **options: Any) -> Any:
                if name == method and not acted and key in ("", given[0]):
                    acted.append(True)
                    act()
                return getattr(real, name)(*given, **options)

            return call

    real = found.objects
    found.objects = Store()
    try:
        yield
        assert acted
    finally:
        found.objects = real


def follow(mirror: Path) -> int | None:
    """Bring the published version, compare its files, and return its number."""
    published_index(mirror)
    current = open_current(mirror)
    verify(Directory(mirror), current.manifest, set())
    return current.manifest.version


def first_id(mirror: Path) -> str:
    current = open_current(mirror)
    return current.item(int(np.flatnonzero(current.live)[0])).id


@pytest.mark.slow
def test_what_one_machine_builds_others_read_change_and_roll_back(
    build: Build,
    machines: Machines,
    tiny_gallery: Path,
    tiny_checkpoint: Path,
) -> None:
    arguments = [
        "--gallery",
        tiny_gallery,
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        machines.url,
        "--json",
        "--quiet",
    ]
    built = run(
        "app.cli",
        "index",
        "build",
        *arguments,
        environment=machines.cache("builder"),
    )
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["version"] == 1
    shown = run(
        "app.cli",
        "index",
        "build",
        *arguments[:-2],
        environment=machines.cache("builder"),
    ).stdout
    assert shown.startswith(f"{machines.url}: version 1 is up to date"), (
        "people know no mirror"
    )
    assert follow(machines["reader"]) == 1
    before = open_current(machines["reader"])
    rows = np.arange(before.rows)
    np.testing.assert_array_equal(
        before.vectors(rows), open_current(machines["builder"]).vectors(rows)
    )
    assert build(out=machines["empty"]).reused, (
        "a job finds what another machine has published"
    )
    again = build(out=machines["gate"], target_recall=0.9)
    assert again.gate is not None
    assert again.gate["passed"], (
        "a job compares with what another machine has published"
    )
    blobs = len(store(machines["reader"]).list("blobs/").collect())
    remove(machines["editor"], [first_id(machines["reader"])])
    assert len(store(machines["reader"]).list("blobs/").collect()) < blobs + 5, (
        "versions share their files"
    )
    assert follow(machines["reader"]) == 3
    assert open_current(machines["reader"]).manifest.count == before.manifest.count - 1
    listed = run(
        "app.cli",
        "index",
        "list",
        machines.url,
        environment=machines.cache("operator"),
    ).stdout.splitlines()
    assert [line[:6] for line in listed] == ["*    3", "     2", "     1"]
    assert not [*machines["operator"].glob("blobs/*")], "a list needs no files"
    assert rollback(machines["operator"]) == 2
    assert follow(machines["reader"]) == 2
    verified = run(
        "app.cli",
        "index",
        "verify",
        machines.url,
        environment=machines.cache("auditor"),
    )
    assert verified.stdout.count("are as published") == 3


def test_one_of_sixteen_racing_publishers_wins(
    mirror: Path, machines: Machines
) -> None:
    ready = threading.Barrier(16)
    outcomes = list[str]()
    refusals = list[str]()
    mirrors = [machines[f"publisher {number}"] for number in range(16)]

    def publish(mirror: Path) -> None:
        with new_version(mirror) as new:
            manifest = replace(copy_files(mirror, new.folder), change=mirror.parts[-6])
            ready.wait(60)
            try:
                new.publish(manifest)
                outcomes.append(manifest.change)
            except LockedError as error:
                refusals.append(str(error))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(publish, mirrors))
    assert (
        refusals
        == [
            f"another job has published to {machines.url} meanwhile; run the same"
            " command again"
        ]
        * 15
    )
    assert follow(machines["reader"]) == 2
    assert outcomes == [open_current(machines["reader"]).manifest.change]
    assert [follow(each) for each in mirrors] == [2] * 16
    assert publish_copy(mirrors[0]) == 3, "a loser runs again"


def test_publication_after_a_rollback_elsewhere_is_refused_without_a_version(
    mirror: Path, machines: Machines
) -> None:
    publish_copy(mirror)
    with new_version(mirror) as new:
        manifest = copy_files(mirror, new.folder)
        rollback(machines["operator"], 1)
        with pytest.raises(LockedError, match="run the same command again"):
            new.publish(manifest)
    assert follow(machines["operator"]) == 1
    pull(mirror, history=True)
    assert version_numbers(mirror) == [1, 2]


def test_current_names_a_version_that_the_store_has_whoever_comes_first(
    mirror: Path,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = machines["operator"]
    reader = machines["reader"]
    rolled_back = list[int]()
    publish_copy(mirror)

    def roll_back(*_: object) -> None:
        if not rolled_back:
            rolled_back.append(1)
            rollback(operator, 1)

    # after CURRENT is replaced, before old versions are removed
    monkeypatch.setattr(FaissEngine, "sync", roll_back)
    publish_copy(mirror, keep=2)
    assert follow(reader) == 1
    publish_copy(mirror, keep=2)
    with (
        before(operator, "put", lambda: publish_copy(mirror, keep=2)),
        pytest.raises(LockedError),
    ):
        rollback(operator, 1)
    assert follow(reader) == 5
    with (
        before(
            mirror,
            "put",
            lambda: rollback(operator, 4),
            key="CURRENT",
        ),
        pytest.raises(LockedError),
    ):
        publish_copy(mirror, keep=1)
    assert follow(reader) == 4
    assert follow(machines["another reader"]) == 4


@pytest.mark.parametrize("key", ["versions/", "CURRENT"])
@pytest.mark.parametrize("is_repeated", [True, False])
def test_write_whose_response_is_lost_is_no_lost_race(
    is_repeated: bool,
    key: str,
    mirror: Path,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from obstore.exceptions import GenericError

    real = store(mirror)
    lost = list[str]()

    class Store:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def put(self, name: str, *given: Any, **options: Any) -> Any:
            if name.startswith(key):
                lost.append(str(real.put(name, *given, **options)))
                if not is_repeated:
                    raise GenericError("connection reset")
            return real.put(name, *given, **options)

    monkeypatch.setattr(remote(mirror), "objects", Store())
    assert publish_copy(mirror) == 2
    assert follow(machines["reader"]) == 2
    assert publish_copy(mirror) == 3, "it knows what it has written"
    assert len(lost) == 2


def test_version_that_a_loser_takes_back_meanwhile_does_not_end_another_job(
    mirror: Path, machines: Machines
) -> None:
    publish_copy(mirror)
    rollback(mirror)
    key = "versions/2.json"
    other = machines["other"]
    pull(other, history=True)
    with before(
        other,
        "get",
        lambda: store(mirror).delete(key),
        key=key,
    ):
        assert publish_copy(other) == 2
    assert follow(machines["reader"]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-1],
        lambda data: data[:50],
    ],
)
def test_corrupted_blob_is_refused_until_it_is_published_again(
    damage: Any,
    mirror: Path,
    machines: Machines,
) -> None:
    assert follow(machines["reader"]) == 1
    publish_copy(mirror)
    remove(mirror, [first_id(mirror)])
    key = f"blobs/{open_current(mirror).manifest.files['removed.npy'].sha256}"
    data = bytes(store(mirror).get(key).bytes())
    store(mirror).put(key, damage(data))
    with pytest.raises(
        ArtifactError,
        match=r"s3://bucket/.*is corrupted: its checksum differs; roll back",
    ):
        published_index(machines["reader"])
    assert current_version(machines["reader"]) == 1
    with pytest.raises(ArtifactError):
        verify_index(machines["reader"])
    pull(machines["job"], history=True)  # which can replace it
    store(mirror).delete(key)
    with pytest.raises(ArtifactError, match="lacks an object"):
        published_index(machines["reader"])
    assert rollback(machines["operator"]) == 2
    publish_copy(mirror)
    assert follow(machines["reader"]) == 4


def test_files_of_a_hostile_manifest_are_not_written(
    mirror: Path, machines: Machines
) -> None:
    manifest = open_current(mirror).manifest
    for name in ("../../outside", "/tmp/outside"):
        files = {
            **manifest.files,
            name: FileInfo(1, next(iter(manifest.files.values())).sha256),
        }
        hostile = replace(manifest, files=files).to_bytes()
        store(mirror).put("versions/1.json", hostile)
        store(mirror).put(
            "CURRENT", Current(1, hashlib.sha256(hostile).hexdigest()).to_bytes()
        )
        with pytest.raises(ArtifactError, match=f"names the file '{name}'"):
            published_index(machines["reader"])
    assert not (machines["reader"] / "outside").exists()


def test_old_versions_and_blobs_are_removed(
    mirror: Path,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blobs = set[int]()
    assert follow(machines["reader"]) == 1
    # while it was fetching a file
    (killed := machines["reader"] / f"blobs/.{'0' * 64}.tmp").touch()
    for _ in range(5):
        remove(mirror, [first_id(mirror)], keep=2)
        assert follow(machines["reader"]) == current_version(mirror)
        assert len(version_numbers(machines["reader"])) <= 3, (
            "a replica's disk does not fill up"
        )
        blobs.add(len(store(mirror).list("blobs/").collect()))
    assert not killed.exists()
    assert numbers(mirror) == ["versions/5.json", "versions/6.json"]
    monkeypatch.setattr("index_jobs.index.versions.GRACE_S", 0)
    remove(mirror, [first_id(mirror)], keep=1)
    used = {
        info.sha256
        for manifest in list_versions(mirror)
        for info in manifest.files.values()
    }
    stored = {
        each["path"].rpartition("/")[2]
        for each in store(mirror).list("blobs/").collect()
    }
    assert stored == used, "without a grace period, unused blobs go"
    assert max(blobs) > len(stored), (
        "young ones stay: they may belong to a version that is being published"
    )


def test_replica_whose_version_is_removed_meanwhile_takes_the_next_one(
    mirror: Path,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index_jobs.index.versions.GRACE_S", 0)
    remove(mirror, [first_id(mirror)])
    key = f"blobs/{open_current(mirror).manifest.files['removed.npy'].sha256}"
    with before(
        machines["reader"],
        "get",
        lambda: remove(mirror, [first_id(mirror)], keep=1),
        key,
    ):
        assert follow(machines["reader"]) == 3


def test_index_that_is_rebuilt_under_its_old_number_is_pulled(
    mirror: Path, machines: Machines
) -> None:
    assert follow(machines["reader"]) == 1
    store(mirror).delete([each["path"] for each in store(mirror).list().collect()])
    with pytest.raises(ArtifactError, match="holds no published index"):
        published_index(machines["reader"])
    assert current_version(machines["reader"]) == 1
    with new_version(machines["other"]) as new:
        new.publish(
            replace(copy_files(machines["reader"], new.folder), change="another")
        )
    assert follow(machines["reader"]) == 1
    assert open_current(machines["reader"]).manifest.change == "another"


def test_messages_name_url_and_fault(
    machines: Machines,
    published: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = machines["machine"]
    url = machines.url
    assert Machines(mirror.parents[5], url.replace("s3", "S3"))["machine"] == mirror
    with pytest.raises(
        ArtifactError,
        match=rf"^{url} holds no published index; .* --out {url}`, or `dcar index",
    ):
        open_current(mirror)
    with pytest.raises(ArtifactError, match=rf"^{url} holds no published index$"):
        rollback(mirror)
    with pytest.raises(
        ArtifactError,
        match=r"^s3://no-bucket/index .*: 404 Not Found \(NoSuchBucket\)$",
    ):
        pull(
            Machines(mirror.parents[5], "s3://no-bucket/index")["machine"], history=True
        )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StoreUnavailableError,
        match=r"^s3://bucket/\w+/index is not available: HTTP error: [^\n]+$",
    ):
        publish_copy(machines["builder"], source=published)


def test_what_is_lost_or_damaged_is_mended_by_the_next_job(
    mirror: Path,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CURRENT in the store, files of a mirror, and what a killed publisher has not
    removed.
    """
    for damage in (b"", b"?", b"9 of no version\n", None):
        assert [manifest.version for manifest in verify_index(mirror)] == [1]
        (
            store(mirror).delete("CURRENT")
            if damage is None
            else store(mirror).put("CURRENT", damage)
        )
        with pytest.raises(
            ArtifactError, match=r"holds no published index|names no version"
        ):
            verify_index(mirror)
        assert rollback(machines["operator"]) == 1
    (path := file_of(mirror, "index.faiss")).write_bytes(path.read_bytes()[:-1])
    assert follow(machines["reader"]) == 1
    with monkeypatch.context() as killed:
        killed.setattr(remote(mirror), "delete", lambda _: None)
        remove(mirror, [first_id(machines["reader"])], keep=1)
    assert follow(machines["reader"]) == 2
    assert numbers(mirror) == ["versions/1.json", "versions/2.json"]
    publish_copy(mirror, keep=2)
    assert numbers(mirror) == ["versions/2.json", "versions/3.json"]
    file_of(mirror, "index.faiss", 2).write_bytes(b"")
    assert rollback(mirror, 2) == follow(mirror) == 2


def test_machines_share_taught_names(mirror: Path, machines: Machines) -> None:
    pull(other := machines["other"])
    rex, tom = (Concept(name, "dog", ("1",), ("2",)) for name in ("rex", "tom"))
    with before(mirror, "put", lambda: put_concept(other, tom)):
        put_concept(mirror, rex)
    pull(other)
    assert read_concepts(other) == read_concepts(mirror) == [rex, tom]
    assert drop_concept(other, "tom")
    pull(mirror)
    assert read_concepts(mirror) == [rex]
    store(mirror).put("concepts.json", b"[{}]")
    with pytest.raises(
        ArtifactError, match=r"^concepts.json of s3://.* is damaged; remove it"
    ):
        put_concept(mirror, tom)
    with pytest.raises(FileNotFoundError):
        Directory(mirror / "dropped").write("CURRENT", b"")
