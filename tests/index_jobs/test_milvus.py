"""The same job, searches and checks with the vectors in Milvus; here Milvus Lite, which runs in this process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError, DataError, StoreUnavailableError
from index_jobs.engines import milvus
from index_jobs.jobs.update import add, remove
from index_jobs.rebuild import rebuild
from index_jobs.store.publish import rollback
from index_jobs.store.versions import current_version, open_current, verify_index
from tests.support.parts import needs
from tests.support.updates import write_images
from tests.support.versions import Build

pytestmark = [
    needs("milvus"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what pymilvus imports
]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "vectors.db")


@pytest.fixture(scope="module")
def index(tiny_gallery: Path, tiny_checkpoint: Path, uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "in milvus"
    rebuild(tiny_gallery, tiny_checkpoint, out, engine=f"milvus={uri}", progress=False)
    return out


@pytest.mark.slow
def test_searches_are_those_of_faiss(index: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "_INSERT_ROWS", 7)  # vectors in one answer
    here, there = open_current(index), open_current(published)
    assert not (here.path / "index.faiss").exists()
    assert (here.manifest.count, here.manifest.kind, here.manifest.measured["recall_at_10"]) == (24, "milvus auto", 1.0)
    rows = np.arange(24)
    np.testing.assert_allclose(here.vectors(rows), there.vectors(rows), atol=1e-6)
    np.testing.assert_allclose(here.vectors(rows[[5, 3]]), there.vectors(rows[[5, 3]]), atol=1e-6)
    queries = there.vectors(rows)
    for allowed in (None, np.isin(rows, [2, 3, 5, 7]), rows % 2 == 0, np.zeros(24, np.bool_)):
        scores, found = here.search(queries, 30, allowed)
        expected, truth = there.search(queries, 30, allowed)
        np.testing.assert_allclose(np.where(found < 0, -9, scores), np.where(truth < 0, -9, expected), atol=1e-5)
        assert (found[:, 0] == truth[:, 0]).all()
    assert [here.row_of(here.item(row).id) for row in (0, 23)] == [0, 23]


@pytest.mark.slow
def test_collection_of_a_damaged_version_is_not_dropped(build: Build, uri: str, tmp_path: Path) -> None:
    """An unknown collection keeps all of them alive."""
    out, client = tmp_path / "index", milvus.connect(uri)
    build(engine=f"milvus={uri}")
    place = milvus.MilvusLocation.read(out / "versions/1/milvus.json")
    build(engine=f"milvus={uri}", force=True)
    (out / "versions/1/milvus.json").write_text("{")
    milvus.MilvusEngine(uri).sync(out, 2)
    assert client.has_collection(place.collection)


class CountedSearches:
    """A Milvus client that notes the filter of each search."""

    def __init__(self, client: Any) -> None:
        self.client, self.filters = client, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def search(self, *args: object, filter: str, **options: object) -> Any:
        self.filters.append(filter)
        return self.client.search(*args, filter=filter, **options)


@pytest.fixture
def searched(index: Path) -> tuple[milvus.MilvusIndex, CountedSearches]:
    milvus_index = milvus.MilvusIndex(milvus.MilvusLocation.read(open_current(index).path / milvus.MILVUS))
    client = CountedSearches(milvus_index._client)
    milvus_index._client = client
    return milvus_index, client


@pytest.mark.parametrize(
    ("allowed", "filters"),
    [("every second", [""]), ("farthest twelve", ["", "row"]), ("two", ["row in"])],
)
def test_a_filter_takes_at_most_two_searches(
    allowed: str, filters: list[str], searched: tuple[milvus.MilvusIndex, CountedSearches], published: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A broad filter is applied to a larger unfiltered result, and sent to Milvus only if that falls short."""
    monkeypatch.setattr(milvus, "_LISTED_UP_TO", 3)
    artifact = open_current(published)
    query = artifact.vectors(np.array([6]))
    nearest_first = artifact.search(query, 24)[1][0]
    mask = np.zeros(24, np.bool_)
    chosen = {"every second": slice(0, None, 2), "farthest twelve": slice(12, None), "two": slice(3, 5)}[allowed]
    mask[nearest_first[chosen]] = True
    scores, rows = searched[0].search(query, 3, mask)
    expected_scores, expected = artifact.search(query, 3, mask)
    assert rows.tolist() == expected.tolist()
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert len(searched[1].filters) == len(filters)
    for sent, start in zip(searched[1].filters, filters, strict=True):
        assert sent.startswith(start)
        assert bool(sent) == bool(start)


def test_a_filter_of_very_many_rows_is_sent_in_parts(
    index: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "_LISTED_UP_TO", 3)
    monkeypatch.setattr(milvus, "_MAX_OVERFETCH", 0)
    monkeypatch.setattr(milvus, "_MAX_LISTED", 3)
    allowed = np.arange(24) % 3 != 0
    queries = open_current(published).vectors(np.arange(24))
    milvus_rows, faiss_rows = (open_current(path).search(queries, 16, allowed)[1] for path in (index, published))
    assert [set(row) for row in milvus_rows.tolist()] == [set(row) for row in faiss_rows.tolist()]
    assert (milvus_rows >= 0).all()


