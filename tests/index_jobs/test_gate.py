"""A rebuilt index against the one that is served: who is published, and who is told."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drawing import draw

from dcar_core import Encoder
from dcar_core.data import load_split
from dcar_core.errors import DataError
from index_jobs import gate
from index_jobs.artifact import current_version, open_current
from index_jobs.gallery import scan
from index_jobs.options import RejectedError
from index_jobs.rebuild import main, rebuild


@pytest.fixture(scope="module")
def better_and_worse(
    tiny_gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Two checkpoints, ordered by their recall on the gallery's captions, and an index made with the better one."""
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
    return *order, served


@pytest.fixture
def index(better_and_worse: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(better_and_worse[2], tmp_path / "index"))


def test_recalls_are_those_of_the_two_models(
    tiny_gallery: Path, better_and_worse: tuple[Path, Path, Path], index: Path
) -> None:
    with pytest.raises(RejectedError) as caught:
        rebuild(tiny_gallery, better_and_worse[1], index, progress=False, margin=0)
    verdict = caught.value.summary.gate
    assert verdict is not None
    table = scan(tiny_gallery).table
    paths = [tiny_gallery / name for name in table["name"].to_pylist()]
    for checkpoint, side in zip(better_and_worse, ("serving", "rebuilt"), strict=False):
        encoder = Encoder.load(checkpoint, device="cpu")
        scores = encoder.encode_text(table["caption"].to_pylist()) @ encoder.encode_images(paths).T
        ranks = (scores > np.diag(scores)[:, None] + 1e-7).sum(1)
        assert verdict[side] == pytest.approx(
            {"recall_at_1": (ranks < 1).mean(), "recall_at_10": (ranks < 10).mean()}, abs=0.0001
        )


def test_worse_index_is_not_published_unless_forced(
    tiny_gallery: Path, better_and_worse: tuple[Path, Path, Path], index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--gallery", tiny_gallery, "--checkpoint", better_and_worse[1], "--out", index, "--quiet"]

    def run(*more: str) -> tuple[int, dict, str]:
        code = main([*map(str, arguments), *more])
        stdout, stderr = capsys.readouterr()
        return code, json.loads(stdout), stderr

    code, summary, stderr = run()
    assert (code, current_version(index)) == (6, 1)
    assert (summary["published"], summary["version"], summary["gate"]["passed"]) == (False, 1, False)
    assert "not published, since the rebuilt index ranks worse than version 1: recall_at_1 0." in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in (index / "versions").iterdir()] == ["1"]
    code, summary, _ = run("--margin", "0.9")
    assert (code, summary["published"], summary["version"], summary["resumed"]) == (0, True, 2, 24)
    rebuild(tiny_gallery, better_and_worse[0], index, progress=False)
    code, summary, _ = run("--force")
    assert (code, summary["published"], summary["version"], summary["gate"]["passed"]) == (0, True, 4, False)


def test_grown_gallery_is_no_worse_model(
    tiny_gallery: Path, better_and_worse: tuple[Path, Path, Path], index: Path, tmp_path: Path
) -> None:
    """Forty near copies of one picture push it down, but they are not what is compared."""
    gallery = Path(shutil.copytree(tiny_gallery, tmp_path / "gallery"))
    for number in range(40):
        draw("red", "circle", 48 + number % 7).save(gallery / f"copy{number}.png")
    summary = rebuild(gallery, better_and_worse[0], index, progress=False, margin=0)
    assert summary.gate is not None
    assert summary.count == 64
    assert summary.gate["serving"] == summary.gate["rebuilt"]


