"""The same job, searches and checks with the vectors in Qdrant."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError, DataError, LockedError, StoreUnavailableError
from index_jobs.engines.protocol import load_engine
from index_jobs.jobs.update import add, remove
from index_jobs.rebuild import rebuild
from index_jobs.selection import Selection
from index_jobs.store import publish
from index_jobs.store.changes import change_metadata
from index_jobs.store.filters import select_rows
from index_jobs.store.names import index_name
from index_jobs.store.publish import rollback
from index_jobs.store.versions import current_version, open_current, verify_index
from tests.support.object_store import Machines, ObjectStore
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.qdrant_server import QdrantServer, qdrant_url, running_server
from tests.support.updates import write_images
from tests.support.versions import Build

pytestmark = needs("qdrant")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("QDRANT_URL"):
        monkeypatch.setattr("index_jobs.engines.qdrant.engine._POLL_SECONDS", 0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with qdrant_url() as url:
        yield url


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def index(tiny_gallery: Path, tiny_checkpoint: Path, url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "in qdrant"
    rebuild(tiny_gallery, tiny_checkpoint, out, engine=f"qdrant={url}", progress=False)
    return out


@pytest.fixture
def location(index: Path) -> Any:
    from index_jobs.engines.qdrant.index import QdrantLocation

    return QdrantLocation.read(open_current(index).path / "qdrant.json")


def collections(url: str, index: Path) -> tuple[list[str], list[str]]:
    """Return the collections of an index, and those that its alias names."""
    from index_jobs.engines.qdrant.engine import collection_prefix
    from index_jobs.engines.qdrant.index import connect

    client, prefix = connect(url), collection_prefix(index_name(index))
    names = [each.name for each in client.get_collections().collections if each.name.startswith(prefix)]
    aliases = [a.collection_name for a in client.get_aliases().aliases if a.alias_name == f"{prefix}_current"]
    return sorted(names), aliases


def collection_of(index: Path, version: int) -> str:
    return str(json.loads((index / f"versions/{version}/qdrant.json").read_text())["collection"])


def test_searches_are_those_of_faiss(index: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index_jobs.engines.qdrant.index.BATCH", 7)
    here, there = open_current(index), open_current(published)
    assert not (here.path / "index.faiss").exists()
    assert (here.manifest.count, here.manifest.kind, here.manifest.measured["recall_at_10"]) == (24, "Flat", 1.0)
    rows = np.arange(24)
    np.testing.assert_allclose(here.vectors(rows), there.vectors(rows), atol=1e-6)
    np.testing.assert_allclose(here.vectors(rows[[5, 3]]), there.vectors(rows[[5, 3]]), atol=1e-6)
    queries = there.vectors(rows)
    for allowed in (None, np.isin(rows, [2, 3, 5, 7]), rows % 2 == 0, rows != 4, np.zeros(24, np.bool_)):
        scores, found = here.search(queries, 30, allowed)
        expected, truth = there.search(queries, 30, allowed)
        np.testing.assert_allclose(np.where(found < 0, -9, scores), np.where(truth < 0, -9, expected), atol=1e-5)
        assert (found[:, 0] == truth[:, 0]).all()
    assert [here.row_of(here.item(row).id) for row in (0, 23)] == [0, 23]


@pytest.mark.slow
def test_collections_and_alias_follow_versions_rollback_and_updates(
    build: Build, tiny_checkpoint: Path, other_checkpoint: Path, url: str, tmp_path: Path
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
    artifact = open_current(index)
    assert (artifact.manifest.count, artifact.row_of(gone)) == (24, None)
    rows = artifact.search(artifact.vectors(np.array([24])), 25)[1][0]
    assert (rows[0], sorted(rows.tolist())) == (24, [-1, *(row for row in range(25) if row != 4)])
    assert not list(index.glob("versions/*/**/index.faiss"))
    present, aliased = collections(url, index)
    assert (len(present), aliased) == (3, [names[0]]), "an addition is a collection, and shares the built one"
    add(index, write_images(tmp_path / "others", "brown", shape="circle"), progress=False)
    assert len(open_current(index).segments) == 2, "small additions are merged"
    build(checkpoint=other_checkpoint, engine=f"qdrant={url}", margin=1, keep=1)
    assert len(collections(url, index)[0]) == 3, "services may still search the replaced version and its addition"
    assert len(verify_index(index)) == 1
    build(margin=1, keep=1)  # back to FAISS: nothing is left behind
    assert collections(url, index) == ([], [])


@pytest.mark.slow
def test_a_half_uploaded_version_is_never_served(
    build: Build, server: QdrantServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next job succeeds, and drops what the failed one left."""
    index, engine = tmp_path / "index", f"qdrant={server.url}"
    build(engine=engine)
    monkeypatch.setattr("index_jobs.engines.qdrant.engine.BATCH", 5)
    monkeypatch.setattr("index_jobs.engines.qdrant.index._PAUSE_SECONDS", 0)
    upsert, uploads = server.client.upsert, list[int]()

    def failing(*given: Any) -> Any:
        uploads.append(1)
        if len(uploads) >= 3:
            raise ConnectionAbortedError  # without a response
        return upsert(*given)

    monkeypatch.setattr(server.client, "upsert", failing)
    monkeypatch.setattr(server.http, "handle_error", lambda *_: None)
    with pytest.raises(StoreUnavailableError, match="Qdrant is unavailable"):
        build(engine=engine, force=True)
    server.client.upsert = upsert
    assert current_version(index) == 1
    assert len(collections(server.url, index)[0]) == 2
    assert open_current(index).search(np.eye(1, open_current(index).manifest.dim, dtype=np.float32), 30)[1].max() == 23
    build(engine=engine, force=True)
    assert collections(server.url, index) == (
        sorted(collection_of(index, version) for version in (1, 2)), [collection_of(index, 2)]
    )  # fmt: skip


