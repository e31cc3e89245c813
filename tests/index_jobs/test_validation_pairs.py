"""Queries of the gate: validation pairs and captions, how they are found, and the cut-off that they give."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from dcar_core import Encoder
from dcar_core.data import Annotations
from dcar_core.util.errors import DataError
from index_jobs.engines.measure import caption_queries
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.index.versions import open_current
from index_jobs.jobs import gate
from tests.support.files import write_file, write_jsonl
from tests.support.images import png
from tests.support.versions import Build

ELSEWHERE = ("memory://pictures/a/", "memory://pictures/b/")  # needs no extra


def named(gallery: Gallery, data: Path) -> dict[str, str]:
    """Return the text of each matched pair by the name of its image in the gallery."""
    pairs = gate.find_pairs(gallery, data)
    assert pairs is not None
    names = dict(zip(gallery.table["id"].to_pylist(), gallery.table["name"].to_pylist(), strict=True))
    return {names[item_id]: text for item_id, text in zip(pairs.ids, pairs.texts, strict=True)}


def test_missing_validation_images_are_left_out(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / Annotations(data).load("val")[0].samples[0].image).unlink()
    found = gate.find_pairs(scan(data), data)
    assert found is not None
    assert len(found.texts) == 5
    assert "1 validation images of" in caplog.text
    with pytest.raises(DataError, match=r"none of the 5 validation pairs of .* has its image in the gallery"):
        gate.find_pairs(scan(tiny_data), data)


def test_validation_pairs_are_found_behind_links(tiny_data: Path, tmp_path: Path) -> None:
    """Symbolic links to the folder, on either side, and images that are links."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (tmp_path / "alias").symlink_to(data)
    expected = named(scan(data), data)
    assert len(expected) == 6
    assert named(scan(tmp_path / "alias"), data) == expected
    assert named(scan(data), tmp_path / "alias") == expected
    linked = tmp_path / "linked"
    for path in data.rglob("*.png"):
        (linked / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
        (linked / path.relative_to(data)).symlink_to(path)
    assert named(scan(linked), data) == expected


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True)


def test_validation_pairs_are_found_by_name_in_a_gallery_elsewhere(store: Any, tiny_data: Path, tmp_path: Path) -> None:
    expected = named(scan(tiny_data), tiny_data)
    pictures = {path.relative_to(tiny_data).as_posix(): path.read_bytes() for path in tiny_data.rglob("*.png")}
    store.pipe({f"/g/{name}": data for name, data in pictures.items()})
    store.pipe({f"/deeper/other/{name}": data for name, data in pictures.items()})
    gallery = scan("memory://g")
    assert named(gallery, tiny_data) == expected
    with pytest.raises(DataError, match="an image there is recognised by its name below the gallery"):
        gate.find_pairs(scan("memory://deeper"), tiny_data)
    lines = [{"file_name": f"{ELSEWHERE[0]}{name}?v=1"} for name in gallery.table["name"].to_pylist()]
    by_url = named(scan(write_jsonl(tmp_path / "list.jsonl", *lines)), tiny_data)
    assert by_url == {f"{ELSEWHERE[0]}{name}?v=1": text for name, text in expected.items()}
    here = [{"file_name": f"file://{tiny_data}/{name}"} for name in gallery.table["name"].to_pylist()]
    assert len(named(scan(write_jsonl(tmp_path / "here.jsonl", *here)), tiny_data)) == 6


