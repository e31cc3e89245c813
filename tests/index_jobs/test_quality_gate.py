"""The quality gate between a rebuilt and a served index."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import scan
from index_jobs.index.versions import current_version, open_current, version_numbers
from index_jobs.jobs import gate
from index_jobs.jobs.summary import RejectedError
from index_jobs.jobs.update import remove
from index_jobs.rebuild import main, rebuild
from tests.support.files import write_jsonl
from tests.support.images import draw
from tests.support.versions import Build, file_of


class Models(NamedTuple):
    """Two checkpoints, by their recall on the gallery's captions, and an index made with the better one."""

    better: Path
    worse: Path
    served: Path


@pytest.fixture(scope="module")
def models(
    tiny_gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Models:
    index = tmp_path_factory.mktemp("order") / "index"
    rebuild(tiny_gallery, tiny_checkpoint, index, progress=False)
    found = rebuild(tiny_gallery, other_checkpoint, index, progress=False, margin=1).gate
    assert found is not None
    assert (found["passed"], found["compared"], found["pairs"], found["source"]) == (True, True, 24, "captions")
    lost = [found["serving"][name] - found["rebuilt"][name] for name in ("recall_at_1", "recall_at_10")]
    assert max(map(abs, lost)) > 0.02, "two random models that rank alike show nothing"
    order = (tiny_checkpoint, other_checkpoint) if max(lost) > 0.02 else (other_checkpoint, tiny_checkpoint)
    served = tmp_path_factory.mktemp("served") / "index"
    rebuild(tiny_gallery, order[0], served, progress=False)
    return Models(*order, served)


@pytest.fixture
def index(models: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models.served, tmp_path / "index"))


def ranks_of(checkpoint: Path, texts: list[str], images: list[Path]) -> NDArray[np.int64]:
    """Return the rank of each text's image by a model, from 0."""
    encoder = Encoder.load(checkpoint, device="cpu")
    scores = encoder.encode_text(texts) @ encoder.encode_images(images).T
    return np.asarray((scores > np.diag(scores)[:, None] + 1e-7).sum(1))


def test_recalls_are_of_the_two_models(build: Build, models: Models, index: Path, tiny_gallery: Path) -> None:
    with pytest.raises(RejectedError) as caught:
        build(checkpoint=models.worse, margin=0)
    verdict = caught.value.summary.gate
    assert verdict is not None
    table = scan(tiny_gallery).table
    paths = [tiny_gallery / name for name in table["name"].to_pylist()]
    for checkpoint, side in zip(models, ("serving", "rebuilt"), strict=False):
        ranks = ranks_of(checkpoint, table["caption"].to_pylist(), paths)
        wanted = ((ranks < 1).mean(), (ranks < 10).mean(), (1 / np.log2(2 + ranks)).mean())
        assert [*verdict[side]] == ["recall_at_1", "recall_at_10", "ndcg_at_100"]
        assert [*verdict[side].values()] == pytest.approx(wanted, abs=0.0001)


