"""Builds, publications and rollbacks with the vectors in Qdrant."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_core import CoreClient
from qdrant_server import QdrantServer, running_server

from dcar_core.util.errors import ArtifactError, DataError, StoreUnavailableError
from dcar_qdrant import connection, engine, index
from dcar_qdrant.connection import connect
from dcar_qdrant.engine import QdrantEngine, collection_prefix
from dcar_qdrant.index import QdrantIndex, QdrantLocation
from index_jobs.index.stores import index_name
from index_jobs.index.versions import (
    current_version,
    open_current,
    read_manifest,
    rollback,
    verify_index,
)
from index_jobs.jobs.update import add, remove
from tests.support.galleries import write_images
from tests.support.object_store import Machines, ObjectStore
from tests.support.versions import Build, file_of


def collections(url: str, index: Path) -> tuple[list[str], list[str]]:
    """Return the collections of an index, and those that its alias names."""
    client = connect(url)
    prefix = collection_prefix(index_name(index))
    names = [
        known.name
        for known in client.get_collections().collections
        if known.name.startswith(prefix)
    ]
    aliases = [
        a.collection_name
        for a in client.get_aliases().aliases
        if a.alias_name == f"{prefix}_current"
    ]
    return sorted(names), aliases


def collection_of(index: Path, version: int) -> str:
    return QdrantLocation.read(file_of(index, "qdrant.json", version)).collection


def test_every_item_is_nearest_to_its_own_vector(
    build: Build,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "BATCH", 7)
    monkeypatch.setattr(engine, "BATCH", 7)
    build(engine=f"qdrant={url}")
    opened = open_current(tmp_path / "index")
    rows = np.arange(24)
    assert "index.faiss" not in opened.manifest.files
    measured = opened.manifest.measured
    assert (opened.manifest.count, opened.manifest.kind, measured["recall_at_10"]) == (
        24,
        "Flat",
        1.0,
    )
    assert opened.search(opened.vectors(rows), 1)[1][:, 0].tolist() == rows.tolist()
    np.testing.assert_array_equal(
        opened.vectors(rows[[5, 3]]), opened.vectors(rows)[[5, 3]]
    )


@pytest.mark.slow
def test_collections_and_alias_follow_versions_rollback_and_updates(
    build: Build,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
    url: str,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    for checkpoint in (tiny_checkpoint, other_checkpoint):
        build(checkpoint=checkpoint, engine=f"qdrant={url}", margin=1)
    names = [collection_of(index, version) for version in (1, 2)]
    assert collections(url, index) == (sorted(names), [names[1]])
    assert rollback(index) == 1
    assert collections(url, index)[1] == [names[0]]
    gone = open_current(index).item(4).id
    remove(index, [gone])
    add(index, write_images(tmp_path / "more", "pink", shape="circle"), progress=False)
    opened = open_current(index)
    assert (opened.manifest.count, opened.row_of(gone)) == (24, None)
    rows = opened.search(opened.vectors(np.array([24])), 25)[1][0]
    assert (rows[0], sorted(rows.tolist())) == (
        24,
        [-1, *(row for row in range(25) if row != 4)],
    )
    present, aliased = collections(url, index)
    assert (len(present), aliased) == (
        3,
        [names[0]],
    ), "an addition is a collection, and shares the built one"
    add(
        index,
        write_images(tmp_path / "others", "brown", shape="circle"),
        progress=False,
    )
    assert len(open_current(index).parts) == 2, "small additions are merged"
    build(checkpoint=other_checkpoint, engine=f"qdrant={url}", margin=1, keep=1)
    assert len(collections(url, index)[0]) == 3, (
        "services may still search the replaced version and its addition"
    )
    assert len(verify_index(index)) == 1
    build(margin=1, keep=1)  # back to FAISS: nothing is left behind
    assert collections(url, index) == ([], [])


@pytest.mark.slow
def test_a_half_uploaded_version_is_never_served(
    build: Build,
    server: QdrantServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next job succeeds, and drops what the failed one left."""
    index = tmp_path / "index"
    name = f"qdrant={server.url}"
    build(engine=name)
    monkeypatch.setattr(engine, "BATCH", 5)
    upsert = server.client.upsert
    uploads = list[int]()

    def failing(*given: Any) -> Any:
        uploads.append(1)
        if len(uploads) >= 3:
            raise ConnectionAbortedError  # without a response
        return upsert(*given)

    with monkeypatch.context() as patch:
        patch.setattr(server.client, "upsert", failing)
        patch.setattr(server.http, "handle_error", lambda *_: None)
        with pytest.raises(StoreUnavailableError, match="Qdrant is unavailable"):
            build(engine=name, force=True)
    assert current_version(index) == 1
    assert len(collections(server.url, index)[0]) == 2
    build(engine=name, force=True)
    first, second = (collection_of(index, version) for version in (1, 2))
    assert collections(server.url, index) == (sorted([first, second]), [second])


