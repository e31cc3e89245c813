"""Reuse of vectors when a gallery changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from index_jobs.encoding.shards import ShardStore
from index_jobs.jobs.summary import RebuildSummary
from index_jobs.rebuild import rebuild
from index_jobs.store.versions import open_current
from tests.support.files import write_jsonl
from tests.support.images import draw


@pytest.fixture
def gallery(tiny_gallery: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_gallery, tmp_path / "gallery"))


def run(gallery: Path, checkpoint: Path, out: Path) -> RebuildSummary:
    """With small shards: some are known whole, some in part."""
    return rebuild(
        gallery, checkpoint, out, batch_size=2, shard_rows=4, margin=1, max_failed=0.2, max_vanished=1, progress=False
    )


def same_as_anew(gallery: Path, checkpoint: Path, index: Path, anew: Path) -> None:
    run(gallery, checkpoint, anew)
    here, there = open_current(index), open_current(anew)
    rows = np.arange(there.manifest.count)
    assert [here.item(int(row)) for row in rows] == [there.item(int(row)) for row in rows]
    np.testing.assert_allclose(here.vectors(rows), there.vectors(rows), atol=1e-6)
    for name in ("failed.jsonl", "duplicates.jsonl"):
        assert (here.path / name).read_bytes() == (there.path / name).read_bytes()


def test_only_new_and_changed_images_are_encoded(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    assert run(gallery, tiny_checkpoint, index).encoded == 24
    draw("pink", "circle").resize((60, 40)).save(gallery / "a first one.png")
    shutil.copy(gallery / "circle/red.png", gallery / "circle/twin.png")
    (gallery / "broken.png").write_bytes(b"no picture")
    (gallery / "square/red.png").unlink()
    draw("lime", "square").save(gallery / "square/blue.png")
    found = run(gallery, tiny_checkpoint, index)
    assert (found.encoded, found.resumed, found.count, found.failed) == (4, 22, 25, 1)
    same_as_anew(gallery, tiny_checkpoint, index, tmp_path / "anew")
    (gallery / "broken.png").unlink()
    found = run(gallery, tiny_checkpoint, index)
    assert (found.encoded, found.resumed) == (0, 25)
    same_as_anew(gallery, tiny_checkpoint, index, tmp_path / "anew again")
    first = open_current(index).item(0)
    assert (first.width, first.height) == (60, 40)


def test_another_order_and_other_ids_encode_nothing(gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    names = sorted(str(path.relative_to(gallery)) for path in gallery.rglob("*.png"))
    write_jsonl(gallery / "list.jsonl", *({"file_name": name, "id": f"a{n}"} for n, name in enumerate(names)))
    assert run(gallery / "list.jsonl", tiny_checkpoint, index).encoded == 24
    write_jsonl(gallery / "list.jsonl", *({"file_name": name, "id": f"b{n}"} for n, name in enumerate(reversed(names))))
    assert run(gallery / "list.jsonl", tiny_checkpoint, index).encoded == 0
    same_as_anew(gallery / "list.jsonl", tiny_checkpoint, index, tmp_path / "anew")


def test_another_model_and_damaged_shards_are_encoded_anew(
    gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    run(gallery, tiny_checkpoint, index)
    (gallery / "square/red.png").unlink()
    assert run(gallery, other_checkpoint, index).encoded == 23
    (gallery / "square/blue.png").unlink()
    (damaged,) = (index / "work").glob("*/000000.npy")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert run(gallery, other_checkpoint, index).encoded == 4
    same_as_anew(gallery, other_checkpoint, index, tmp_path / "anew")


def test_interrupted_job_resumes_with_new_and_reused_vectors(
    gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, calm = tmp_path / "index", tmp_path / "calm"
    run(gallery, tiny_checkpoint, index)
    shutil.copytree(index, calm)
    for number in range(6):
        draw("pink", "circle").resize((32 + number, 32)).save(gallery / f"circle/{number}.png")
    saved, save = 0, ShardStore.save

    def dies(self: ShardStore, *given: object) -> object:
        nonlocal saved
        saved += 1
        if saved == 8:  # six shards are copied, one is encoded
            raise KeyboardInterrupt
        return save(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run(gallery, tiny_checkpoint, index)
    assert run(gallery, tiny_checkpoint, index).encoded == 2
    assert run(gallery, tiny_checkpoint, calm).encoded == 6
    rows = np.arange(30)
    np.testing.assert_array_equal(open_current(index).vectors(rows), open_current(calm).vectors(rows))