def test_validation_pairs_are_found_in_the_gallery(
    tiny_data: Path, better_and_worse: tuple[Path, Path, Path], index: Path, tmp_path: Path
) -> None:
    pairs = gate.pairs_of(scan(tiny_data), tiny_data)
    assert pairs is not None
    table = {row["id"]: row["caption"] for row in scan(tiny_data).table.to_pylist()}
    assert [table[item_id] for item_id in pairs.ids] == pairs.texts
    summary = rebuild(tiny_data, better_and_worse[0], index, progress=False, kind="hnsw", validation=tiny_data)
    assert summary.gate is not None
    assert (summary.gate["source"], summary.gate["pairs"]) == ("validation", 6)
    elsewhere = Path(shutil.copytree(tiny_data, tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"none of the 6 validation pairs of .* has its picture in the gallery"):
        gate.pairs_of(scan(tiny_data), elsewhere)


def test_validation_pairs_give_the_cut_off(tiny_data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    index = tmp_path / "index"
    assert rebuild(data, tiny_checkpoint, index, progress=False).published
    assert open_current(index).manifest.cutoff == {}
    assert rebuild(data, tiny_checkpoint, index, progress=False, validation=data).published, "it was not calibrated"
    found = open_current(index).manifest.cutoff

    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    samples = load_split(data, "val")[0].samples
    texts = encoder.encode_text([sample.caption for sample in samples])
    pictures = encoder.encode_images([data / sample.image for sample in samples])
    scores = (texts * pictures).sum(1)
    assert found["min_score"] == pytest.approx(np.quantile(scores, 0.05), abs=1e-4)
    assert found["pairs"] == 6

    assert rebuild(data, tiny_checkpoint, index, progress=False, validation=data).reused
    assert rebuild(data, tiny_checkpoint, index, progress=False).reused, "nothing else is asked for"
    content = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps(dict(list(content.items())[:4])))
    again = rebuild(data, tiny_checkpoint, index, progress=False, validation=data)
    assert (again.published, again.encoded) == (True, 0)
    assert open_current(index).manifest.cutoff["pairs"] == 4


def test_validation_pairs_are_found_in_tars(tiny_data: Path, tmp_path: Path) -> None:
    """A member goes by its own name, or by its tar's and its own; the gallery is the folder, or the tar itself."""
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for picture in sorted(tiny_data.rglob("*.png")):
            tar.add(picture, picture.relative_to(tiny_data).as_posix())
    shutil.copy(tiny_data / "val.json", tmp_path)
    captions = set()
    for place in (tmp_path, tmp_path / "shard.tar"):
        gallery = scan(place)
        pairs = gate.pairs_of(gallery, tmp_path)
        assert pairs is not None
        names = dict(zip(gallery.table["id"].to_pylist(), gallery.table["name"].to_pylist(), strict=True))
        found = {names[item_id]: text for item_id, text in zip(pairs.ids, pairs.texts, strict=True)}
        assert len(found) == 6
        for name, text in found.items():
            shape, color = Path(name).parts[-2:]
            assert text == f"a {color.removesuffix('.png')} {shape}"
        captions |= set(pairs.texts)
    assert len(captions) == 6


def test_gallery_without_captions_is_published_uncompared(
    tiny_gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    gallery = tmp_path / "bare"
    shutil.copytree(tiny_gallery / "circle", gallery)
    rebuild(gallery, tiny_checkpoint, tmp_path / "index", progress=False)
    summary = rebuild(gallery, other_checkpoint, tmp_path / "index", progress=False)
    assert summary.gate is not None
    assert (summary.published, summary.gate["compared"]) == (True, False)
    assert "no captions and no validation pairs" in summary.gate["reason"]


def test_broken_serving_index_does_not_stop_its_replacement(
    tiny_gallery: Path, better_and_worse: tuple[Path, Path, Path], index: Path
) -> None:
    (open_current(index).path / "items.arrow").unlink()
    assert rebuild(tiny_gallery, better_and_worse[1], index, progress=False).published
    assert open_current(index).manifest.version == 2


def test_summary_says_who_was_told(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    targets = ["http://127.0.0.1:9", "redis://:secret@127.0.0.1:9/0"]
    summary = rebuild(tiny_gallery, tiny_checkpoint, tmp_path / "index", progress=False, notify=targets)
    assert summary.published
    assert summary.notified.keys() == {"http://127.0.0.1:9", "127.0.0.1:9/0"}
    assert all("not reached" in told for told in summary.notified.values())
    assert "secret" not in caplog.text
