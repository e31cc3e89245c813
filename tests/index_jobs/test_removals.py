"""Items removed without a rebuild."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from app.cli import app
from dcar_core.util.errors import DataError
from index_jobs.jobs.update import add, remove
from index_jobs.store.filters import match_rows
from index_jobs.store.publish import rollback
from index_jobs.store.versions import open_current
from tests.support.images import draw
from tests.support.updates import write_images


def test_removed_item_is_never_found(index: Path) -> None:
    before = open_current(index)
    gone = [before.item(row).id for row in (3, 17)]
    vectors = before.vectors(np.arange(24))
    done = remove(index, [*gone, gone[0]])
    assert (done.count, done.removed) == (22, 2)
    artifact = open_current(index)
    assert (artifact.rows, artifact.manifest.count, artifact.manifest.removed) == (24, 22, 2)
    live = sorted(set(range(24)) - {3, 17})
    for allowed in (None, np.ones(24, np.bool_)):
        rows = artifact.search(vectors, 24, allowed)[1]
        assert [sorted(line) for line in rows.tolist()] == [[-1, -1, *live]] * 24
    assert [artifact.row_of(item_id) for item_id in gone] == [None, None]
    for read in (artifact.item, artifact.image_bytes):
        with pytest.raises(IndexError, match="row 3 was removed"):
            read(3)
    assert not match_rows(artifact, {})[[3, 17]].any()
    with pytest.raises(DataError, match=f"1 of 1 ids are not in the index: '{gone[0]}'; nothing was removed"):
        remove(index, [gone[0]])
    assert rollback(index) == 1
    assert open_current(index).row_of(gone[0]) == 3


def test_files_of_ids_may_come_from_another_system(index: Path, tmp_path: Path) -> None:
    """Windows begins UTF-8 with a mark, and an id may contain what only `str.splitlines` takes for a line's end."""
    gallery, ids = write_images(tmp_path / "more", "pink"), tmp_path / "ids"
    for name in ("cyan", "lime"):
        draw(name, "square").save(gallery / f"{name}.png")
    rows = [{"file_name": "cyan.png", "id": "a\u2028b"}, {"file_name": "lime.png", "id": "l"}]
    with (gallery / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    add(index, gallery, progress=False)
    for text, left in (("pink\r\na\u2028b\r\n", 25), ("l\r\n", 24)):
        ids.write_bytes(text.encode("utf-8-sig"))
        done = CliRunner().invoke(app, ["index", "remove", str(index), "--ids-file", str(ids)])
        assert f"{left} images" in done.output
    ids.write_bytes("pink\r\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"ids is not UTF-8 .*; convert it first"):
        CliRunner().invoke(
            app, ["index", "remove", str(index), "--ids-file", str(ids), "--missing-ok"], catch_exceptions=False
        )