@pytest.mark.slow
def test_worse_index_is_not_published_unless_forced(
    build: Build, models: Models, index: Path, tiny_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--gallery", tiny_gallery, "--checkpoint", models.worse, "--out", index, "--quiet"]

    def run(*more: str) -> tuple[int, dict[str, Any], str]:
        code = main([*map(str, arguments), *more])
        stdout, stderr = capsys.readouterr()
        return code, json.loads(stdout), stderr

    code, summary, stderr = run()
    assert (code, current_version(index)) == (6, 1)
    assert (summary["published"], summary["version"], summary["gate"]["passed"]) == (False, 1, False)
    assert "not published: the rebuilt index ranks worse than version 1: R@1 " in stderr
    assert stderr.count("\n") == 1
    assert version_numbers(index) == [1]
    code, summary, _ = run("--margin", "0.9")
    assert (code, summary["published"], summary["version"], summary["resumed"]) == (0, True, 2, 24)
    build(checkpoint=models.better)
    code, summary, _ = run("--force")
    assert (code, summary["published"], summary["version"], summary["gate"]["passed"]) == (0, True, 4, False)


def test_larger_gallery_does_not_count_as_a_worse_model(
    build: Build, models: Models, index: Path, gallery: Path
) -> None:
    """Forty near copies of one image lower its rank but are not compared."""
    for number in range(40):
        draw("red", "circle", 48 + number % 7).save(gallery / f"copy{number}.png")
    summary = build(gallery, checkpoint=models.better, margin=0)
    assert summary.gate is not None
    assert summary.count == 64
    assert summary.gate["serving"] == summary.gate["rebuilt"]


def test_validation_pairs_are_compared(build: Build, models: Models, index: Path, tiny_data: Path) -> None:
    summary = build(tiny_data, checkpoint=models.better, kind="hnsw", validation=tiny_data)
    assert summary.gate is not None
    assert (summary.gate["source"], summary.gate["pairs"]) == ("validation", 6)


@pytest.mark.slow
def test_a_judged_list_decides_without_captions(
    build: Build, models: Models, gallery: Path, tiny_gallery: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (tiny_gallery / "metadata.jsonl").read_text().splitlines()]
    write_jsonl(gallery / "metadata.jsonl", *({"file_name": row["file_name"]} for row in rows))
    build(gallery, checkpoint=models.better)
    served = open_current(tmp_path / "index")
    ids = {served.item(row).metadata["file_name"]: served.item(row).id for row in range(served.rows)}
    judged = tmp_path / "judged.csv"
    lines = [f"{row['caption']},{ids[row['file_name']]},3\n{row['caption']},sold,3\n" for row in rows]
    judged.write_text("query,item_id,grade\n" + "".join(lines))
    with pytest.raises(
        RejectedError, match=r"judged nDCG@10 .* percent over 24 queries; its vectors are kept"
    ) as caught:
        build(gallery, checkpoint=models.worse, judgements=judged)
    verdict = caught.value.summary.gate
    assert verdict is not None
    assert (verdict["compared"], verdict["passed"], verdict["pairs"], verdict["judged"]) == (True, False, 0, 24)
    images = [gallery / row["file_name"] for row in rows]
    for checkpoint, side in zip(models, ("serving", "rebuilt"), strict=False):
        ranks = ranks_of(checkpoint, [row["caption"] for row in rows], images)
        wanted = np.where(ranks < 10, 1 / np.log2(2 + ranks), 0).mean()
        assert verdict[side] == {"judged_ndcg_at_10": pytest.approx(wanted, abs=0.0001)}
    allowed = tmp_path / "allowed.csv"
    allowed.write_text(f"query,item_id,grade\nred,sold,3\nred,{ids['circle/red.png']},0\n")
    with pytest.raises(RejectedError, match="no relevant item of the judged list is in both indexes, so it compares"):
        build(gallery, checkpoint=models.worse, judgements=allowed)
    assert build(gallery, checkpoint=models.worse, judgements=allowed, force=True).version == 2


def test_a_bad_judged_list_ends_the_build_before_it_begins(build: Build, tmp_path: Path) -> None:
    (tmp_path / "judged.csv").write_text("query,item_id,grade\nred,a,7\n")
    with pytest.raises(DataError, match="line 2: field 'grade'"):
        build(judgements=tmp_path / "judged.csv")
    assert not (tmp_path / "index").exists()


def test_removed_items_are_not_compared(index: Path, tiny_gallery: Path) -> None:
    whole = open_current(index)
    encoder = Encoder.load(whole.checkpoint, device="cpu")
    remove(index, [whole.item(3).id])
    pairs, encode = gate.find_pairs(scan(tiny_gallery), None), encoder.encode_text
    verdict = gate.compare((whole, encode), (open_current(index), encode), pairs)
    assert (verdict.pool, verdict.pairs) == (23, 23)
    assert verdict.serving == verdict.rebuilt


def test_missing_served_model_is_an_error_before_encoding(
    tiny_model: Path, tiny_checkpoint: Path, tiny_gallery: Path, other_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The served model was made on a backbone that is gone by now."""
    index, base = tmp_path / "index", Path(shutil.copytree(tiny_model, tmp_path / "models" / tiny_model.name))
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "models" / tiny_checkpoint.name)
    rebuild(tiny_gallery, checkpoint, index, progress=False)
    base.rename(tmp_path / "gone")
    before = sorted((index / "work").iterdir())
    arguments = [*map(str, ("--gallery", tiny_gallery, "--checkpoint", other_checkpoint, "--out", index, "--quiet"))]
    assert main(arguments) == 4
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("error: the served version 1 cannot be compared")
    assert "or publish by --force" in stderr
    assert sorted((index / "work").iterdir()) == before, "nothing was encoded, and nothing removed"
    assert main([*arguments, "--force"]) == 0
    verdict = json.loads(capsys.readouterr().out)["gate"]
    assert (verdict["passed"], verdict["compared"], current_version(index)) == (True, False, 2)
    assert verdict["reason"].startswith("the served version 1 cannot be compared")
    (tmp_path / "gone").rename(base)
    assert rebuild(tiny_gallery, checkpoint, index, progress=False, margin=1).published


@pytest.mark.slow
def test_rejected_rebuilds_leave_one_set_of_vectors_for_the_next(
    build: Build, models: Models, index: Path, gallery: Path
) -> None:
    """Besides the served one, so retraining does not fill the disk; also if the gallery has changed."""
    assert build(gallery, checkpoint=models.better).published
    (served,) = (index / "work").iterdir()
    kept = set[Path]()
    for name, size, encoded in (("first", 64, 24), ("second", 64, 1), ("third", 5, 1)):
        with pytest.raises(RejectedError, match="its vectors are kept") as caught:
            build(gallery, checkpoint=models.worse, margin=0, batch_size=size)
        assert caught.value.summary.encoded == encoded
        (rejected,) = set((index / "work").iterdir()) - {served}
        kept.add(rejected)
        shutil.copy(gallery / "circle" / "red.png", gallery / f"{name}.png")
    assert len(kept) == 3, "or the test shows nothing"
    assert build(gallery, checkpoint=models.better, margin=1).encoded == 3
    assert len(list((index / "work").iterdir())) == 1


def test_rejected_vectors_are_deleted_on_request(build: Build, models: Models, index: Path) -> None:
    with pytest.raises(RejectedError, match="its vectors are not kept"):
        build(checkpoint=models.worse, margin=0, keep_shards=False)
    assert not (index / "work").exists()
    assert current_version(index) == 1


def test_gallery_without_captions_is_published_uncompared(
    build: Build, tiny_gallery: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    gallery = tmp_path / "bare"
    shutil.copytree(tiny_gallery / "circle", gallery)
    build(gallery)
    summary = build(gallery, other_checkpoint)
    assert summary.gate is not None
    assert (summary.published, summary.gate["compared"]) == (True, False)
    assert "no captions and no validation pairs" in summary.gate["reason"]


def test_broken_served_index_is_replaced(
    build: Build, models: Models, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file_of(index, "items.arrow").unlink()
    assert build(checkpoint=models.worse).published
    assert open_current(index).manifest.version == 2
    (warning,) = (record for record in caplog.records if "nothing is compared with it" in record.message)
    assert warning.levelname == "WARNING"


def test_loss_of_exactly_the_margin_passes() -> None:
    for loss in range(1, 99):
        served, found = {"recall_at_1": (loss + 1) / 100}, {"recall_at_1": (loss - 1) / 100}
        assert gate.losses(served, found, 0.02) == []
        assert gate.losses(served, found, 0.0199) == ["recall_at_1"]


class Ranked:
    """An index of 895 items in which the text "n" finds item n at a given rank."""

    manifest, live = SimpleNamespace(hybrid_weight=None), np.ones(895, np.bool_)
    row_of = staticmethod(int)

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([[str(row) for row in range(895)]])

    def search(self, items: list[int], k: int, allowed: object) -> tuple[np.ndarray, np.ndarray]:
        others = [[row for row in range(895) if row != item] for item in items]
        rows = [[*rest[: self.ranks[item]], item, *rest[self.ranks[item] :]][:k] for item, rest in enumerate(others)]
        return np.zeros((len(rows), k)), np.array(rows)


def compare(before: list[int], after: list[int]) -> gate.GateVerdict:
    names = [str(number) for number in range(len(before))]
    pairs = gate.QueryPairs(names, names, list(range(len(names))), "validation")
    served, rebuilt = ((cast(Any, Ranked(ranks)), lambda texts: [*map(int, texts)]) for ranks in (before, after))
    return gate.compare(cast(Any, served), cast(Any, rebuilt), pairs)


def test_a_model_with_worse_ranks_fails_although_its_hits_are_nearly_as_many() -> None:
    """4 against 3 hits of 80, where the images of all other texts are far down the list."""
    verdict = compare([0] * 4 + [12] * 76, [0] * 3 + [60] * 77)
    assert verdict.serving is not None
    assert verdict.rebuilt is not None
    assert verdict.serving["recall_at_1"] - verdict.rebuilt["recall_at_1"] < 0.02
    assert (verdict.passed, verdict.pool) == (False, 895)
    assert verdict.difference is not None
    assert verdict.difference["low"] < verdict.difference["value"] < verdict.difference["high"] < 0
    assert "among 895 images over 80 pairs" in verdict.reason
    assert "points (95 % interval -" in verdict.reason


def test_too_few_pairs_for_the_margin_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert compare([0] * 20, [0] * 20).visible == 0.05
    assert "20 pairs tell differences of 5.0 points from chance, but the margin is 2;" in caplog.text
    caplog.clear()
    assert compare([0] * 100, [0] * 100).passed
    assert not caplog.text