@pytest.mark.slow
def test_alias_follows_versions_rollback_and_updates(
    build: Build, tiny_checkpoint: Path, other_checkpoint: Path, uri: str, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    client = milvus.connect(uri)
    name = milvus.collection_prefix(out)

    def state() -> tuple[list[str], str]:
        collections = sorted(entry for entry in client.list_collections() if entry.startswith(name))
        return collections, client.describe_alias(f"{name}_current")["collection_name"]

    versions = {}
    for number, checkpoint in enumerate((tiny_checkpoint, other_checkpoint), 1):
        summary = build(checkpoint=checkpoint, engine=f"milvus={uri}", margin=1)
        versions[number] = f"{name}_v{number}_{summary.fingerprint[:16]}"
    assert state() == ([versions[1], versions[2]], versions[2])
    assert rollback(out) == 1
    assert state()[1] == versions[1]
    gone = open_current(out).item(4).id
    remove(out, [gone])
    add(out, write_images(tmp_path / "more", "pink", shape="circle"), progress=False)
    artifact = open_current(out)
    assert (artifact.manifest.count, artifact.row_of(gone)) == (24, None)
    rows = artifact.search(artifact.vectors(np.array([24])), 25)[1][0]
    assert (rows[0], sorted(rows.tolist())) == (24, [-1, *(row for row in range(25) if row != 4)])
    assert state()[1] == versions[1]  # an update shares the collection of the previous version
    build(checkpoint=other_checkpoint, engine=f"milvus={uri}", margin=1, keep=1)
    assert len(state()[0]) == 1
    assert len(verify_index(out)) == 1
    # back to FAISS: nothing is left behind
    build(margin=1, keep=1)
    assert not [entry for entry in client.list_collections() if entry.startswith(name)]


def test_unreachable_store_is_an_error_of_its_own(build: Build, uri: str, tmp_path: Path) -> None:
    build(engine=f"milvus={uri}")
    artifact = open_current(tmp_path / "index")
    queries = artifact.vectors(np.arange(2))
    milvus.connect(uri).drop_collection(milvus.MilvusLocation.read(artifact.path / milvus.MILVUS).collection)
    with pytest.raises(StoreUnavailableError, match="Milvus is unavailable"):
        artifact.search(queries, 3)
    with pytest.raises(StoreUnavailableError, match="Milvus is unavailable"):
        artifact.vectors(np.arange(2))


def test_collection_that_is_damaged_is_refused(index: Path) -> None:
    place = milvus.MilvusLocation.read(open_current(index).path / milvus.MILVUS)
    with pytest.raises(ArtifactError, match="holds 24 vectors, not 25; roll back"):
        milvus.MilvusIndex(replace(place, count=25))
    with pytest.raises(ArtifactError, match=r"has no collection other_v1_.*; roll back"):
        milvus.MilvusIndex(replace(place, collection=f"other_v1_{place.fingerprint[:16]}"))
    with pytest.raises(ArtifactError, match=r"milvus\.json cannot be read"):
        milvus.MilvusLocation.read(index / "nowhere" / milvus.MILVUS)


def test_unsupported_index_kind_is_refused(build: Build, uri: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can be of kind auto, flat, hnsw, not 'ivf-pq'"):
        build(engine=f"milvus={uri}", kind="ivf-pq")
    assert not list((tmp_path / "index" / "versions").iterdir())


def test_token_is_written_nowhere(build: Build, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(milvus.TOKEN, "user:hidden-word")
    build(engine=f"milvus={uri}")
    path = open_current(tmp_path / "index").path
    assert json.loads((path / "milvus.json").read_text())["uri"] == uri
    assert not [file for file in path.rglob("*") if file.is_file() and b"hidden-word" in file.read_bytes()]


def test_unreachable_store_is_an_error_before_encoding(build: Build) -> None:
    encoded: list[int] = []
    with pytest.raises(ArtifactError, match="cannot be reached"):
        build(engine="milvus=http://127.0.0.1:9", on_encoded=encoded.append)
    assert not encoded


def test_nothing_is_published_while_the_served_version_cannot_be_reached(
    build: Build, gallery: Path, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the served version, nobody would notice that most images are gone."""
    index = tmp_path / "index"
    build(gallery, engine=f"milvus={uri}")
    path = open_current(index).path / milvus.MILVUS
    content = path.read_text()
    path.write_text(content.replace(uri, "http://127.0.0.1:9").ljust(len(content)))  # opening checks the size
    for image in sorted(gallery.rglob("*.png"))[4:]:
        image.unlink()
    with pytest.raises(StoreUnavailableError, match=r"cannot be compared: Milvus .* cannot be reached: .* by --force"):
        build(gallery)
    assert current_version(index) == 1
    assert build(gallery, force=True).count == 4
    assert "nothing is compared with it: Milvus" in caplog.text


def test_missing_lite_file_is_not_created_again(index: Path, tmp_path: Path) -> None:
    location = milvus.MilvusLocation.read(open_current(index).path / milvus.MILVUS)
    with pytest.raises(ArtifactError, match=r"n\.db is missing"):
        milvus.MilvusIndex(replace(location, uri=str(tmp_path / "n.db")))
    assert not (tmp_path / "n.db").exists()
