"""Vector engines: FAISS is built in, others are installed."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError, DataError
from index_jobs.engines.protocol import load_engine
from index_jobs.index.changes import change_metadata
from index_jobs.index.filters import filter_rows, match_rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.stores import index_name
from index_jobs.index.versions import open_current, rollback, verify_index
from index_jobs.jobs.update import add, remove
from index_jobs.row_filter import RowFilter
from tests.support import array_engine
from tests.support.galleries import write_images
from tests.support.versions import Build


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Put an engine of a third party on `sys.path`, as pip installs it, and return its
    class.
    """
    site = tmp_path / "site-packages"
    (about := site / "array_engine-1.0.dist-info").mkdir(parents=True)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: array-engine\nVersion: 1.0\n"
    )
    (about / "entry_points.txt").write_text(
        "[dcar.engines]\narray = array_engine:ArrayEngine\n"
    )
    shutil.copyfile(array_engine.__file__, site / "array_engine.py")
    monkeypatch.syspath_prepend(site)
    yield importlib.import_module("array_engine").ArrayEngine
    del sys.modules["array_engine"]


def test_an_installed_engine_builds_searches_updates_and_follows_versions(
    installed: Any,
    published: Path,
    build: Build,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    name = index_name(tmp_path / "index")
    summary = build(engine="array=memory")
    assert summary.kind == "array"
    assert summary.measured["recall_at_10"] == 1.0
    assert summary.count == 24
    ours = open_current(index)
    faiss = open_current(published)
    assert "index.faiss" not in ours.manifest.files
    rows = np.arange(24)
    for allowed in (None, RowFilter.of_mask(rows % 3 == 0)):
        scores, found = ours.search(faiss.vectors(rows), 10, allowed)
        expected, truth = faiss.search(faiss.vectors(rows), 10, allowed)
        assert found[:, 0].tolist() == truth[:, 0].tolist()
        np.testing.assert_allclose(
            np.where(found < 0, -9, scores),
            np.where(truth < 0, -9, expected),
            atol=1e-5,
        )
    assert build(engine="array=memory").reused
    add(index, write_images(tmp_path / "more", "pink"), progress=False)
    remove(index, [ours.item(4).id])
    updated = open_current(index)
    assert updated.manifest.count == 24
    assert updated.row_of("pink") == 24
    assert updated.search(updated.vectors(np.array([24])), 1)[1].tolist() == [[24]]
    assert rollback(index) == 2
    assert installed.synced == [("memory", name, version) for version in (1, 2, 3, 2)]
    assert len(verify_index(index)) == 3


def test_an_engine_that_is_left_is_told_so(installed: Any, build: Build) -> None:
    """Its last version is removed in the same publication."""
    build(engine="array=a")
    build(engine="array=b", keep=1)
    build(keep=1)
    assert [(uri, version) for uri, _, version in installed.synced] == [
        ("a", 1),
        ("a", 2),
        ("b", 2),
        ("b", 3),
    ]


def as_stored(built: IndexVersion, rows: RowFilter) -> list[int]:
    """Return the rows of a filter as an engine finds them that has the fields as they
    were built.
    """
    stored = np.flatnonzero(match_rows(built, rows.filter))
    return np.union1d(np.setdiff1d(stored, rows.excluded), rows.included).tolist()


def test_stored_fields_and_exceptions_tell_the_rows_of_a_filter(
    installed: Any,
    build: Build,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    build(engine="array=memory")
    built = open_current(index)
    ids = built.column("id").to_pylist()
    change_metadata(
        index,
        [
            (ids[0], {"color": "mauve"}),
            (ids[9], {"color": built.item(1).metadata["color"]}),
        ],
        "test",
    )
    remove(index, [ids[5]])
    opened = open_current(index)
    colors = {opened.item(row).metadata["color"] for row in range(24) if row != 5}
    for color in colors - {"mauve"}:
        for condition in (color, {"not": color}):
            rows = filter_rows(opened, {"color": condition})
            assert as_stored(built, rows) == np.flatnonzero(rows.mask).tolist()
            assert rows.excluded.tolist() == [0, 5, 9]
            part = rows.part(range(3, 24))
            assert part.mask.tolist() == rows.mask[3:].tolist()
            assert part.excluded.tolist() == [2, 6]
            fewer = rows.without(np.array([1, 9, 20]))
            assert as_stored(built, fewer) == np.flatnonzero(fewer.mask).tolist()
            assert not fewer.mask[[1, 9, 20]].any()


def test_rebuild_is_recommended_once_searches_name_many_rows(
    installed: Any,
    build: Build,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    build(engine="array=memory")
    ids = [open_current(index).item(row).id for row in range(5)]
    assert (
        change_metadata(
            index,
            [(each, {"price": 1}) for each in ids[:4]],
            "a test",
        ).rebuild
        == ""
    )
    assert remove(index, ids[3:4]).rebuild == ""
    reason = "of 24 rows are removed or changed, which every search excludes"
    assert (
        change_metadata(index, [(ids[4], {"price": 1})], "a test").rebuild
        == f"5 {reason}"
    )
    assert build(engine="array=memory").version == 5
    assert open_current(index).manifest.rebuild == ""


def test_wrong_names_and_kinds_of_engines_are_refused(
    installed: Any, build: Build
) -> None:
    for engine, says in (
        (
            "annoy=somewhere",
            (
                r"unknown engine 'annoy'; installed are: faiss,.*array.* `pip install`"
                r" adds"
            ),
        ),
        (
            "faiss=/tmp",
            "the engine faiss writes a file into the index, so it takes no location",
        ),
    ):
        with pytest.raises(DataError, match=says):
            load_engine(engine)
    with pytest.raises(ArtifactError, match=r"index\.faiss is missing"):
        load_engine("faiss").open({})
    encoded: list[int] = []
    with pytest.raises(DataError, match="an array has no kind 'hnsw'"):
        build(engine="array", kind="hnsw", on_encoded=encoded.append)
    assert not encoded
