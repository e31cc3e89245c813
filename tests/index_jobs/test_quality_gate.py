"""The quality gate between a rebuilt and a served index, and notifications of the service."""

import json
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from dcar_core import Encoder
from dcar_core.data import load_split
from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.jobs import quality_gate
from index_jobs.jobs.cutoff_calibration import pairs_signature
from index_jobs.jobs.notify import notify
from index_jobs.jobs.summary import RejectedError
from index_jobs.jobs.updates import remove
from index_jobs.rebuild import main, rebuild
from index_jobs.store.versions import current_version, open_current
from tests.support.files import write_jsonl
from tests.support.images import draw

ELSEWHERE = ("memory://pictures/a/", "memory://pictures/b/")  # needs no extra


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

    def run(*more: str) -> tuple[int, dict[str, Any], str]:
        code = main([*map(str, arguments), *more])
        stdout, stderr = capsys.readouterr()
        return code, json.loads(stdout), stderr

    code, summary, stderr = run()
    assert (code, current_version(index)) == (6, 1)
    assert (summary["published"], summary["version"], summary["gate"]["passed"]) == (False, 1, False)
    assert "not published: the rebuilt index ranks worse than version 1: recall_at_1 0." in stderr
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
    """Forty near copies of one image lower its rank but are not compared."""
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
    pairs = quality_gate.find_pairs(scan(tiny_data), tiny_data)
    assert pairs is not None
    table = {row["id"]: row["caption"] for row in scan(tiny_data).table.to_pylist()}
    assert [table[item_id] for item_id in pairs.ids] == pairs.texts
    summary = rebuild(tiny_data, better_and_worse[0], index, progress=False, kind="hnsw", validation=tiny_data)
    assert summary.gate is not None
    assert (summary.gate["source"], summary.gate["pairs"]) == ("validation", 6)
    elsewhere = Path(shutil.copytree(tiny_data, tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"none of the 6 validation pairs of .* has its image in the gallery"):
        quality_gate.find_pairs(scan(tiny_data), elsewhere)


def named(gallery: Gallery, data: Path) -> dict[str, str]:
    """Return the text of each matched pair by the name of its image in the gallery."""
    pairs = quality_gate.find_pairs(gallery, data)
    assert pairs is not None
    names = dict(zip(gallery.table["id"].to_pylist(), gallery.table["name"].to_pylist(), strict=True))
    return {names[item_id]: text for item_id, text in zip(pairs.ids, pairs.texts, strict=True)}


def test_validation_pictures_that_are_gone_are_left_out(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / load_split(data, "val")[0].samples[0].image).unlink()
    found = quality_gate.find_pairs(scan(data), data)
    assert found is not None
    assert len(found.texts) == 5
    assert "1 validation images of" in caplog.text


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


def zipped(folder: Path, path: Path, below: str = "") -> str:
    with zipfile.ZipFile(path, "w") as file:
        for picture in sorted(folder.rglob("*.png")):
            file.write(picture, below + picture.relative_to(folder).as_posix())
    return f"zip://::{path}"


def test_validation_pairs_are_found_by_name_in_a_gallery_elsewhere(tiny_data: Path, tmp_path: Path) -> None:
    expected = named(scan(tiny_data), tiny_data)
    gallery = scan(zipped(tiny_data, tmp_path / "g.zip"))
    assert named(gallery, tiny_data) == expected
    with pytest.raises(DataError, match="an image there is recognised by its name below the gallery"):
        quality_gate.find_pairs(scan(zipped(tiny_data, tmp_path / "deeper.zip", "other/")), tiny_data)
    lines = [{"file_name": f"{ELSEWHERE[0]}{name}?v=1"} for name in gallery.table["name"].to_pylist()]
    by_url = named(scan(write_jsonl(tmp_path / "list.jsonl", *lines)), tiny_data)
    assert by_url == {f"{ELSEWHERE[0]}{name}?v=1": text for name, text in expected.items()}
    here = [{"file_name": f"file://{tiny_data}/{name}"} for name in gallery.table["name"].to_pylist()]
    assert len(named(scan(write_jsonl(tmp_path / "here.jsonl", *here)), tiny_data)) == 6


def test_validation_pairs_are_found_by_name_in_tars_elsewhere(tiny_data: Path, tmp_path: Path) -> None:
    expected = named(scan(tiny_data), tiny_data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in expected:
            tar.add(tiny_data / name, name)
    shutil.copy(tiny_data / "val.json", tmp_path)
    store = fsspec.filesystem("memory")
    store.pipe("/validation/shard.tar", (tmp_path / "shard.tar").read_bytes())
    try:
        found = named(scan("memory://validation"), tmp_path)
    finally:
        store.rm("/validation", recursive=True)
    assert found == {f"shard.tar/{name}": text for name, text in expected.items()}


def test_a_name_that_several_pictures_have_is_nobodys(tiny_data: Path, tmp_path: Path) -> None:
    expected = named(scan(tiny_data), tiny_data)
    twice, *once = expected
    lines = [{"file_name": ELSEWHERE[0] + name} for name in expected] + [{"file_name": ELSEWHERE[1] + twice}]
    found = named(scan(write_jsonl(tmp_path / "list.jsonl", *lines)), tiny_data)
    assert found == {ELSEWHERE[0] + name: expected[name] for name in once}


def test_what_was_removed_is_not_in_the_way_of_the_other_index(index: Path) -> None:
    whole = open_current(index)
    remove(index, [whole.item(3).id])
    shared = quality_gate._shared_rows(whole, open_current(index))
    assert shared is not None
    assert np.flatnonzero(~shared).tolist() == [3]


def test_no_caption_is_none_that_only_one_picture_has(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a cat", "", "a dog", "a dog"], "id": ["0", "1", "2", "3"]})
    assert quality_gate.find_pairs(Gallery("", str(tmp_path), table, "", ""), None) == quality_gate.QueryPairs(
        ["a cat"], ["0"], "captions"
    )


def test_few_captions_are_taken_out_of_very_many(tmp_path: Path) -> None:
    """More text than one array of Arrow's holds: 2.6 GB, of which every chunk but the last is the same memory."""
    chunk = pa.array([f"{number:02}" + "x" * 1_000_000 for number in range(64)])
    last = pa.array([f"picture {number}" for number in range(10)])
    captions = pa.chunked_array([chunk] * 40 + [last])
    ids = pa.array([str(row) for row in range(len(captions))])
    gallery = Gallery("", str(tmp_path), pa.table({"caption": captions, "id": ids}), "", "")
    assert quality_gate.find_pairs(gallery, None) == quality_gate.QueryPairs(
        last.to_pylist(), ids[-10:].to_pylist(), "captions"
    )


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


def test_other_texts_of_the_same_pictures_are_another_calibration() -> None:
    one, other = (pairs_signature(quality_gate.QueryPairs([text], ["1"], "validation")) for text in ("a cat", "a dog"))
    assert one != other


def test_validation_pairs_are_found_in_tars(tiny_data: Path, tmp_path: Path) -> None:
    """A member goes by its own name, or by its tar's and its own; the gallery is the folder, or the tar itself."""
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for picture in sorted(tiny_data.rglob("*.png")):
            tar.add(picture, picture.relative_to(tiny_data).as_posix())
    shutil.copy(tiny_data / "val.json", tmp_path)
    captions = set()
    for place in (tmp_path, tmp_path / "shard.tar"):
        gallery = scan(place)
        pairs = quality_gate.find_pairs(gallery, tmp_path)
        assert pairs is not None
        names = dict(zip(gallery.table["id"].to_pylist(), gallery.table["name"].to_pylist(), strict=True))
        found = {names[item_id]: text for item_id, text in zip(pairs.ids, pairs.texts, strict=True)}
        assert len(found) == 6
        for name, text in found.items():
            shape, color = Path(name).parts[-2:]
            assert text == f"a {color.removesuffix('.png')} {shape}"
        captions |= set(pairs.texts)
    assert len(captions) == 6


@pytest.fixture
def moved(tiny_model: Path, tiny_checkpoint: Path, tiny_gallery: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An index whose model was made on a backbone that is gone by now, and where that was."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "models" / tiny_model.name))
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "models" / tiny_checkpoint.name)
    rebuild(tiny_gallery, checkpoint, tmp_path / "index", progress=False)
    base.rename(tmp_path / "gone")
    return tmp_path / "index", base


def test_served_model_that_is_gone_is_known_before_encoding(
    tiny_gallery: Path, other_checkpoint: Path, moved: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    index, base = moved
    before = sorted((index / "work").iterdir())
    arguments = ["--gallery", tiny_gallery, "--checkpoint", other_checkpoint, "--out", index, "--quiet"]
    assert main([str(argument) for argument in arguments]) == 4
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("error: the served version 1 cannot be compared")
    assert "publish without a comparison by --force" in stderr
    assert sorted((index / "work").iterdir()) == before, "nothing was encoded, and nothing removed"
    assert main([*map(str, arguments), "--force"]) == 0
    verdict = json.loads(capsys.readouterr().out)["gate"]
    assert (verdict["passed"], verdict["compared"], current_version(index)) == (True, False, 2)
    assert verdict["reason"].startswith("the served version 1 cannot be compared")
    (tmp_path / "gone").rename(base)
    assert rebuild(tiny_gallery, base.parent / "checkpoint", index, progress=False, margin=1).published


def test_served_model_that_nobody_asks_may_be_gone(
    tiny_gallery: Path, other_checkpoint: Path, moved: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_gallery / "circle", tmp_path / "bare")
    summary = rebuild(tmp_path / "bare", other_checkpoint, moved[0], progress=False)
    assert summary.gate is not None
    assert (summary.published, summary.gate["compared"]) == (True, False)


def test_rejected_rebuilds_leave_one_set_of_vectors(
    tiny_gallery: Path, better_and_worse: tuple[Path, Path, Path], index: Path, tmp_path: Path
) -> None:
    """Rejected rebuilds keep one set of vectors besides the served one, so retraining does not fill the disk."""
    gallery = Path(shutil.copytree(tiny_gallery, tmp_path / "gallery", copy_function=shutil.copy2))
    captions = (gallery / "metadata.jsonl").read_text()
    assert rebuild(gallery, better_and_worse[0], index, progress=False).published
    (served,) = (index / "work").iterdir()
    kept = set[Path]()
    for size in (64, 5, 7):
        with pytest.raises(RejectedError, match="its vectors are kept"):
            rebuild(gallery, better_and_worse[1], index, progress=False, margin=0, batch_size=size)
        (rejected,) = set((index / "work").iterdir()) - {served}
        kept.add(rejected)
    assert len(kept) == 3, "or the test shows nothing"
    (gallery / "metadata.jsonl").write_text(captions.replace("a red circle", "a crimson circle"))
    assert rebuild(gallery, better_and_worse[0], index, progress=False, kind="hnsw", margin=1).encoded == 0
    assert list((index / "work").iterdir()) == [served]


def test_rejected_vectors_that_are_not_to_be_kept_are_not(
    tiny_gallery: Path, better_and_worse: tuple[Path, Path, Path], index: Path
) -> None:
    with pytest.raises(RejectedError, match="its vectors are not kept"):
        rebuild(tiny_gallery, better_and_worse[1], index, progress=False, margin=0, keep_shards=False)
    assert not (index / "work").exists()
    assert current_version(index) == 1


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
    assert summary.notified.keys() == {"http://127.0.0.1:9", "redis://127.0.0.1:9/0"}
    assert all("not reached" in told for told in summary.notified.values())
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("http://user:s3cret@127.0.0.1:9", "http://127.0.0.1:9"),
        ("redis://:pa/s3cret@127.0.0.1:9", "redis://127.0.0.1:9"),
        ("redis://:s3cret/pa@127.0.0.1:9", "redis://127.0.0.1:9"),  # Python's error quotes it as a port
        ("redis://:pa?s3cret@127.0.0.1:9", "redis://"),
        ("redis://127.0.0.1:9/0?password=s3cret", "redis://127.0.0.1:9/0"),
        ("redis://127.0.0.1:9/0?password=s3@cret", "redis://"),
    ],
)
def test_nobody_is_told_a_password(target: str, shown: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = notify([target], tmp_path, 1)
    assert told.keys() == {shown}
    assert "not reached" in told[shown]
    for part in ("s3", "cret", "pa/", "pa?"):
        assert part not in f"{told} {caplog.text}"


def test_redirect_does_not_get_the_admin_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.connection.getsockname()[1]}/elsewhere")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    asked: list[str] = []
    monkeypatch.setenv("DCAR_ADMIN_KEY", "long enough")
    with ThreadingHTTPServer(("127.0.0.1", 0), Away) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        told = notify([url], tmp_path, 1)[url]
        server.shutdown()
    assert told.startswith("not reached: 302")
    assert asked == ["/admin/reload"]


def test_a_loss_of_just_the_margin_passes() -> None:
    for loss in range(1, 99):
        served, found = {"recall_at_1": (loss + 1) / 100}, {"recall_at_1": (loss - 1) / 100}
        assert quality_gate.losses(served, found, 0.02) == []
        assert quality_gate.losses(served, found, 0.0199) == ["recall_at_1"]
