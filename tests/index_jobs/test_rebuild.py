"""The rebuild job as a function: results, reuse and repeated work."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.util.errors import DataError, DcarError
from index_jobs.gallery.scan import scan
from index_jobs.index.versions import open_current, version_numbers
from tests.support.files import write_file
from tests.support.parts import needs
from tests.support.versions import Build, file_of


def test_the_summary_and_the_manifest_tell_what_was_published(
    build: Build, tiny_gallery: Path, encoder: Encoder, tmp_path: Path
) -> None:
    summary = build()
    manifest = open_current(tmp_path / "index").manifest
    assert (summary.version, summary.count, summary.failed, summary.reused) == (1, 24, 0, False)
    assert (summary.fingerprint, summary.kind, summary.dim) == (encoder.fingerprint, "Flat", 32)
    assert summary.images_per_second > 0
    assert (manifest.metric, manifest.spec.gallery, manifest.measured["query_source"]) == (
        "inner_product", str(tiny_gallery), "captions",
    )  # fmt: skip
    assert (summary.published, summary.gate) == (True, None)  # there was nothing to compare with


def test_another_kind_or_other_captions_need_no_encoding(build: Build, gallery: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"

    def run(**options: object) -> tuple[int, int]:
        summary = build(gallery, **options)
        assert summary.published
        return summary.encoded, summary.resumed

    assert run() == (24, 0)
    assert run(kind="hnsw") == (0, 24)
    captions = (gallery / "metadata.jsonl").read_text()
    (gallery / "metadata.jsonl").write_text(captions.replace("a red circle", "a crimson circle"))
    assert run(kind="hnsw") == (0, 24)
    assert open_current(index).item(5).caption == "a crimson circle"
    assert run(kind="ivf", keep_shards=False) == (0, 24)
    assert not (index / "work").exists()
    assert run(kind="flat") == (24, 0)


@pytest.mark.slow
def test_unchanged_job_is_reused(build: Build, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path) -> None:
    assert not build().reused
    again = build()
    assert (again.reused, again.version, again.encoded) == (True, 1, 0)
    touched = Path(shutil.copytree(tiny_checkpoint, tiny_checkpoint.parent / f"touched-{tmp_path.name}"))
    config = json.loads((touched / "config.json").read_text())
    (touched / "config.json").write_text(json.dumps(config))  # other bytes, the same model
    assert build(checkpoint=touched).reused
    asked: dict[str, Any] = {}
    for more in ({"force": True}, {"checkpoint": other_checkpoint, "force": False, "margin": 1}, {"kind": "hnsw"},
                 {"memory": 2**30}, {"target_recall": 0.9}):  # fmt: skip
        asked |= more
        assert not build(**asked).reused
    assert build(**asked).reused
    assert version_numbers(tmp_path / "index") == [4, 5, 6]
    assert len(list((tmp_path / "index" / "work").iterdir())) == 1, "the newest vectors only"


def test_fields_that_no_item_has_are_refused_before_a_model_is_loaded(
    build: Build, gallery: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One text field beside others may be missing: items that are added later may have it."""
    rows = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text().splitlines()]
    (gallery / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"tags": ["a", "b"]}) for row in rows))
    build(gallery, keep_shards=False, group_field="color", text_fields=["brand", "color"])
    assert "--text-fields: no item has the field 'brand'" in caplog.text
    served = open_current(tmp_path / "index").manifest
    lost = shutil.copytree(tiny_checkpoint, tmp_path / "lost" / "checkpoint")  # without its model
    assert served.spec.text_fields == ("brand", "color")
    for option, says in (
        ({"group_field": "colour"}, "--group-field: no item has the field 'colour'; there are: .*color"),
        ({"group_field": "tags"}, "--group-field: 'tags' has several values per item"),
        ({"text_fields": ["colour", "form"]}, "--text-fields: no item has the field 'colour' or 'form'; there are: .*"),
    ):
        with pytest.raises(DataError, match=says):
            build(gallery, checkpoint=lost, **option)
    assert open_current(tmp_path / "index").manifest == served


