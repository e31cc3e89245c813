"""Retraining on pairs: a better model is published with the same vectors and its own
export, any other refused.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.encoder import exports
from dcar_core.model.checkpoint import PORTABLE
from dcar_core.util.errors import DataError, GateError
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.index import versions
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.versions import (
    current_version,
    open_current,
    open_version,
    verify_index,
    version_numbers,
)
from index_jobs.jobs import retrain as module
from index_jobs.jobs.retrain import REPORT, ItemPairs, Retraining, read_pairs, retrain
from index_jobs.jobs.update import add, live_gallery, remove
from index_jobs.rebuild import rebuild
from tests.support.commands import dcar
from tests.support.files import write_jsonl
from tests.support.galleries import WORDS, write_images, write_pairs
from tests.support.images import draw
from tests.support.parts import needs
from tests.support.versions import Build, file_of


@pytest.fixture
def pairs(tiny_gallery: Path, tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", tiny_gallery)


def ranks_first(opened: IndexVersion, pairs: Path) -> float:
    """Return the share of texts whose image is the first result."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    vectors = Encoder.load(opened.checkpoint, device="cpu").encode_text(
        [row["caption"] for row in rows]
    )
    found = opened.search(vectors, 1)[1][:, 0].tolist()
    hits = [
        opened.image_location(hit)[0] == row["image"]
        for hit, row in zip(found, rows, strict=True)
    ]
    return sum(hits) / len(hits)