def test_validation_pairs_are_found_in_tars(store: Any, tiny_data: Path, tmp_path: Path) -> None:
    """A member goes by its own name, or by its tar's and its own."""
    expected = named(scan(tiny_data), tiny_data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in expected:
            tar.add(tiny_data / name, name)
    shutil.copy(tiny_data / "val.json", tmp_path)
    store.pipe("/validation/shard.tar", (tmp_path / "shard.tar").read_bytes())
    in_tar = {f"shard.tar/{name}": text for name, text in expected.items()}
    assert named(scan("memory://validation"), tmp_path) == named(scan(tmp_path), tmp_path) == in_tar
    assert sorted(named(scan(tmp_path / "shard.tar"), tmp_path).values()) == sorted(expected.values())


def test_name_of_several_images_identifies_none(tiny_data: Path, tmp_path: Path) -> None:
    expected = named(scan(tiny_data), tiny_data)
    twice, *once = expected
    lines = [{"file_name": ELSEWHERE[0] + name} for name in expected] + [{"file_name": ELSEWHERE[1] + twice}]
    found = named(scan(write_jsonl(tmp_path / "list.jsonl", *lines)), tiny_data)
    assert found == {ELSEWHERE[0] + name: expected[name] for name in once}


def test_captions_of_several_images_are_no_queries(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a cat", "", "a dog", "a dog"], "id": ["0", "1", "2", "3"]})
    assert gate.find_pairs(Gallery("", str(tmp_path), table, "", ""), None) == gate.QueryPairs(
        ["a cat"], ["0"], [0], "captions"
    )


@pytest.mark.slow
def test_captions_are_taken_from_more_text_than_an_array_holds(tmp_path: Path) -> None:
    """More text than one array of Arrow's holds: 2.6 GB, of which every chunk but the last is the same memory."""
    chunk = pa.array([f"{number:02}" + "x" * 1_000_000 for number in range(64)])
    last = pa.array([f"picture {number}" for number in range(10)])
    captions = pa.chunked_array([chunk] * 40 + [last])
    ids = pa.array([str(row) for row in range(len(captions))])
    gallery = Gallery("", str(tmp_path), pa.table({"caption": captions, "id": ids}), "", "")
    assert gate.find_pairs(gallery, None) == gate.QueryPairs(
        last.to_pylist(), ids[-10:].to_pylist(), list(range(len(ids) - 10, len(ids))), "captions"
    )


def test_captions_are_sampled_from_more_text_than_an_array_holds() -> None:
    """2.6 GB, of which every chunk but the last is the same memory."""
    chunk = pa.array([f"{number:05}" + "x" * 1000 for number in range(65_536)])
    captions, texts = pa.chunked_array([chunk] * 40 + [pa.array(["a", "bb", "ccc"])]), list[str]()
    encoder: Any = SimpleNamespace(encode_text=texts.extend)
    assert caption_queries(pa.table({"caption": captions}), encoder) is not None
    step = -(-len(captions) // 1000)
    assert [text[:5] for text in texts] == [f"{row % 65_536:05}" for row in range(0, 40 * 65_536, step)]


def test_cutoff_is_calibrated_on_validation_pairs(
    build: Build, encoder: Encoder, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On those whose image can be read."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    index = tmp_path / "index"
    broken, *samples = Annotations(data).load("val")[0].samples
    (data / broken.image).write_bytes(b"no picture")
    assert build(data, max_failed=0.1).published
    assert open_current(index).manifest.cutoff == {}
    assert "follows from" not in caplog.text
    assert build(data, max_failed=0.1, validation=data).published, "it was not calibrated"
    assert "the cut-off follows from 5 validation pairs only; give 100 or more" in caplog.text
    found = open_current(index).manifest.cutoff
    texts = encoder.encode_text([sample.caption for sample in samples])
    pictures = encoder.encode_images([data / sample.image for sample in samples])
    scores = (texts * pictures).sum(1)
    assert found["min_score"] == pytest.approx(np.quantile(scores, 0.05), abs=1e-4)
    assert found["pairs"] == 5
    assert build(data, max_failed=0.1, validation=data).reused
    assert not build(data, max_failed=0.1).reused, "no calibration is asked for"
    assert open_current(index).manifest.cutoff == {}
    content = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps(dict(list(content.items())[:4])))
    again = build(data, max_failed=0.1, validation=data)
    assert (again.published, again.encoded) == (True, 0)
    assert open_current(index).manifest.cutoff["pairs"] == 3


def test_other_texts_of_the_same_images_are_another_calibration() -> None:
    one, other = (gate.QueryPairs([text], ["1"], [1], "validation").signature for text in ("a cat", "a dog"))
    assert one != other


def test_without_validation_words_make_a_cutoff_for_thirty_images(build: Build, tmp_path: Path) -> None:
    for number in range(30):
        write_file(tmp_path / "many" / f"{number}.png", png(f"#{number:02x}{255 - number:02x}{2 * number:02x}", (8, 8)))
    assert build(tmp_path / "many").published
    found = open_current(tmp_path / "index").manifest.cutoff
    assert found["words"] == 300
    assert -1 < found["min_score"] <= found["strong_score"] < 1
