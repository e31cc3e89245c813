"""Index files with wrong offsets and row numbers, in versions whose checksums are right."""

import hashlib
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


def numbers(*values: int, kind: type = np.int32) -> bytes:
    return np.array(values, kind).tobytes()


@pytest.mark.parametrize("offset", [2**30, -400])
def test_a_wrong_text_offset_is_an_error_not_a_crash(index: Path, offset: int) -> None:
    """In a process of its own, which would crash without the check."""
    patch(index, "items.arrow", numbers(0, 20, 40, 60, 80), numbers(0, 20, offset, 60, 80))
    code = (
        "import sys, pathlib; from index_jobs.index.versions import open_current; index = pathlib.Path(sys.argv[1]); "
    )
    done = run("-c", f"{code}print([open_current(index).item(row) for row in range(24)])", index)
    assert (done.returncode, "is damaged: " in done.stderr) == (1, True)


def test_a_wrong_row_number_or_name_of_items_is_an_error(index: Path, tmp_path: Path) -> None:
    by_id = [open_current(index).parts[0].items.cell(row, "by_id") for row in range(3)]
    right, wrong = (numbers(by_id[0], row, by_id[2], kind=np.int64) for row in (by_id[1], 5_000_000))
    manifest = read_manifest(index, 1)
    patch(index, "items.arrow", right, wrong)
    with pytest.raises(ArtifactError, match=r"blobs/\w+ is damaged: a row number is not in 0..23"):
        open_current(index)
    for name in (b"caption", b"field:color"):
        write_manifest(index, manifest)
        for _ in ("the schema", "its copy in the footer"):
            patch(index, "items.arrow", name, name[:-1] + b"\xff")
        with pytest.raises(ArtifactError, match=r"blobs/\w+ cannot be read: 'utf-8' codec can't decode byte 0xff"):
            open_current(index)


@pytest.mark.parametrize("kind", ["HNSW16", "IVF4,Flat"])
def test_a_wrong_row_number_or_metric_of_faiss_is_an_error(kind: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    index, path = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT), tmp_path / "index.faiss"
    index.train(vectors)
    index.add(vectors)
    write_faiss(index, path)
    assert FaissIndex.open(path).count == 300
    inner: Any = faiss.downcast_index(index)
    if kind == "HNSW16":
        links = faiss.vector_to_array(inner.hnsw.neighbors)[:8].tolist()
        old, new = numbers(*links), numbers(links[0], 2**30, *links[2:])
    else:
        rows = faiss.rev_swig_ptr(inner.invlists.get_ids(0), inner.invlists.list_size(0)).tolist()
        old, new = (numbers(*rows[:-1], last, kind=np.int64) for last in (rows[-1], 10**12))
    data = path.read_bytes()
    assert data.count(old) == 1
    (tmp_path / "hostile.faiss").write_bytes(data.replace(old, new))
    with pytest.raises(ArtifactError, match=r"a row number is not in 0..299|out of range"):
        FaissIndex.open(tmp_path / "hostile.faiss")
    write_faiss(faiss.index_factory(16, kind, faiss.METRIC_L2), path)
    with pytest.raises(ArtifactError, match="metric 1"):
        FaissIndex.open(path)


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