@pytest.mark.slow
def test_a_better_model_is_published_with_the_vectors_of_a_full_build(
    index: Path,
    pairs: Path,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    before = ranks_first(open_current(index), pairs)
    options = {"--index": index, "--pairs": pairs, "--margin": 1, "--device": "cpu"}
    done = dcar("retrain", *chain(*options.items()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"{index}: version 2 published: by held-out pairs, nDCG "
    )
    published = open_current(index)
    verify_index(index)
    report = json.loads((index / REPORT).read_text())
    assert (report["published"], report["version"], report["share"] > 0) == (
        True,
        2,
        True,
    )
    assert ranks_first(published, pairs) > before
    assert (
        Encoder.load(published.checkpoint, device="cpu").fingerprint
        == published.manifest.spec.fingerprint
    )
    rebuild(tiny_gallery, published.checkpoint, tmp_path / "slow", progress=False)
    slow = open_current(tmp_path / "slow")
    rows = np.arange(published.rows)
    assert slow.manifest.spec.fingerprint == published.manifest.spec.fingerprint
    np.testing.assert_array_equal(slow.vectors(rows), published.vectors(rows))
    again = retrain(index, [pairs], device="cpu")
    assert (again.published, again.version, current_version(index)) == (False, 2, 2)
    assert again.reason == "its model has learned from these pairs"
    assert json.loads((index / REPORT).read_text()) == report, "of the last comparison"
    assert re.fullmatch(
        r"model retrained on [\d,]+ pairs: nDCG of others \+[\d.]+ points",
        published.manifest.change,
    )


def test_clicks_are_held_out_alone_among_skipped_items_and_captions_only_teach(
    index: Path,
    pairs: Path,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    captions = write_pairs(tmp_path / "captions.jsonl", tiny_gallery, ["all about"])
    count = len(rows) // len(WORDS)
    last = rows[-len(WORDS) :]
    for row in rows:
        row["relevance"] = 0.5
    last[0]["negatives"] = [
        row["caption"] for row in rows if row["image"] != last[0]["image"]
    ]
    clicks = write_jsonl(tmp_path / "clicks.jsonl", *rows)
    served = open_current(index)
    found, taught, _ = read_pairs([clicks, captions], served, live_gallery(served))
    assert (len(found), len(taught)) == (len(rows), count)
    (learned, *held), (_, *captions_held) = found.divide(), taught.divide()
    compared = sum(len(each.comparable()) for each in held) + sum(
        map(len, captions_held)
    )
    assert len(found.comparable()) == len(rows) - len(WORDS), (
        "those of texts with a skipped item"
    )
    assert not {*learned.texts} & {text for each in held for text in each.texts}
    both = learned.with_captions(taught)
    assert both.weights[len(learned) :].sum() == pytest.approx(learned.weights.sum())
    with suppress(GateError):
        retrain(index, [clicks, captions], margin=1, device="cpu")
    report = json.loads((index / REPORT).read_text())
    assert report["gate"]["held-out pairs"]["pairs"] == compared
    assert report["captions"] == len(taught.divide()[0])
    assert "clicks alone" in report["gate"]["held-out pairs"]["reason"]


def test_better_captions_do_not_make_up_for_worse_clicks() -> None:
    pairs = ItemPairs(
        ["clicked", "caption"],
        np.array([0, 1]),
        np.ones(2, np.float32),
        {"clicked": {1}},
    )
    before = np.array([0.9, 0.5], np.float32)
    after = np.array([0.8, 0.9], np.float32)
    for margin, passed in ((0.05, False), (0.2, True)):
        verdict = Retraining.compare_held_out([pairs], before, after, margin)
        assert (verdict.passed, verdict.pairs) == (passed, 2)
        assert "+15.0 points" in verdict.reason
        assert verdict.reason.endswith("of the 1 clicks alone -10.0")


def test_model_that_learned_nothing_is_refused_with_a_report(
    index: Path,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    noise = write_pairs(tmp_path / "noise.jsonl", tiny_gallery)
    rows = [json.loads(line) for line in noise.read_text().splitlines()]
    places = np.arange(len(rows))
    ones = np.ones(len(rows), np.float32)
    # texts of any image
    learned = ItemPairs([row["caption"] for row in rows], places, ones).divide()[0].rows
    images = [
        rows[place]["image"] for place in np.random.default_rng(0).permutation(learned)
    ]
    for place, image in zip(learned.tolist(), images, strict=True):
        rows[place]["image"] = image
    write_jsonl(noise, *rows)
    with pytest.raises(
        GateError, match=r"not published: by .*retrain\.json has the figures"
    ):
        retrain(index, [noise], device="cpu")
    assert (current_version(index), version_numbers(index)) == (1, [1])
    report = json.loads((index / REPORT).read_text())
    assert (report["published"], report["gate"]["held-out pairs"]["compared"]) == (
        False,
        True,
    )


def test_a_killed_retraining_changes_nothing_and_is_repeated_alike(
    index: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = Path(shutil.copytree(index, tmp_path / "undisturbed"))

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(versions.NewVersion, "commit", kill)
        with pytest.raises(KeyboardInterrupt):
            retrain(index, [pairs], margin=1, device="cpu")
    assert (current_version(index), (index / REPORT).exists()) == (1, False)
    for each in (index, undisturbed):
        assert retrain(each, [pairs], margin=1, device="cpu").version == 2
    assert (
        open_current(index).manifest.spec.fingerprint
        == open_current(undisturbed).manifest.spec.fingerprint
    )


def test_additions_and_removals_stay(index: Path, pairs: Path, tmp_path: Path) -> None:
    add(
        index,
        write_images(tmp_path / "more", "pink", "brown"),
        workers=0,
        progress=False,
        device="cpu",
    )
    gone = open_current(index).item(3).id
    remove(index, [gone])
    before = open_current(index)
    summary = retrain(index, [pairs], margin=1, device="cpu")
    after = open_current(index)
    assert summary.unknown == len(WORDS)
    assert after.manifest.additions == before.manifest.additions
    assert (after.manifest.removed, after.row_of(gone)) == (1, None)
    assert after.row_of("pink") == before.row_of("pink")
    rows = np.flatnonzero(after.live)
    np.testing.assert_array_equal(before.vectors(rows), after.vectors(rows))


def test_a_build_with_the_former_checkpoint_keeps_what_was_learned(
    build: Build,
    index: Path,
    tiny_gallery: Path,
    gallery: Path,
    pairs: Path,
    tiny_checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fewer = write_pairs(pairs.with_name("fewer.jsonl"), tiny_gallery, words=WORDS[1:])
    assert [
        retrain(index, [each], margin=1, device="cpu").version
        for each in (fewer, pairs)
    ] == [2, 3]
    learned = open_current(index).manifest.spec.fingerprint
    earlier = open_version(index, 2)
    assert build().reused, "a scheduled build without changes"
    draw("pink", "square").save(gallery / "pink.png")
    for checkpoint in (
        tiny_checkpoint,
        shutil.copytree(earlier.checkpoint, gallery.with_name("earlier")),
    ):
        caplog.clear()
        summary = build(gallery, checkpoint=checkpoint)
        assert (summary.fingerprint, summary.count) == (learned, 25)
        assert "is kept; --force goes back" in caplog.text
    forced = build(gallery, force=True)
    assert (
        forced.fingerprint
        == Encoder.load(tiny_checkpoint, device="cpu").fingerprint
        != learned
    )
    assert "is lost, by --force" in caplog.text
    caplog.clear()
    assert build(gallery).reused
    assert "learned" not in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ('{"caption": 3, "id": "a"}', r"line 2: field 'caption' must be text, not 3"),
        ('{"id": "a"}', r"line 2: field 'caption' is missing"),
        ('{"caption": "red"}', r"line 2: field 'image' is missing"),
        ('{"caption": "red", "id": ["a"]}', r"line 2: field 'id' must be one text"),
        (
            '{"caption": "red", "id": "a", "relevance": 0}',
            r"line 2: field 'relevance' must be a number above 0",
        ),
        (
            '{"caption": "red", "id": "a", "relevance": [1]}',
            r"line 2: field 'relevance' must be a number above 0",
        ),
        (
            '{"caption": "red", "id": "a"}',
            r"pairs\.jsonl: 1 texts .* are too few; collect about 200 more",
        ),
        ("none.jsonl", r"none\.jsonl is not a table"),
        ("pairs.txt", r"pairs\.txt is not a table"),
    ],
)
def test_bad_pairs_are_named_by_file_line_and_field(
    line: str,
    message: str,
    loaded: Callable[[list[Path]], object],
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / (line if "{" not in line else "pairs.jsonl")
    first = {
        "caption": "a red square",
        "image": str(tiny_gallery / "square/red.png"),
        "relevance": 0.5,
    }
    if path.name != "none.jsonl":
        path.write_text(f"{json.dumps(first)}\n{line}\n")
    with pytest.raises(DataError, match=message):
        loaded([path])


@pytest.fixture(scope="module")
def loaded(published: Path) -> Callable[[list[Path]], object]:
    """A function that reads pairs for an index, and refuses them as `retrain` does."""
    run = module.Retraining(published, open_current(published), "cpu")
    return lambda files: run.compare(files, None, 0.0)


RETRAIN_WITHOUT_OPEN_CLIP = """
import sys
from pathlib import Path
from index_jobs.jobs.retrain import retrain

assert retrain(Path(sys.argv[1]), [Path(sys.argv[2])], device="cpu", margin=1).published
assert "open_clip" not in sys.modules, "it takes seconds to import"
"""


def weights(exported: Path, version: int) -> Path:
    files = open_version(exported, version).manifest.files
    (name,) = (
        name
        for name in files
        if name.endswith(("image.bin", f"{PORTABLE}/{WEIGHTS_FILE}"))
    )
    return file_of(exported, name, version)


@pytest.fixture
def exported(
    request: pytest.FixtureRequest,
    build: Build,
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An index whose model brings an export along; `tiny_checkpoint` brings its
    files.
    """
    monkeypatch.setenv("DCAR_RUNTIME_CACHE", str(exports.parent))
    name = getattr(request, "param", "exported_checkpoint")
    build(checkpoint=request.getfixturevalue(name), runtime="openvino")
    return tmp_path / "index"


@needs("openvino")
@pytest.mark.parametrize(
    "exported",
    ["exported_checkpoint", "tiny_checkpoint"],
    indirect=True,
)
def test_versions_of_a_model_share_one_export(exported: Path, build: Build) -> None:
    first = open_version(exported, 1)
    build(checkpoint=first.checkpoint, runtime="openvino", force=True)
    remove(exported, [open_current(exported).item(0).id])
    assert all(
        weights(exported, number).samefile(weights(exported, 1)) for number in (2, 3)
    )
    third = open_version(exported, 3)
    build(checkpoint=third.checkpoint, runtime="openvino", force=True)
    assert weights(exported, 4).samefile(weights(exported, 3)), (
        "a checkpoint brings its own"
    )


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()  # it has other names
    file.write_bytes(bytes(100) + content[100:])


def require_own_export(exported: Path, cache: Path) -> None:
    published = open_current(exported)
    quick = Encoder.load(
        published.checkpoint,
        device="cpu",
        runtime="openvino",
        cache=cache,
    )
    assert quick.backbone is None
    texts = ["photo of a red square", "a tile"]
    whole = Encoder.load(published.checkpoint, device="cpu")
    np.testing.assert_allclose(
        quick.encode_text(texts),
        whole.encode_text(texts),
        atol=1e-5,
    )


@needs("openvino")
@pytest.mark.parametrize(
    ("exported", "is_damaged"),
    [
        pytest.param("exported_checkpoint", False, marks=needs("time")),
        ("exported_checkpoint", True),
        pytest.param("tiny_checkpoint", False, marks=needs("time")),
    ],
    indirect=["exported"],
)
def test_retrained_version_has_its_own_export(
    is_damaged: bool,
    exported: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    """Of the same image tower, whose graph is made anew if it is damaged."""
    if is_damaged:
        damage(weights(exported, 1))
        assert retrain(exported, [pairs], device="cpu", margin=1).published
    else:
        subprocess.run(
            [sys.executable, "-c", RETRAIN_WITHOUT_OPEN_CLIP, exported, pairs],
            check=True,
        )
        assert weights(exported, 2).samefile(weights(exported, 1))
    require_own_export(exported, tmp_path / "cache")


@needs("openvino")
def test_an_export_that_cannot_be_used_is_passed_over_with_a_reason(
    exported: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start() -> Encoder:
        published = open_current(exported)
        return Encoder.load(
            published.checkpoint,
            device="cpu",
            runtime="auto",
            cache=tmp_path / "cache",
        )

    assert start().backbone is None
    monkeypatch.setattr(exports, "FORMAT", -1)
    assert start().backbone is not None
    assert (
        "cannot be used: another release made it; build the index again" in caplog.text
    )
    monkeypatch.undo()
    damage(weights(exported, 1))
    assert start().backbone is not None
    assert "is corrupted: image.bin changed" in caplog.text
