"""Index files with wrong offsets and row numbers, in versions whose checksums are right."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError
from index_jobs.engines.faiss.index import FaissIndex, write_faiss
from index_jobs.index.lexical.lexical_index import LexicalIndex, write_lexical
from index_jobs.index.manifest import FileInfo
from index_jobs.index.versions import open_current, read_manifest
from tests.support.commands import run
from tests.support.versions import file_of, write_manifest


def patch(index: Path, name: str, old: bytes, new: bytes) -> None:
    """Replace bytes of a file, whose hash is right."""
    data = file_of(index, name).read_bytes()
    assert data.count(old) >= 1
    put(index, {name: data.replace(old, new, 1)})


def put(index: Path, files: dict[str, bytes]) -> None:
    """Give other contents to files of version 1."""
    manifest = read_manifest(index, 1)
    infos = {name: FileInfo(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    for name, data in files.items():
        (index / infos[name].key).write_bytes(data)
    write_manifest(index, replace(manifest, files=manifest.files | infos))


def int32(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def int64(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


@pytest.mark.parametrize("offset", [2**30, -400])
def test_a_wrong_text_offset_is_an_error_not_a_crash(index: Path, offset: int) -> None:
    """In a process of its own, which would crash without the check."""
    patch(index, "items.arrow", int32(0, 20, 40, 60, 80), int32(0, 20, offset, 60, 80))
    code = f"""
from pathlib import Path
from index_jobs.index.versions import open_current
artifact = open_current(Path({str(index)!r}))
print([artifact.item(row) for row in range(24)])
"""
    done = run("-c", code)
    assert done.returncode == 1
    assert "is damaged: " in done.stderr


def test_a_row_number_that_does_not_exist_is_an_error(index: Path) -> None:
    artifact = open_current(index)
    by_id = [artifact.segments[0].items.cell(row, "by_id") for row in range(3)]
    patch(index, "items.arrow", int64(*by_id), int64(by_id[0], 5_000_000, by_id[2]))
    with pytest.raises(ArtifactError, match=r"blobs/\w+ is damaged: a row number is not in 0..23"):
        open_current(index)


@pytest.mark.parametrize("name", [b"caption", b"field:color"])
def test_a_name_that_is_not_utf8_is_an_error(index: Path, name: bytes) -> None:
    for _ in ("the schema", "its copy in the footer"):
        patch(index, "items.arrow", name, name[:-1] + b"\xff")
    with pytest.raises(ArtifactError, match=r"blobs/\w+ cannot be read: 'utf-8' codec can't decode byte 0xff"):
        open_current(index)


def graph_link(index: Any) -> tuple[bytes, bytes]:
    graph: Any = faiss.downcast_index(index)
    links = faiss.vector_to_array(graph.hnsw.neighbors)[:8].tolist()
    return int32(*links), int32(links[0], 2**30, *links[2:])


def list_row(index: Any) -> tuple[bytes, bytes]:
    inverted: Any = faiss.downcast_index(index)
    lists = inverted.invlists
    size = lists.list_size(0)
    rows = faiss.rev_swig_ptr(lists.get_ids(0), size).tolist()
    return int64(*rows), int64(*rows[:-1], 10**12)


@pytest.mark.parametrize(("kind", "change"), [("HNSW16", graph_link), ("IVF4,Flat", list_row)])
def test_a_wrong_row_number_of_faiss_is_an_error(
    kind: str, change: Callable[[Any], tuple[bytes, bytes]], tmp_path: Path
) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    index = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    path = tmp_path / "index.faiss"
    write_faiss(index, path)
    assert FaissIndex.open(path).count == 300
    old, new = change(index)
    data = path.read_bytes()
    assert data.count(old) == 1
    (tmp_path / "hostile.faiss").write_bytes(data.replace(old, new))
    with pytest.raises(ArtifactError, match=r"a row number is not in 0..299|out of range"):
        FaissIndex.open(tmp_path / "hostile.faiss")


def test_another_metric_is_an_error(tmp_path: Path) -> None:
    write_faiss(faiss.index_factory(16, "Flat", faiss.METRIC_L2), tmp_path / "index.faiss")
    with pytest.raises(ArtifactError, match="metric 1"):
        FaissIndex.open(tmp_path / "index.faiss")


def test_lexical_rows_that_do_not_exist_are_an_error(index: Path, tmp_path: Path) -> None:
    write_lexical(tmp_path / "lexical", ["a ghost", "a skull"])
    assert len(LexicalIndex(tmp_path / "lexical")) == 2
    write_lexical(tmp_path / "lexical", ["a cake"], first_row=9)
    with pytest.raises(ArtifactError, match="lexical cannot be read: its row numbers are not those from 0 to 2"):
        LexicalIndex(tmp_path / "lexical")
    artifact = open_current(index)
    write_lexical(artifact.folder / "lexical", ["one more"], first_row=24)
    put(index, {f"lexical/{path.name}": path.read_bytes() for path in (artifact.folder / "lexical").iterdir()})
    artifact = open_current(index)
    with pytest.raises(ArtifactError, match=r"lexical of version 1 of .* has 25 rows, but the index 24"):
        _ = artifact.lexical


@pytest.mark.parametrize("name", ["*.fast", "*.idx", "*.term"])
def test_a_changed_byte_of_a_lexical_index_is_an_error_not_a_panic(name: str, tmp_path: Path) -> None:
    texts = ["ghost: a white spook", "skull", "fish cake", "a red car", "red truck, fire engine", "WX-300 left mirror"]
    write_lexical(tmp_path / "lexical", texts)
    (file,) = (tmp_path / "lexical").glob(name)
    right, everywhere, errors = file.read_bytes(), np.ones(len(texts), np.bool_), 0
    for place in range(3, min(len(right), 240), 7):
        file.unlink()  # a mapped file is never written into
        file.write_bytes(right[:place] + b"\x1f" + right[place + 1 :])
        try:
            lexical = LexicalIndex(tmp_path / "lexical")
            for query in ("red truck", "gohst"):
                rows = [*lexical.search(query, 3)[1], *lexical.search(query, 9, everywhere)[1]]
                assert {*rows} <= {*range(len(texts))}
                lexical.known_share(query)
        except ArtifactError as error:
            assert str(tmp_path / "lexical") in str(error)  # noqa: PT017
            errors += 1
    assert errors >= 5
