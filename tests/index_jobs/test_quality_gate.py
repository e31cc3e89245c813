"""What a build measures with known texts: the gate between two indexes, the cut-off,
and the weight of the words.
"""

import json
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from dcar_core import Encoder
from dcar_core.data import Annotations
from dcar_core.model.tokenizer import common_words
from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.index.versions import current_version, open_current, version_numbers
from index_jobs.jobs import gate
from index_jobs.jobs.update import remove
from index_jobs.rebuild import main, rebuild
from tests.support.files import write_file, write_jsonl
from tests.support.images import draw, png
from tests.support.versions import Build, file_of


class Models(NamedTuple):
    """Two checkpoints, by their recall on the gallery's captions, and an index made
    with the better one.
    """

    better: Path
    worse: Path
    served: Path


@pytest.fixture(scope="module")
def models(
    tiny_gallery: Path,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Models:
    index = tmp_path_factory.mktemp("order") / "index"
    rebuild(tiny_gallery, tiny_checkpoint, index, progress=False)
    found = (
        rebuild(tiny_gallery, other_checkpoint, index, progress=False, margin=1).gate
        or {}
    )
    assert found["passed"] is True
    assert found["compared"] is True
    assert found["pairs"] == 24
    assert found["source"] == "captions"
    lost = [
        found["serving"][name] - found["rebuilt"][name]
        for name in ("recall_at_1", "recall_at_10")
    ]
    assert max(map(abs, lost)) > 0.02, "two random models that rank alike show nothing"
    if max(lost) > 0.02:
        order = (tiny_checkpoint, other_checkpoint)
    else:
        order = (other_checkpoint, tiny_checkpoint)
    served = tmp_path_factory.mktemp("served") / "index"
    rebuild(tiny_gallery, order[0], served, progress=False)
    return Models(*order, served)


@pytest.fixture
def index(models: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models.served, tmp_path / "index"))


def ranks_of(checkpoint: Path, texts: list[str], images: list[Path]) -> np.ndarray:
    encoder = Encoder.load(checkpoint, device="cpu")
    scores = encoder.encode_text(texts) @ encoder.encode_images(images).T
    return (scores > np.diag(scores)[:, None] + 1e-7).sum(1)