def test_a_collection_that_is_damaged_is_refused(
    build: Build,
    url: str,
    tmp_path: Path,
) -> None:
    build(engine=f"qdrant={url}")
    location = QdrantLocation.read(file_of(tmp_path / "index", "qdrant.json", 1))
    with pytest.raises(ArtifactError, match="has 24 vectors, not 25; roll back"):
        QdrantIndex(replace(location, count=25))
    with pytest.raises(ArtifactError, match="has no collection other; roll back"):
        QdrantIndex(replace(location, collection="other"))
    with pytest.raises(ArtifactError, match=r"qdrant\.json cannot be read"):
        QdrantLocation.read(tmp_path / "qdrant.json")


def test_the_replaced_version_is_searched_until_the_next_publication(
    build: Build,
    url: str,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    build(engine=f"qdrant={url}")
    before = open_current(index)
    first = collection_of(index, 1)
    build(engine=f"qdrant={url}", force=True, keep=1)
    assert before.search(before.vectors(np.arange(1)), 1)[1].tolist() == [[0]]
    second = collection_of(index, 2)
    assert collections(url, index) == (sorted([first, second]), [second])
    build(engine=f"qdrant={url}", force=True, keep=1)
    assert collections(url, index)[0] == sorted([second, collection_of(index, 3)])


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines of one index in an object store."""
    with ObjectStore() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        yield Machines(tmp_path / "machines", f"s3://bucket/{tmp_path.name}/index")


def test_machines_of_one_store_share_collections_and_drop_none_newer_or_unread(
    build: Build,
    url: str,
    machines: Machines,
) -> None:
    one = machines["one"]
    other = machines["other"]
    build(out=one, engine=f"qdrant={url}")
    build(out=other, engine=f"qdrant={url}", force=True)
    found = collections(url, other)
    assert found == collections(url, one)
    assert len(found[0]) == 2
    QdrantEngine(url).sync(index_name(one), 1, {1: [read_manifest(one, 1).paths(one)]})
    assert collections(url, other)[0] == found[0]
    build(out=machines["new"], engine=f"qdrant={url}", force=True)
    assert len(collections(url, one)[0]) == 3


def test_build_whose_collection_a_faster_machine_drops_has_lost_the_race(
    build: Build,
    url: str,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_points = engine.make_points

    def late(*given: Any) -> Any:
        monkeypatch.setattr(engine, "make_points", make_points)
        build(out=machines["other"], engine=f"qdrant={url}")
        return make_points(*given)

    monkeypatch.setattr(engine, "make_points", late)
    with pytest.raises(StoreUnavailableError, match="404"):
        build(out=machines["one"], engine=f"qdrant={url}")
    assert build(out=machines["one"], engine=f"qdrant={url}").reused


def test_an_unreadable_version_keeps_its_collection(
    build: Build,
    url: str,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    build(engine=f"qdrant={url}")
    name = collection_of(index, 1)
    file_of(index, "qdrant.json", 1).write_text("{")
    QdrantEngine(url).sync(
        index_name(index),
        1,
        {1: [read_manifest(index, 1).paths(index)]},
    )
    assert collections(url, index)[0] == [name]


def test_a_busy_server_is_asked_again(
    build: Build,
    server: QdrantServer,
    tmp_path: Path,
) -> None:
    build(engine=f"qdrant={server.url}")
    opened = open_current(tmp_path / "index")
    server.failures = 1
    assert opened.search(opened.vectors(np.arange(1)), 1)[1].tolist() == [[0]]
    server.failures = 99
    with pytest.raises(StoreUnavailableError, match=r"Qdrant is unavailable: .*503"):
        opened.search(np.eye(1, opened.manifest.dim, dtype=np.float32), 1)
    server.failures = 0
    server.client.delete_collection(collection_of(tmp_path / "index", 1))
    server.calls.clear()
    with pytest.raises(StoreUnavailableError, match="404"):
        opened.vectors(np.arange(2))
    assert len(server.calls) == 1, "what a second attempt does not change"


def test_settings_reach_the_server(build: Build, server: QdrantServer) -> None:
    given = "shard_number=3&replication_factor=2&quantization=int8&hnsw_ef=77"
    summary = build(
        engine=f"qdrant={server.url}?{given}",
        kind="hnsw",
        group_field="color",
    )
    assert (summary.kind, summary.measured["parameters"]) == ("HNSW24", {"hnsw_ef": 77})
    created = next(body for method, _, body in server.calls if method == "PUT")
    assert (created["shard_number"], created["replication_factor"]) == (3, 2)
    assert created["quantization_config"]["scalar"]["type"] == "int8"
    indexes = {
        body["field_name"] for _, path, body in server.calls if path.endswith("/index")
    }
    assert indexes > {"id", "category", "color"}
    assert "caption" not in indexes
    assert {searches[0]["params"]["hnsw_ef"] for searches in server.searches()} == {77}


def test_the_width_of_a_graph_is_tuned(
    build: Build,
    server: QdrantServer,
    tmp_path: Path,
) -> None:
    summary = build(engine=f"qdrant={server.url}", kind="hnsw")
    tuned = summary.measured["parameters"]["hnsw_ef"]
    assert (
        json.loads(file_of(tmp_path / "index", "qdrant.json", 1).read_text())["hnsw_ef"]
        == tuned
        == 16
    )


@pytest.mark.parametrize(
    "uri", ["", "?hnsw_ef=9", "h?replicas=2", "h?hnsw_ef=0", "h?quantization=int4"]
)
def test_unknown_settings_are_refused(uri: str) -> None:
    with pytest.raises(
        DataError,
        match=(
            r"takes the URL of a server, .* hnsw_ef, .* quantization \(int8 or binary\)"
        ),
    ):
        QdrantEngine(uri)


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        (
            "qdrant:6333?hnsw_ef=9",
            "auto",
            (
                "qdrant:6333 would be a folder; give the URL of the server,"
                " http://qdrant:6"
            ),
        ),
        (
            "http://me:hidden@127.0.0.1:9",
            "auto",
            "has no user or password; set QDRANT_API_KEY",
        ),
        (":memory:", "ivf-pq", "can be of kind auto, flat, hnsw, not 'ivf-pq'"),
    ],
)
def test_what_qdrant_cannot_be_asked_is_refused(
    build: Build,
    place: str,
    kind: str,
    message: str,
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        build(engine=f"qdrant={place}", kind=kind)
    assert "hidden" not in str(raised.value)


def test_the_alias_follows_a_url_with_and_without_a_slash(
    build: Build,
    url: str,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    for slash in ("/", "", "/"):
        version = build(engine=f"qdrant={url}{slash}", force=True).version
        assert collections(url, index)[1] == [collection_of(index, version)]


@pytest.mark.parametrize(
    ("key", "sent"),
    [("hidden-word\n", "hidden-word"), (" ", None), ("hidden\nword", ""), ("ü", "")],
)
def test_the_key_is_sent_without_its_newline_and_never_shown(
    server: QdrantServer,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    sent: str | None,
) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", key)
    server.failures = 1
    server.failure = 403
    warns: AbstractContextManager[object] = nullcontext()
    if sent:
        warns = pytest.warns(UserWarning, match="insecure connection")
    with warns, pytest.raises(StoreUnavailableError) as raised:
        connection.call(connect(server.url).get_collections)
    if sent == "":
        reason = "has characters that no key has"
    else:
        reason = "it refuses the key of QDRANT_API_KEY: .*403"
    assert re.search(reason, str(raised.value))
    assert "hidden" not in str(raised.value)
    assert server.keys == ([] if sent == "" else [sent])


def test_an_unreachable_server_is_an_error_before_encoding(build: Build) -> None:
    encoded: list[int] = []
    with pytest.raises(StoreUnavailableError, match="refused"):
        build(engine="qdrant=http://127.0.0.1:9", on_encoded=encoded.append)
    assert not encoded


def test_a_server_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "CALL_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreUnavailableError, match="timed out"):
            connection.call(client.get_collections, attempts=1)


def test_nothing_is_published_while_the_served_version_cannot_be_reached(
    build: Build,
    url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the served version, nobody would notice that most images are gone."""
    gallery = write_images(tmp_path / "few", "pink", "brown")
    build(engine=f"qdrant={url}")
    path = file_of(tmp_path / "index", "qdrant.json", 1)
    content = path.read_text()
    # opening checks the size
    path.write_text(content.replace(url, "http://127.0.0.1:9").ljust(len(content)))
    with pytest.raises(
        StoreUnavailableError,
        match=r"cannot be compared: Qdrant is unavailable: .* by --force",
    ):
        build(gallery)
    assert current_version(tmp_path / "index") == 1
    assert build(gallery, force=True).count == 2
    assert "nothing is compared with it: Qdrant" in caplog.text


def test_a_local_folder_is_found_again_and_never_made(
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = str(tmp_path / "vectors")
    monkeypatch.chdir(tmp_path)
    build(engine="qdrant=vectors")
    monkeypatch.chdir("/")
    connect(folder).close()
    connect.cache_clear()  # as in another process
    opened = open_current(tmp_path / "index")
    assert opened.search(opened.vectors(np.arange(24)), 1)[1][:, 0].tolist() == list(
        range(24)
    )
    connect(folder).close()
    connect.cache_clear()
    Path(folder).rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="with the vectors is missing"):
        open_current(tmp_path / "index")
    assert not Path(folder).exists()


@pytest.mark.slow
def test_a_process_with_a_local_folder_ends_in_silence(tmp_path: Path) -> None:
    code = (
        "from dcar_qdrant.connection import connect;"
        f" connect({str(tmp_path / 'vectors')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.slow
def test_a_restarted_server_has_every_published_version_and_no_other(
    build: Build,
    other_checkpoint: Path,
    tmp_path: Path,
) -> None:
    (folder := tmp_path / "core").mkdir()
    index = tmp_path / "index"
    with running_server(folder) as server:
        build(engine=f"qdrant={server.url}", kind="hnsw")
        build(
            checkpoint=other_checkpoint,
            engine=f"qdrant={server.url}",
            kind="hnsw",
            margin=1,
        )
        before = open_current(index)
        found = before.search(vectors := before.vectors(np.arange(24)), 5)[1]
        server.client.close()
        server.client = CoreClient(folder)
        assert (open_current(index).search(vectors, 5)[1] == found).all()
        assert rollback(index) == 1
        replaced = collection_of(index, 1)
        build(engine=f"qdrant={server.url}", force=True, keep=1)
        assert {path.name for path in folder.iterdir()} == {
            replaced,
            collection_of(index, 3),
        }, "other space is free"