def test_rebuild_is_recommended_once_searches_name_many_rows(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    build(engine="qdrant=:memory:")
    ids = [open_current(index).item(row).id for row in range(5)]
    assert change_metadata(index, [(each, {"price": 1}) for each in ids[:4]], "a test").rebuild == ""
    assert remove(index, ids[3:4]).rebuild == ""
    reason = "of 24 rows are removed or changed, and named in every search"
    assert change_metadata(index, [(ids[4], {"price": 1})], "a test").rebuild == f"5 {reason}"
    rollback(index)
    monkeypatch.setattr(publish, "_NAMED_ROWS", 3)
    assert remove(index, ids[:1]).rebuild == f"4 {reason}"
    assert build(engine="qdrant=:memory:").version == 6
    assert open_current(index).manifest.rebuild == ""


def test_a_version_that_was_removed_is_filtered_while_it_is_open(build: Build, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build(engine="qdrant=:memory:")
    first = open_current(index).item(0).id
    change_metadata(index, [(first, {"price": 1})], "a test")
    before = open_current(index)
    for price in (2, 3):
        change_metadata(index, [(first, {"price": price})], "a test", keep=1)
    assert not before.path.exists()
    assert before.search(before.vectors(np.arange(1)), 2, select_rows(before, {"price": 1}))[1].tolist() == [[0, -1]]


def test_a_collection_that_is_damaged_is_refused(index: Path, location: Any) -> None:
    from index_jobs.engines.qdrant.index import QdrantIndex, QdrantLocation

    with pytest.raises(ArtifactError, match="has 24 vectors, not 25; roll back"):
        QdrantIndex(replace(location, count=25))
    with pytest.raises(ArtifactError, match="has no collection other; roll back"):
        QdrantIndex(replace(location, collection="other"))
    with pytest.raises(ArtifactError, match=r"qdrant\.json cannot be read"):
        QdrantLocation.read(index / "nowhere/qdrant.json")


def test_the_replaced_version_is_searched_until_the_next_publication(build: Build, url: str, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build(engine=f"qdrant={url}")
    before, first = open_current(index), collection_of(index, 1)
    build(engine=f"qdrant={url}", force=True, keep=1)
    assert before.search(before.vectors(np.arange(1)), 1)[1].tolist() == [[0]]
    second = collection_of(index, 2)
    assert collections(url, index) == (sorted([first, second]), [second])
    build(engine=f"qdrant={url}", force=True, keep=1)
    assert collections(url, index)[0] == sorted([second, collection_of(index, 3)])


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines of one index in an object store."""
    with ObjectStore() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield Machines(tmp_path / "machines", f"s3://bucket/{tmp_path.name}/index")


@needs("object-store")
def test_machines_of_one_object_store_share_collections_and_drop_none_that_is_newer(
    build: Build, url: str, machines: Machines
) -> None:
    one, other = machines["one"], machines["other"]
    build(out=one, engine=f"qdrant={url}")
    build(out=other, engine=f"qdrant={url}", force=True, keep=1)
    found = collections(url, other)
    assert found == collections(url, one)
    assert len(found[0]) == 2
    load_engine(f"qdrant={url}").sync(one, index_name(one), 1)
    assert collections(url, other)[0] == found[0]


@needs("object-store")
def test_new_machine_keeps_the_collections_of_versions_that_it_has_not_read(
    build: Build, url: str, machines: Machines
) -> None:
    for name in ("one", "one", "new"):
        build(out=machines[name], engine=f"qdrant={url}", force=True)
    assert len(collections(url, machines["one"])[0]) == 3
    assert rollback(machines["another"], 1) == 1


@needs("object-store")
def test_alias_follows_a_version_that_is_published_while_another_machine_moves_it(
    build: Build, url: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, sync = machines["one"], machines["other"], publish._sync

    def late(*given: Any) -> None:
        monkeypatch.setattr(publish, "_sync", sync)
        build(out=other, engine=f"qdrant={url}", force=True)
        sync(*given)

    build(out=one, engine=f"qdrant={url}")
    monkeypatch.setattr(publish, "_sync", late)
    assert build(out=one, engine=f"qdrant={url}", force=True).version == 2
    assert current_version(one) == 3
    assert collections(url, one) == (
        sorted(collection_of(other, version) for version in (1, 2, 3)), [collection_of(other, 3)]
    )  # fmt: skip


@needs("object-store")
def test_build_whose_collection_a_faster_machine_drops_has_lost_the_race(
    build: Build, url: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_jobs.engines.qdrant import engine

    make_points = engine.make_points

    def late(*given: Any) -> Any:
        monkeypatch.setattr(engine, "make_points", make_points)
        build(out=machines["other"], engine=f"qdrant={url}")
        return make_points(*given)

    monkeypatch.setattr(engine, "make_points", late)
    with pytest.raises(LockedError, match=f"has published to {machines.url} meanwhile; run the same command again"):
        build(out=machines["one"], engine=f"qdrant={url}")
    assert build(out=machines["one"], engine=f"qdrant={url}").reused


def test_a_server_of_the_user_is_left_as_it_was(
    build: Build, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDRANT_URL", server.url)
    server.client.create_collection("theirs", {})
    with qdrant_url() as url:
        build(engine=f"qdrant={url}")
        build(engine=f"qdrant={url}", force=True)
        made = [each.name for each in server.client.get_collections().collections if each.name != "theirs"]
        assert len(made) == 2
        server.client.delete_collection(made[0])
    assert [each.name for each in server.client.get_collections().collections] == ["theirs"]


def test_an_unreadable_version_keeps_its_collection(build: Build, url: str, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build(engine=f"qdrant={url}")
    name = collection_of(index, 1)
    (index / "versions/1/qdrant.json").write_text("{")
    load_engine(f"qdrant={url}").sync(index, index_name(index), 1)
    assert collections(url, index)[0] == [name]


def test_a_busy_server_is_asked_again(
    build: Build, server: QdrantServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index_jobs.engines.qdrant.index._PAUSE_SECONDS", 0.001)
    build(engine=f"qdrant={server.url}")
    artifact = open_current(tmp_path / "index")
    server.failures = 1
    assert artifact.search(artifact.vectors(np.arange(1)), 1)[1].tolist() == [[0]]
    server.failures = 99
    with pytest.raises(StoreUnavailableError, match=r"Qdrant is unavailable: .*503"):
        artifact.search(np.eye(1, artifact.manifest.dim, dtype=np.float32), 1)
    server.failures = 0
    server.client.delete_collection(collection_of(tmp_path / "index", 1))
    server.calls.clear()
    with pytest.raises(StoreUnavailableError, match="404"):
        artifact.vectors(np.arange(2))
    assert len(server.calls) == 1, "what a second attempt does not change"


def test_settings_reach_the_server(build: Build, server: QdrantServer) -> None:
    given = "shard_number=3&replication_factor=2&quantization=int8&hnsw_ef=77"
    summary = build(engine=f"qdrant={server.url}?{given}", kind="hnsw", group_field="color")
    assert (summary.kind, summary.measured["parameters"]) == ("HNSW24", {"hnsw_ef": 77})
    created = next(body for method, _, body in server.calls if method == "PUT")
    assert (created["shard_number"], created["replication_factor"]) == (3, 2)
    assert created["quantization_config"]["scalar"]["type"] == "int8"
    indexes = {body["field_name"] for _, path, body in server.calls if path.endswith("/index")}
    assert indexes > {"id", "category", "color"}
    assert "caption" not in indexes
    searches = [body["searches"][0] for _, path, body in server.calls if path.endswith("/batch")]
    assert {each["params"]["hnsw_ef"] for each in searches} == {77}


def test_given_rows_are_compared_exactly(build: Build, server: QdrantServer, tmp_path: Path) -> None:
    build(engine=f"qdrant={server.url}?quantization=int8", kind="hnsw")
    artifact, rows = open_current(tmp_path / "index"), np.array([17, 3, 9])
    selection = Selection(lambda: artifact.live, ({"color": {"not": "mauve"}},), hidden=np.array([3, 20]))
    scores, found = artifact.search(artifact.vectors(np.array([9])), 3, selection.within(rows))
    assert found[0].tolist() == [9, 17, -1]
    np.testing.assert_allclose(scores[0][:2], artifact.vectors(found[0][:2]) @ artifact.vectors(rows[2:])[0], atol=1e-6)
    sent = next(body["searches"][0] for _, path, body in reversed(server.calls) if path.endswith("/batch"))
    assert sent["params"]["exact"] is True
    assert sent["filter"]["must"][-1] == {"has_id": [17, 3, 9]}
    assert sent["filter"]["must_not"] == [{"has_id": [3]}]


def test_many_searches_that_name_many_rows_are_sent_in_small_parts(
    build: Build, server: QdrantServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(engine=f"qdrant={server.url}")
    artifact = open_current(tmp_path / "index")
    vectors, mask = artifact.vectors(np.arange(24)), np.arange(24) % 2 == 0
    whole = artifact.search(vectors, 5, mask)
    monkeypatch.setattr("index_jobs.engines.qdrant.index._FILTER_BYTES", 500)
    server.calls.clear()
    found = artifact.search(vectors, 5, mask)
    assert np.array_equal(found[0], whole[0])
    assert np.array_equal(found[1], whole[1])
    assert [len(body["searches"]) for _, path, body in server.calls if path.endswith("/batch")] == [8, 8, 8]


def test_the_width_of_a_graph_is_tuned(build: Build, server: QdrantServer, tmp_path: Path) -> None:
    summary = build(engine=f"qdrant={server.url}", kind="hnsw")
    tuned = summary.measured["parameters"]["hnsw_ef"]
    assert json.loads((tmp_path / "index/versions/1/qdrant.json").read_text())["hnsw_ef"] == tuned == 16


@pytest.mark.parametrize("uri", ["", "?hnsw_ef=9", "h?replicas=2", "h?hnsw_ef=0", "h?quantization=int4"])
def test_unknown_settings_are_refused(uri: str) -> None:
    with pytest.raises(DataError, match=r"takes the URL of a server, .* hnsw_ef, .* quantization \(int8 or binary\)"):
        load_engine(f"qdrant={uri}")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("qdrant:6333?hnsw_ef=9", "qdrant:6333 would be a folder; give the URL of the server, http://qdrant:6333"),
        ("http://me:hidden@127.0.0.1:9", "has no user or password; set DCAR_QDRANT_API_KEY"),
    ],
)
def test_a_place_that_is_not_what_it_seems_is_refused(build: Build, place: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        build(engine=f"qdrant={place}")
    assert "hidden" not in str(raised.value)


def test_the_alias_follows_a_url_with_and_without_a_slash(build: Build, url: str, tmp_path: Path) -> None:
    index = tmp_path / "index"
    for slash in ("/", "", "/"):
        version = build(engine=f"qdrant={url}{slash}", force=True).version
        assert collections(url, index)[1] == [collection_of(index, version)]


def test_a_kind_that_qdrant_lacks_is_refused(build: Build, url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can be of kind auto, flat, hnsw, not 'ivf-pq'"):
        build(engine=f"qdrant={url}", kind="ivf-pq")
    assert not list((tmp_path / "index" / "versions").iterdir())


def test_the_key_is_written_nowhere(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCAR_QDRANT_API_KEY", "hidden-word")
    build(engine="qdrant=:memory:")
    path = open_current(tmp_path / "index").path
    assert not [file for file in path.rglob("*") if file.is_file() and b"hidden-word" in file.read_bytes()]


@pytest.mark.parametrize(
    ("key", "sent"), [("hidden-word\n", "hidden-word"), (" ", None), ("hidden\nword", ""), ("ü", "")]
)
def test_the_key_is_sent_without_its_newline_and_never_shown(
    server: QdrantServer, monkeypatch: pytest.MonkeyPatch, key: str, sent: str | None
) -> None:
    from index_jobs.engines.qdrant import index

    monkeypatch.setenv("DCAR_QDRANT_API_KEY", key)
    server.failures, server.failure = 1, 403
    warns = pytest.warns(UserWarning, match="insecure connection") if sent else nullcontext()
    with warns, pytest.raises(StoreUnavailableError) as raised:
        index.call(index.connect(server.url).get_collections)
    reason = "has characters that no key has" if sent == "" else "it refuses the key of DCAR_QDRANT_API_KEY: .*403"
    assert re.search(reason, str(raised.value))
    assert "hidden" not in str(raised.value)
    assert server.keys == ([] if sent == "" else [sent])


def test_an_unreachable_server_is_an_error_before_encoding(build: Build) -> None:
    encoded: list[int] = []
    with pytest.raises(StoreUnavailableError, match="refused"):
        build(engine="qdrant=http://127.0.0.1:9", on_encoded=encoded.append)
    assert not encoded


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from index_jobs.engines.qdrant import index

    monkeypatch.setattr(index, "_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = index.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreUnavailableError, match="timed out"):
            index.call(client.get_collections, attempts=1)


@pytest.mark.slow
def test_nothing_is_published_while_the_served_version_cannot_be_reached(
    build: Build, gallery: Path, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without the served version, nobody would notice that most images are gone."""
    monkeypatch.setattr("index_jobs.engines.qdrant.index._PAUSE_SECONDS", 0)
    index = tmp_path / "index"
    build(gallery, engine=f"qdrant={url}")
    path = open_current(index).path / "qdrant.json"
    content = path.read_text()
    path.write_text(content.replace(url, "http://127.0.0.1:9").ljust(len(content)))  # opening checks the size
    for image in sorted(gallery.rglob("*.png"))[4:]:
        image.unlink()
    with pytest.raises(StoreUnavailableError, match=r"cannot be compared: Qdrant is unavailable: .* by --force"):
        build(gallery)
    assert current_version(index) == 1
    assert build(gallery, force=True).count == 4
    assert "nothing is compared with it: Qdrant" in caplog.text


def test_a_local_folder_is_found_again_and_never_made(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_jobs.engines.qdrant.index import connect

    folder = str(tmp_path / "vectors")
    monkeypatch.chdir(tmp_path)
    build(engine="qdrant=vectors")
    monkeypatch.chdir("/")
    connect(folder).close()
    connect.cache_clear()  # as in another process
    artifact = open_current(tmp_path / "index")
    assert artifact.search(artifact.vectors(np.arange(24)), 1)[1][:, 0].tolist() == list(range(24))
    connect(folder).close()
    connect.cache_clear()
    Path(folder).rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="with the vectors is missing"):
        open_current(tmp_path / "index")
    assert not Path(folder).exists()


@pytest.mark.slow
def test_a_process_with_a_local_folder_ends_in_silence(tmp_path: Path) -> None:
    code = f"from index_jobs.engines.qdrant.index import connect; connect({str(tmp_path / 'vectors')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.slow
@needs("qdrant-core")
def test_a_restarted_server_has_every_published_version_and_no_other(
    build: Build, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    """On Qdrant's own core, which a process that ends leaves as it was written."""
    from tests.support.qdrant_core import CoreClient

    (folder := tmp_path / "core").mkdir()
    with running_server(folder) as server:
        for checkpoint in (None, other_checkpoint):
            build(
                engine=f"qdrant={server.url}",
                kind="hnsw",
                margin=1,
                **({"checkpoint": checkpoint} if checkpoint else {}),
            )
        index = tmp_path / "index"
        before = open_current(index)
        found = before.search(vectors := before.vectors(np.arange(24)), 5)[1]
        server.client.close()
        server.client = CoreClient(folder)
        after = open_current(index)
        assert (after.search(vectors, 5)[1] == found).all()
        assert rollback(index) == 1
        assert open_current(index).manifest.version == 1
        replaced = collection_of(index, 1)
        build(engine=f"qdrant={server.url}", force=True, keep=1)
        assert {path.name for path in folder.iterdir()} == {replaced, collection_of(index, 3)}, "other space is free"
        server.client.close()