def test_a_worse_index_is_published_by_force_alone_and_recalls_are_of_the_two_models(
    build: Build,
    models: Models,
    index: Path,
    tiny_gallery: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = map(
        str,
        (
            "--gallery",
            tiny_gallery,
            "--checkpoint",
            models.worse,
            "--out",
            index,
            "--quiet",
        ),
    )
    assert main([*arguments]) == 6
    assert version_numbers(index) == [1]
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert (
        "not published: the rebuilt index ranks worse than version 1: recall_at_1 "
        in stderr
    )
    allowed = build(checkpoint=models.worse, margin=0.9)
    assert (allowed.version, allowed.resumed, allowed.encoded) == (
        2,
        24,
        0,
    ), "the vectors of the rejected one are kept"
    verdict = allowed.gate or {}
    table = scan(tiny_gallery).table
    images = [tiny_gallery / name for name in table["name"].to_pylist()]
    for checkpoint, side in zip(models, ("serving", "rebuilt"), strict=False):
        ranks = ranks_of(checkpoint, table["caption"].to_pylist(), images)
        recalls = {
            "recall_at_1": (ranks < 1).mean(),
            "recall_at_10": (ranks < 10).mean(),
        }
        wanted = recalls | {"ndcg_at_100": (1 / np.log2(2 + ranks)).mean()}
        assert verdict[side] == pytest.approx(wanted, abs=0.0001)
    build(checkpoint=models.better)
    forced = build(checkpoint=models.worse, force=True)
    assert forced.version == 4
    assert forced.gate is None


def test_larger_gallery_is_not_a_worse_model(
    build: Build,
    models: Models,
    index: Path,
    gallery: Path,
) -> None:
    """Forty near copies of one image lower its rank but are not compared."""
    for number in range(40):
        draw("red", "circle", 48 + number % 7).save(gallery / f"copy{number}.png")
    summary = build(gallery, checkpoint=models.better, margin=0)
    assert summary.gate is not None
    assert summary.count == 64
    assert summary.gate["serving"] == summary.gate["rebuilt"]


def test_removed_items_are_not_compared(index: Path, tiny_gallery: Path) -> None:
    whole = open_current(index)
    encoder = Encoder.load(whole.checkpoint, device="cpu")
    remove(index, [whole.item(3).id])
    pairs = gate.find_pairs(scan(tiny_gallery), None)
    encode = encoder.encode_text
    verdict = gate.compare(
        (whole, encode),
        (open_current(index), encode),
        pairs,
    )
    assert verdict.pool == 23
    assert verdict.pairs == 23
    assert verdict.serving == verdict.rebuilt
    gone = gate.QueryPairs(["a sold lamp"], ["sold"], [0], "captions")
    assert not gate.compare((whole, encode), (whole, encode), gone).compared


def test_missing_served_model_is_an_error_before_encoding(
    tiny_model: Path,
    tiny_checkpoint: Path,
    tiny_gallery: Path,
    other_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = tmp_path / "served"
    base = Path(shutil.copytree(tiny_model, tmp_path / "models" / tiny_model.name))
    checkpoint = shutil.copytree(
        tiny_checkpoint, tmp_path / "models" / tiny_checkpoint.name
    )
    rebuild(tiny_gallery, checkpoint, index, progress=False)
    base.rename(tmp_path / "gone")
    before = sorted((index / "work").iterdir())
    arguments = [
        *map(
            str,
            (
                "--gallery",
                tiny_gallery,
                "--checkpoint",
                other_checkpoint,
                "--out",
                index,
                "--quiet",
            ),
        )
    ]
    assert main(arguments) == 4
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "or publish by --force" in stderr
    assert stderr.startswith("error: the served version 1 cannot be compared")
    assert sorted((index / "work").iterdir()) == before, (
        "nothing was encoded, and nothing removed"
    )
    assert main([*arguments, "--force"]) == 0
    assert current_version(index) == 2


def test_what_cannot_be_compared_is_published(
    build: Build,
    models: Models,
    index: Path,
    tiny_gallery: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare = partial(
        build,
        shutil.copytree(tiny_gallery / "circle", tmp_path / "bare"),
        out=tmp_path / "other",
    )
    bare(models.better)
    verdict = bare(models.worse).gate or {}
    assert verdict["compared"] is False
    assert "no captions and no validation pairs" in verdict["reason"]
    file_of(index, "items.arrow").unlink()
    assert build(checkpoint=models.worse).version == 2
    (warning,) = (
        record
        for record in caplog.records
        if "nothing is compared with it" in record.message
    )
    assert warning.levelname == "WARNING"
    assert open_current(index).manifest.version == 2


def test_loss_of_exactly_the_margin_passes() -> None:
    for loss in range(1, 99):
        served = {"recall_at_1": (loss + 1) / 100}
        found = {"recall_at_1": (loss - 1) / 100}
        assert gate.losses(served, found, 0.02) == []
        assert gate.losses(served, found, 0.0199) == ["recall_at_1"]


class Ranked:
    """An index of 895 items in which the text "n" finds item n at a given rank."""

    live = np.ones(895, np.bool_)
    row_of = staticmethod(int)

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([[str(row) for row in range(895)]])

    def search(
        self,
        items: list[int],
        k: int,
        allowed: object,
    ) -> tuple[np.ndarray, np.ndarray]:
        others = [[row for row in range(895) if row != item] for item in items]
        rows = [
            [*rest[: self.ranks[item]], item, *rest[self.ranks[item] :]][:k]
            for item, rest in enumerate(others)
        ]
        return np.zeros((len(rows), k)), np.array(rows)


def compare(before: list[int], after: list[int]) -> gate.GateVerdict:
    names = [str(number) for number in range(len(before))]
    pairs = gate.QueryPairs(names, names, list(range(len(names))), "validation")
    served, rebuilt = (
        (cast(Any, Ranked(ranks)), lambda texts: [*map(int, texts)])
        for ranks in (before, after)
    )
    return gate.compare(
        cast(Any, served),
        cast(Any, rebuilt),
        pairs,
    )


def test_a_model_with_worse_ranks_fails_although_its_hits_are_nearly_as_many(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """4 against 3 hits of 80, where the images of all other texts are far down the
    list.
    """
    verdict = compare([0] * 4 + [12] * 76, [0] * 3 + [60] * 77)
    assert verdict.serving is not None
    assert verdict.rebuilt is not None
    assert verdict.serving["recall_at_1"] - verdict.rebuilt["recall_at_1"] < 0.02
    assert verdict.passed is False
    assert verdict.pool == 895
    assert verdict.difference is not None
    assert (
        verdict.difference["low"]
        < verdict.difference["value"]
        < verdict.difference["high"]
        < 0
    )
    assert "among 895 images over 80 pairs" in verdict.reason
    assert "points (95 % interval -" in verdict.reason
    assert compare([0] * 100, [0] * 100).passed
    assert compare([0] * 20, [0] * 20).visible == 0.05
    assert (
        "20 pairs tell differences of 5.0 points from chance, but the margin is 2;"
        in caplog.text
    )


ELSEWHERE = ("memory://pictures/a/", "memory://pictures/b/")  # needs no extra


def named(gallery: Gallery, data: Path) -> dict[str, str]:
    """Return the text of each matched pair by the name of its image in the gallery."""
    pairs = gate.find_pairs(gallery, data)
    assert pairs is not None
    names = dict(
        zip(
            gallery.table["id"].to_pylist(),
            gallery.table["name"].to_pylist(),
            strict=True,
        )
    )
    return {
        names[item_id]: text
        for item_id, text in zip(pairs.ids, pairs.texts, strict=True)
    }


def test_lost_validation_images_are_omitted(
    tiny_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / Annotations(data).load("val")[0].samples[0].image).unlink()
    found = gate.find_pairs(scan(data), data)
    assert found is not None
    assert len(found.texts) == 5
    assert "1 validation images of" in caplog.text
    with pytest.raises(
        DataError,
        match=r"none of the 5 validation pairs of .* has its image in the gallery",
    ):
        gate.find_pairs(scan(tiny_data), data)


def test_validation_pairs_are_found_behind_links_and_in_tars(
    store: Any,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    """A member goes by its own name, or by its tar's and its own."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
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
    (tars := tmp_path / "tars").mkdir()
    with tarfile.open(tars / "shard.tar", "w") as tar:
        for name in expected:
            tar.add(tiny_data / name, name)
    shutil.copy(tiny_data / "val.json", tars)
    store.pipe("/validation/shard.tar", (tars / "shard.tar").read_bytes())
    in_tar = {f"shard.tar/{name}": text for name, text in expected.items()}
    assert named(scan("memory://validation"), tars) == named(scan(tars), tars) == in_tar
    assert sorted(named(scan(tars / "shard.tar"), tars).values()) == sorted(
        expected.values()
    )


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True)


def test_validation_pairs_are_found_by_name_in_a_gallery_elsewhere(
    store: Any,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    expected = named(scan(tiny_data), tiny_data)
    pictures = {
        path.relative_to(tiny_data).as_posix(): path.read_bytes()
        for path in tiny_data.rglob("*.png")
    }
    store.pipe({f"/g/{name}": data for name, data in pictures.items()})
    store.pipe({f"/deeper/other/{name}": data for name, data in pictures.items()})
    gallery = scan("memory://g")
    assert named(gallery, tiny_data) == expected
    assert len(named(scan("memory://deeper"), tiny_data)) == 6
    lines = [
        {"file_name": f"{ELSEWHERE[0]}{name}?v=1"}
        for name in gallery.table["name"].to_pylist()
    ]
    by_url = named(scan(write_jsonl(tmp_path / "list.jsonl", *lines)), tiny_data)
    assert by_url == {
        f"{ELSEWHERE[0]}{name}?v=1": text for name, text in expected.items()
    }
    twice, *once = expected
    lines = [{"file_name": ELSEWHERE[0] + name} for name in expected] + [
        {"file_name": ELSEWHERE[1] + twice}
    ]
    by_url = named(scan(write_jsonl(tmp_path / "list.jsonl", *lines)), tiny_data)
    assert by_url == {ELSEWHERE[0] + name: expected[name] for name in once}, (
        "a name of several images tells none"
    )


def test_cutoff_is_calibrated_on_validation_pairs(
    build: Build,
    encoder: Encoder,
    tiny_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On those whose image can be read."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    index = tmp_path / "index"
    broken, *samples = Annotations(data).load("val")[0].samples
    (data / broken.image).write_bytes(b"no picture")
    build(data, max_failed=0.1)
    assert open_current(index).manifest.cutoff == {}
    done = build(data, max_failed=0.1, validation=data)
    assert not done.reused, "it was not calibrated"
    assert (done.gate or {})["source"] == "validation"
    assert (
        "the cut-off follows from 5 validation pairs only; give 100 or more"
        in caplog.text
    )
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
    assert again.reused is False
    assert again.resumed == 23
    assert open_current(index).manifest.cutoff["pairs"] == 3


def test_without_pairs_a_hundredth_of_the_scores_of_words_reaches_the_cutoff(
    build: Build, tmp_path: Path
) -> None:
    words = common_words(300)
    assert len(set(words)) == 300
    assert all(word.isalpha() and word.islower() for word in words)
    scores = np.random.default_rng(0).normal(0.2, 0.03, (300, 256)).astype(np.float32)
    found = gate.cutoff_of_words(scores, scores.max(1))
    assert (scores >= found["min_score"]).mean() == pytest.approx(0.01, abs=2e-4)
    assert (scores.max(1) >= found["strong_score"]).mean() == pytest.approx(
        0.5, abs=0.01
    )
    few = gate.cutoff_of_words(scores[:, :5], scores[:, :5].max(1))
    assert few["strong_score"] >= few["min_score"]
    for number in range(30):
        write_file(
            tmp_path / "many" / f"{number}.png",
            png(f"#{number:02x}{255 - number:02x}{2 * number:02x}", (8, 8)),
        )
    build(tmp_path / "many")
    manifest = open_current(tmp_path / "index").manifest
    assert manifest.cutoff["words"] == found["words"] == 300
    for cutoff in (manifest.cutoff, manifest.image_cutoff):
        assert -1 < cutoff["min_score"] <= cutoff["strong_score"] < 1


class Stored:
    """An index of these vectors."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.count = len(vectors)
        self.vectors = vectors.__getitem__


def test_two_in_a_thousand_pairs_are_strong_but_the_same_image_always_is() -> None:
    def found(vectors: np.ndarray) -> dict[str, Any]:
        return gate.cutoff_of_images(
            cast(Any, Stored(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))
        )

    vectors = np.random.default_rng(0).normal(size=(256, 16))
    cosines = np.corrcoef(vectors - vectors.mean(1, keepdims=True))[
        np.triu_indices(256, 1)
    ]
    cutoff = found(vectors - vectors.mean(1, keepdims=True))
    for name, share in (("min_score", 0.01), ("strong_score", 0.002)):
        assert (cosines >= cutoff[name]).mean() == pytest.approx(share, abs=1e-4)
    assert cutoff["pairs"] == len(cosines)
    assert found(np.tile(vectors[:2], (20, 1)))["strong_score"] < 0.96, (
        "half of the pairs are the same image"
    )
    assert found(vectors[:29]) == {}, "too few"
