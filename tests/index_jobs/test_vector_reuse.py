"""Reuse of vectors when a gallery changes."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_jobs.encoding.shards import ShardStore
from index_jobs.index.versions import open_current
from tests.support.files import write_jsonl
from tests.support.images import draw
from tests.support.versions import Build


@pytest.fixture
def run(build: Build) -> Build:
    """Build with small shards: some are known whole, some in part."""
    return partial(build, batch_size=2, shard_rows=4, margin=1, max_failed=0.2, max_vanished=1)


def same_as_anew(run: Build, gallery: Path, index: Path, **options: Any) -> None:
    anew = index.with_name(f"{index.name} of {open_current(index).manifest.version} anew")
    run(gallery, out=anew, **options)
    here, there = open_current(index), open_current(anew)
    rows = np.arange(there.manifest.count)
    assert [here.item(int(row)) for row in rows] == [there.item(int(row)) for row in rows]
    np.testing.assert_allclose(here.vectors(rows), there.vectors(rows), atol=1e-6)
    for name in ("failed.jsonl", "duplicates.jsonl"):
        assert here.manifest.files[name] == there.manifest.files[name]


def test_only_new_and_changed_images_are_encoded(run: Build, gallery: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    assert run(gallery).encoded == 24
    draw("pink", "circle").resize((60, 40)).save(gallery / "a first one.png")
    shutil.copy(gallery / "circle/red.png", gallery / "circle/twin.png")
    (gallery / "broken.png").write_bytes(b"no picture")
    (gallery / "square/red.png").unlink()
    draw("lime", "square").save(gallery / "square/blue.png")
    found = run(gallery)
    assert (found.encoded, found.resumed, found.count, found.failed) == (4, 22, 25, 1)
    same_as_anew(run, gallery, index)
    (gallery / "broken.png").unlink()
    found = run(gallery)
    assert (found.encoded, found.resumed) == (0, 25)
    same_as_anew(run, gallery, index)
    first = open_current(index).item(0)
    assert (first.width, first.height) == (60, 40)


def test_another_order_and_other_ids_encode_nothing(run: Build, gallery: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    names = sorted(str(path.relative_to(gallery)) for path in gallery.rglob("*.png"))
    write_jsonl(gallery / "list.jsonl", *({"file_name": name, "id": f"a{n}"} for n, name in enumerate(names)))
    assert run(gallery / "list.jsonl").encoded == 24
    write_jsonl(gallery / "list.jsonl", *({"file_name": name, "id": f"b{n}"} for n, name in enumerate(reversed(names))))
    assert run(gallery / "list.jsonl").encoded == 0
    same_as_anew(run, gallery / "list.jsonl", index)


def test_another_model_and_damaged_shards_are_encoded_anew(
    run: Build, gallery: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    run(gallery)
    (gallery / "square/red.png").unlink()
    assert run(gallery, other_checkpoint).encoded == 23
    (gallery / "square/blue.png").unlink()
    (damaged,) = (index / "work").glob("*/000000.npz")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert run(gallery, other_checkpoint).encoded == 4
    same_as_anew(run, gallery, index, checkpoint=other_checkpoint)


def interrupt(run: Build, gallery: Path, shards: int) -> None:
    """Run a job that ends before it saves another shard than so many."""
    saved, save = 0, ShardStore.save

    def dies(self: ShardStore, *given: object) -> object:
        nonlocal saved
        saved += 1
        if saved > shards:
            raise KeyboardInterrupt
        return save(self, *given)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardStore, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run(gallery)


def test_interrupted_job_resumes_with_new_and_reused_vectors(run: Build, gallery: Path, tmp_path: Path) -> None:
    index, calm = tmp_path / "index", tmp_path / "calm"
    run(gallery)
    shutil.copytree(index, calm)
    for number in range(6):
        draw("pink", "circle").resize((32 + number, 32)).save(gallery / f"circle/{number}.png")
    interrupt(run, gallery, shards=8)  # seven are copied, one of them in part; one is encoded
    assert run(gallery).encoded == 2
    assert run(gallery, out=calm).encoded == 6
    rows = np.arange(30)
    np.testing.assert_array_equal(open_current(index).vectors(rows), open_current(calm).vectors(rows))


def test_vectors_of_interrupted_jobs_are_reused_although_the_gallery_has_changed(
    run: Build, gallery: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    """The served version is of another model, so its vectors are of no use, but they stay."""
    index = tmp_path / "index"
    run(gallery, other_checkpoint)
    (served,) = (index / "work").iterdir()
    for number, shards in enumerate((5, 0, 0)):  # the later ones end before they have copied anything
        interrupt(run, gallery, shards)
        draw("pink", "circle").resize((32 + number, 32)).save(gallery / f"{number}.png")
    found = run(gallery)
    assert (found.encoded, found.resumed) == (7, 20)
    assert len(list((index / "work").iterdir())) == 1
    assert not served.exists()
    same_as_anew(run, gallery, index)


def test_interrupted_jobs_do_not_fill_the_disk(run: Build, gallery: Path, tmp_path: Path) -> None:
    """One folder of an earlier job stays, the fullest, beside the last one's."""
    index, sizes = tmp_path / "index", list[int]()
    for number in range(4):
        interrupt(run, gallery, shards=1 + number)
        sizes.append(len(list((index / "work").iterdir())))
        draw("pink", "circle").resize((32 + number, 32)).save(gallery / f"{number}.png")
    assert sizes == [1, 2, 2, 2]


def test_vectors_of_an_interrupted_job_give_way_to_a_new_version(
    run: Build, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    interrupt(run, gallery, shards=5)
    (left,) = (index / "work").iterdir()
    draw("pink", "circle").save(gallery / "new.png")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0 if left.exists() else usage.free))
    assert run(gallery).encoded == 25
