"""`dcar index report`: its scores against plain NumPy, its page, and its Parquet file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.util.errors import DataError
from index_jobs.jobs import report
from index_jobs.jobs.report import write_report
from index_jobs.jobs.update import remove
from index_jobs.store.versions import open_current
from tests.support.versions import Build

HOSTILE = "<script>alert('1 & 2')</script>"


@pytest.fixture
def index(gallery: Path, build: Build, tmp_path: Path) -> Path:
    """24 pictures, a copy of one, one without a caption and one with a hostile text; one more is removed later."""
    lines = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text().splitlines()]
    lines[0]["caption"], lines[1]["caption"] = HOSTILE, ""
    for name in ("copy.png", "later.png"):
        shutil.copy(gallery / lines[5]["file_name"], gallery / name)
        lines.append({**lines[5], "file_name": name})
    (gallery / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build(gallery)
    index = tmp_path / "index"
    artifact = open_current(index)
    remove(index, [each.id for each in map(artifact.item, range(26)) if each.metadata["file_name"] == "later.png"])
    return index


def test_scores_are_those_of_plain_arrays(
    index: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_BLOCK", 7)
    findings = {each.title: each for each in write_report(index, tmp_path / "report.html", threshold=0.9999)}
    table = pq.read_table(tmp_path / "report.parquet")
    items = table.to_pydict()
    artifact = open_current(index)
    rows = np.flatnonzero(artifact.live)
    assert items["id"] == [artifact.item(row).id for row in rows.tolist()]
    assert [Path(path).is_file() for path in items["path"]] == [True] * 25
    vectors = artifact.vectors(rows)
    assert np.array_equal(np.array(items["vector"], np.float32), vectors)

    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, 1, kind="stable")[:, :10]
    ranked = np.take_along_axis(cosines, nearest, 1)
    assert np.allclose(items["nearest_cosine"], ranked[:, 0], atol=1e-6)
    assert np.allclose(items["neighbours_cosine"], ranked.mean(1), atol=1e-6)
    categories = np.array(items["category"])
    others = (categories[nearest] != categories[:, None]).mean(1)
    assert np.abs(np.array(items["other_category"]) - others).mean() < 0.02, "the tenth neighbour may tie"

    all_texts = encoder.encode_text(items["caption"]) @ vectors.T
    fits = (np.diag(all_texts) - all_texts.mean(1)) / all_texts.std(1)
    has_caption = np.array([bool(text) for text in items["caption"]])
    assert has_caption.sum() == 24
    assert np.allclose(np.array(items["caption_fit"], float)[has_caption], fits[has_caption], atol=1e-2)
    assert [value is None for value in items["caption_fit"]] == (~has_caption).tolist()
    assert findings["Captions that do not fit"].total == (fits[has_caption] < 1).sum()

    x, y = (np.array(items[axis]) for axis in "xy")
    spread = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)
    assert np.allclose([x.std(), y.std()], spread[:2] / 5, rtol=1e-3)

    copied = next(i for i, path in enumerate(items["path"]) if path.endswith("copy.png"))
    ((members, _),) = findings["Near-duplicates"].cases
    assert copied in members
    assert len(members) == 2
    assert [i for i, group in enumerate(items["duplicate_group"]) if group == members[0]] == members


def test_page_is_one_file_with_pictures_and_harmless_texts(
    index: Path, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_FIT", 99.0)  # every caption
    (gallery / "circle" / "black.png").unlink()
    options = ["--index", str(index), "--out", str(tmp_path / "new" / "report.html"), "--duplicates-from", "0.9999"]
    done = CliRunner().invoke(app, ["index", "report", *options], catch_exceptions=False)
    assert "Near-duplicates: 1, such as " in done.stdout
    assert "Captions that do not fit: 24, such as " in done.stdout
    assert "report.parquet --text caption --vector vector" in done.stdout
    page = (tmp_path / "new" / "report.html").read_text()
    assert "alert(&#x27;1 &amp; 2&#x27;)" in page
    assert "<script" not in page
    assert "http" not in page
    assert page.count('src="data:image/') >= 24
    assert "<span>circle/black.png</span>" in page, "a picture that is gone is named"


def test_categories_that_overlap_and_pictures_far_from_all(
    gallery: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):  # the same pictures as two categories
        shutil.copy(gallery / "square" / "red.png", gallery / "square" / f"red-{number}.png")
        (gallery / "twin").mkdir(exist_ok=True)
        shutil.copy(gallery / "square" / "red.png", gallery / "twin" / f"red-{number}.png")
    for table in gallery.glob("*.json*"):  # of the gallery, and of training data in the same folder
        table.unlink()
    build(gallery)
    monkeypatch.setattr(report, "_FAR", -99.0)  # every picture
    findings = {each.title: each for each in write_report(tmp_path / "index", tmp_path / "report.html")}
    assert any(text.startswith("twin: ") and "square" in text for _, text in findings["Categories that overlap"].cases)
    assert findings["Captions that do not fit"].total == 0
    far = findings["Pictures far from all"]
    lowest = min(pq.read_table(tmp_path / "report.parquet")["neighbours_cosine"].to_pylist())
    assert far.total == 36
    assert far.cases[0][1].endswith(f"mean cosine {lowest:.3f}")


def test_an_index_of_one_picture_has_nothing_to_compare(gallery: Path, build: Build, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(gallery / "square" / "red.png", tmp_path / "one")
    build(tmp_path / "one")
    with pytest.raises(DataError, match="has one picture"):
        write_report(tmp_path / "index", tmp_path / "report.html")
    with pytest.raises(DataError, match=r"ends in \.html"):
        write_report(tmp_path / "index", tmp_path / "report.parquet")