def test_failed_images_are_published_with_the_version(build: Build, gallery: Path, tmp_path: Path) -> None:
    (gallery / "circle" / "blue.png").write_bytes(b"")
    summary = build(gallery)
    assert (summary.count, summary.failed) == (23, 1)
    artifact = open_current(tmp_path / "index")
    (line,) = file_of(tmp_path / "index", "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "circle/blue.png"
    assert json.loads(line)["reason"] == "the file is empty"
    assert [artifact.item(row).metadata["file_name"] for row in (0, 1, 2)] == [
        "circle/black.png", "circle/green.png", "circle/orange.png",
    ]  # fmt: skip
    assert build(gallery).reused
    with pytest.raises(DcarError, match="too few images"):  # more than are accepted now
        build(gallery, max_failed=0)


@pytest.fixture
def listed(gallery: Path, tmp_path: Path) -> Path:
    """List the gallery as URLs without metadata."""
    rows = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"file_name": f"file://{gallery}/{row['file_name']}"}) for row in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return tmp_path / "list.jsonl"


def test_unread_images_are_tried_again(build: Build, gallery: Path, listed: Path, tmp_path: Path) -> None:
    """Rows 3 and 20 are missing at first, row 10 is not an image. Only the first two of three shards are affected."""
    names = [json.loads(line)["file_name"].partition(f"{gallery}/")[2] for line in listed.read_text().splitlines()]

    run = partial(build, listed, batch_size=4, shard_rows=8, max_failed=0.2)
    (gallery / names[10]).write_bytes(b"no picture")
    undisturbed = run(out=tmp_path / "other")
    assert (undisturbed.failed, undisturbed.unread, undisturbed.hint) == (1, 0, "")
    away = {row: (gallery / names[row]).rename(tmp_path / f"{row}.png") for row in (3, 20)}
    first = run()
    assert (first.count, first.failed, first.unread) == (21, 3, 2)
    lines = file_of(tmp_path / "index", "failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["fault"] for line in lines] == ["missing", "not_an_image", "missing"]
    assert run(kind="hnsw").unread == 2
    again = run(kind="hnsw")
    assert (again.reused, again.unread) == (True, 2)
    assert again.hint.startswith("images that could not be read: 2")
    assert again.hint.endswith("give --force")
    away[3].rename(gallery / names[3])
    assert run(kind="hnsw").reused, "nobody looks into a gallery for a job that has nothing to do"
    second = run(kind="hnsw", force=True)
    assert (second.count, second.unread, second.encoded, second.resumed) == (22, 1, 3, 21), "all three are tried again"
    away[20].rename(gallery / names[20])
    third = run(kind="flat")
    assert (third.count, third.failed, third.unread, third.hint) == (23, 1, 0, "")
    assert (third.encoded, third.resumed) == (1, 23), "a file that is no image is tried again by force alone"
    ours, theirs = open_current(tmp_path / "index"), open_current(tmp_path / "other")
    np.testing.assert_allclose(ours.vectors(np.arange(23)), theirs.vectors(np.arange(23)), atol=1e-6)
    assert [ours.item(row) for row in range(23)] == [theirs.item(row) for row in range(23)]


def test_failed_images_are_tried_again_by_force(build: Build, gallery: Path, tmp_path: Path) -> None:
    """A server sent an error page with status 200. A row of a list does not tell that this has changed."""
    memory = fsspec.filesystem("memory")
    run = partial(build, tmp_path / "list.csv", batch_size=2, shard_rows=2, max_failed=0.2)
    names = [path.name for path in sorted((gallery / "circle").iterdir())]
    memory.pipe({f"/forced/{name}": (gallery / "circle" / name).read_bytes() for name in names})
    memory.pipe(f"/forced/{names[0]}", b"<html>back in 5 minutes</html>")
    (tmp_path / "list.csv").write_text("\n".join(["url", *(f"memory://forced/{name}" for name in names)]))
    try:
        assert (run().failed, run(force=True).failed) == (1, 1)
        memory.pipe(f"/forced/{names[0]}", (gallery / "circle" / names[0]).read_bytes())
        repaired = run(force=True)
    finally:
        memory.rm("/forced", recursive=True)
    assert (repaired.count, repaired.failed, repaired.encoded) == (len(names), 0, 1)


@needs("heic")
def test_images_are_tried_again_once_their_decoder_is_installed(
    build: Build, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phones and converters name HEIC files .jpg."""
    import pillow_heif

    pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(gallery / "phone.heic")
    (gallery / "phone.heic").rename(gallery / "phone.jpg")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        write_file(tmp_path / "missing" / "pillow_heif.py", b"raise ImportError")
        patch.syspath_prepend(str(tmp_path / "missing"))  # decoding processes search the same path
        first = build(gallery)
        assert (first.failed, first.unread) == (1, 1)
        assert first.hint.endswith("give --force")
        assert build(gallery, kind="hnsw").failed == 1
    installed = build(gallery, kind="flat")
    assert (installed.count, installed.failed, installed.hint) == (25, 0, "")


def test_job_resumes_after_its_gallery_was_unavailable(
    build: Build, gallery: Path, listed: Path, tmp_path: Path
) -> None:
    """Some of it encoded, then too much of it away: once it is back, the same command goes on."""
    run = partial(build, listed, batch_size=2, shard_rows=2, max_failed=0.3)
    shutil.move(gallery / "triangle", tmp_path / "triangle")
    shutil.move(gallery / "cross", tmp_path / "cross")
    with pytest.raises(DcarError, match="too few images"):
        run()
    for name in ("triangle", "cross"):
        shutil.move(tmp_path / name, gallery / name)
    summary = run()
    assert (summary.count, summary.failed) == (24, 0)


def test_exact_pixels_make_a_new_version(build: Build, tmp_path: Path) -> None:
    def run(exact: bool) -> tuple[int, bool, int]:
        summary = build(exact=exact)
        return summary.version, open_current(tmp_path / "index").manifest.spec.exact, summary.encoded

    assert [run(False), run(True), run(True)] == [(1, False, 24), (2, True, 24), (2, True, 0)]
    assert run(False) == (3, False, 24), "vectors of exact pixels are not those of others"


def test_equal_images_are_listed(build: Build, gallery: Path, tmp_path: Path) -> None:
    shutil.copy(gallery / "circle" / "red.png", gallery / "circle" / "zz again.png")
    assert build(gallery).duplicates == 1
    artifact = open_current(tmp_path / "index")
    (line,) = file_of(tmp_path / "index", "duplicates.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["name"], found["same_as"]["name"]) == ("circle/zz again.png", "circle/red.png")
    assert artifact.row_of(found["same_as"]["id"]) == 5


@pytest.mark.slow
def test_training_behind_the_image_tower_needs_no_encoding(
    build: Build, gallery: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The features of the frozen tower stay, and an adapter is applied to them."""
    backbone = load_backbone(BackboneSource(str(tiny_model)))

    def trained(name: str) -> Path:
        model = seeded_model(backbone, method(name), 0)
        with torch.no_grad():
            for _, parameter in model.trainables():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_checkpoint(model, tmp_path / name)
        return tmp_path / name

    index, encoded = tmp_path / "index", list[int]()
    for name in ("clip", "clip-adapter", "coop", "dual"):
        checkpoint = trained(name)
        encoded.append(build(gallery, checkpoint, margin=1).encoded)
        artifact, encoder = open_current(index), Encoder.load(checkpoint, device="cpu")
        artifact.require(encoder.fingerprint)
        images = [gallery / place for place in scan(gallery).table["name"].to_pylist()[:3]]
        found = artifact.vectors(np.arange(3))
        np.testing.assert_allclose(found, encoder.encode_images(images), atol=1e-5)
    assert encoded == [24, 0, 0, 24]  # image prompts are part of the tower
