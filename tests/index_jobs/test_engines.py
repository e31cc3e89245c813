"""Vector engines: a new one is a file and a line of the registry."""

from pathlib import Path

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError, DataError
from index_jobs.engines.protocol import ENGINES, load_engine
from index_jobs.jobs.update import add, remove
from index_jobs.store.publish import rollback
from index_jobs.store.versions import open_current, verify_index
from tests.support.array_engine import REGISTRY_LINE, ArrayEngine
from tests.support.updates import write_images
from tests.support.versions import Build


@pytest.fixture
def array_engine(monkeypatch: pytest.MonkeyPatch) -> type[ArrayEngine]:
    """Add the engine by its line."""
    for name, place in REGISTRY_LINE.items():
        monkeypatch.setitem(ENGINES, name, place)
    monkeypatch.setattr(ArrayEngine, "synced", [])
    return ArrayEngine


def test_an_added_engine_builds_searches_updates_and_follows_versions(
    array_engine: type[ArrayEngine], published: Path, build: Build, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    summary = build(engine="array=memory")
    assert (summary.kind, summary.measured["recall_at_10"], summary.count) == ("array", 1.0, 24)
    ours, faiss = open_current(index), open_current(published)
    assert not (ours.path / "index.faiss").exists()
    rows = np.arange(24)
    for allowed in (None, rows % 3 == 0):
        scores, found = ours.search(faiss.vectors(rows), 10, allowed)
        expected, truth = faiss.search(faiss.vectors(rows), 10, allowed)
        assert found[:, 0].tolist() == truth[:, 0].tolist()
        np.testing.assert_allclose(np.where(found < 0, -9, scores), np.where(truth < 0, -9, expected), atol=1e-5)
    assert build(engine="array=memory").reused
    add(index, write_images(tmp_path / "more", "pink"), progress=False)
    remove(index, [ours.item(4).id])
    updated = open_current(index)
    assert (updated.manifest.count, updated.row_of("pink")) == (24, 24)
    assert updated.search(updated.vectors(np.array([24])), 1)[1].tolist() == [[24]]
    assert rollback(index) == 2
    assert array_engine.synced == [("memory", index, version) for version in (1, 2, 3, 2)]
    assert len(verify_index(index)) == 3


def test_an_engine_that_is_left_is_told_so(array_engine: type[ArrayEngine], build: Build) -> None:
    """Its last version is removed in the same publication."""
    build(engine="array=a")
    build(engine="array=b", keep=1)
    build(keep=1)
    assert [(uri, version) for uri, _, version in array_engine.synced] == [("a", 1), ("a", 2), ("b", 2), ("b", 3)]


def test_a_kind_that_the_engine_lacks_is_refused_before_encoding(array_engine: type[ArrayEngine], build: Build) -> None:
    encoded: list[int] = []
    with pytest.raises(DataError, match="an array has no kind 'hnsw'"):
        build(engine="array", kind="hnsw", on_encoded=encoded.append)
    assert not encoded


def test_wrong_names_of_engines_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown engine 'annoy'; there are: faiss, "):
        load_engine("annoy=somewhere")
    with pytest.raises(DataError, match="the engine faiss writes a file into the index, so it takes no location"):
        load_engine("faiss=/tmp")
    with pytest.raises(ArtifactError, match=r"index\.faiss is missing"):
        load_engine("faiss").open(tmp_path)
