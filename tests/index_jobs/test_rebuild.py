"""The rebuild job: what it encodes and reuses, its output and exit codes, and what is
left of one that was killed.
"""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from app.cli import main as dcar
from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import find_method
from dcar_core.model.tokenizer import common_words
from dcar_core.util.errors import DataError, DcarError
from index_jobs.encoding.shards import ShardStore
from index_jobs.gallery.scan import scan
from index_jobs.index.versions import (
    current_version,
    open_current,
    verify_index,
    version_numbers,
)
from index_jobs.rebuild import main
from tests.support.commands import Command
from tests.support.files import write_file, write_jsonl
from tests.support.images import draw
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import children_of, is_alive
from tests.support.vectors import recall
from tests.support.versions import Build, file_of


@pytest.fixture
def small(build: Build) -> Build:
    """Build with small shards: some are known whole, some in part."""
    return partial(
        build,
        batch_size=2,
        shard_rows=4,
        margin=1,
        max_failed=0.2,
        max_vanished=1,
    )


def lines_of(index: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file_of(index, name).read_text().splitlines()]


def rename_captions(gallery: Path, old: str, new: str) -> None:
    path = gallery / "metadata.jsonl"
    path.write_text(path.read_text().replace(old, new))


def same_as_anew(build: Build, gallery: Path, index: Path, **options: Any) -> None:
    """Require the items and vectors of a build from nothing."""
    anew = index.with_name(
        f"{index.name} of {open_current(index).manifest.version} anew"
    )
    build(gallery, out=anew, **options)
    here = open_current(index)
    there = open_current(anew)
    rows = np.arange(there.manifest.count)
    assert [here.item(row) for row in rows.tolist()] == [
        there.item(row) for row in rows.tolist()
    ]
    np.testing.assert_allclose(
        here.vectors(rows),
        there.vectors(rows),
        atol=1e-6,
    )
    assert here.manifest.files["failed.jsonl"] == there.manifest.files["failed.jsonl"]


def test_other_kind_or_captions_need_no_encoding(
    build: Build,
    gallery: Path,
    encoder: Encoder,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    first = build(gallery)
    assert first.version == 1
    assert first.count == 24
    assert first.failed == 0
    assert first.reused is False
    assert first.encoded == 24
    assert first.fingerprint == encoder.fingerprint
    assert first.kind == "Flat"
    assert first.dim == 32
    assert first.gate is None
    manifest = open_current(index).manifest
    assert manifest.spec.gallery == str(gallery)
    assert manifest.measured["query_source"] == "captions and words"
    rename_captions(gallery, "a red circle", "a crimson circle")
    for options, encoded in (
        ({"kind": "hnsw"}, 0),
        ({"exact": True}, 24),  # vectors of exact pixels are not those of others
        ({"exact": True}, 0),
        ({}, 24),
        ({"kind": "ivf"}, 0),
    ):
        assert build(gallery, **options).encoded == encoded, options
        assert open_current(index).manifest.spec.exact == bool(options.get("exact"))
    assert open_current(index).item(5).caption == "a crimson circle"


@pytest.mark.slow
def test_a_gallery_without_captions_is_tuned_by_words_for_texts(
    build: Build,
    encoder: Encoder,
    tmp_path: Path,
) -> None:
    (images := tmp_path / "images").mkdir()
    for number, pixels in enumerate(
        np.random.default_rng(0).integers(256, size=(1500, 4, 4, 3), dtype=np.uint8)
    ):
        Image.fromarray(pixels).save(images / f"{number}.png")
    done = build(images, kind="HNSW8,Flat")
    assert "\nsearches are tuned by words, and return 9" in done.to_text()
    index = open_current(tmp_path / "index")
    assert index.manifest.measured["query_source"] == "words"
    texts = encoder.encode_text(
        [
            f"a {colour} {thing}"
            for colour, thing in product(("red", "tall", "old"), common_words(99))
        ]
    )
    assert (
        recall(index.search(texts, 10)[1], texts, index.vectors(np.arange(1500)))
        >= index.manifest.spec.target_recall
    )


@pytest.mark.slow
def test_unchanged_job_is_reused(
    build: Build,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
    tmp_path: Path,
) -> None:
    assert not build().reused
    again = build()
    assert again.reused is True
    assert again.version == 1
    assert again.encoded == 0
    touched = Path(
        shutil.copytree(
            tiny_checkpoint, tiny_checkpoint.parent / f"touched-{tmp_path.name}"
        )
    )
    config = json.loads((touched / "config.json").read_text())
    # other bytes, the same model
    (touched / "config.json").write_text(json.dumps(config))
    assert build(checkpoint=touched).reused
    asked: dict[str, Any] = {}
    for more in (
        {"force": True},
        {"checkpoint": other_checkpoint, "force": False, "margin": 1},
        {"kind": "hnsw"},
        {"memory": 2**30},
        {"target_recall": 0.9},
    ):
        asked |= more
        assert not build(**asked).reused
    assert build(**asked).reused
    assert version_numbers(tmp_path / "index") == [4, 5, 6]
    assert len(list((tmp_path / "index" / "work").iterdir())) == 1, (
        "the newest vectors only"
    )


def test_fields_that_no_item_has_are_refused_before_a_model_is_loaded(
    build: Build,
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    rename_captions(gallery, '"color"', '"tags": ["a", "b"], "color"')
    build(gallery, group_field="color", text_fields=["brand", "color"])
    served = open_current(tmp_path / "index").manifest
    assert served.spec.text_fields == (
        "brand",
        "color",
    ), "items that are added later may have a brand"
    # without its model
    lost = shutil.copytree(tiny_checkpoint, tmp_path / "lost" / "checkpoint")
    for option, says in (
        (
            {"group_field": "colour"},
            "--group-field: no item has the field 'colour'; there are: .*color",
        ),
        ({"group_field": "tags"}, "--group-field: 'tags' has several values per item"),
        (
            {"text_fields": ["colour", "form"]},
            "--text-fields: no item has the field 'colour' or 'form'; there are: .*",
        ),
    ):
        with pytest.raises(DataError, match=says):
            build(gallery, checkpoint=lost, **option)
    assert open_current(tmp_path / "index").manifest == served


def test_failed_images_are_tried_again_by_every_build(
    build: Build,
    gallery: Path,
    tmp_path: Path,
) -> None:
    """One is missing at first, and a server sends an error page for another: rows of a
    list tell of no change.
    """
    memory = fsspec.filesystem("memory")
    images = {
        path.name: path.read_bytes() for path in sorted((gallery / "circle").iterdir())
    }
    memory.pipe(
        {f"/again/{name}": data for name, data in images.items()}
        | {"/again/red.png": b"<html>back in"}
    )
    memory.rm("/again/blue.png")
    (tmp_path / "list.csv").write_text(
        "\n".join(["url", *(f"memory://again/{name}" for name in images)])
    )
    run = partial(
        build,
        tmp_path / "list.csv",
        batch_size=2,
        shard_rows=2,
        max_failed=0.4,
    )
    try:
        first = run()
        assert first.count == 4
        assert first.failed == 2
        assert {
            line["fault"] for line in lines_of(tmp_path / "index", "failed.jsonl")
        } == {"missing", "not_an_image"}
        # more than are accepted now
        with pytest.raises(DcarError, match="too few images"):
            run(max_failed=0.05)
        memory.pipe("/again/blue.png", images["blue.png"])
        assert run().reused, (
            "nobody looks into a gallery for a job that has nothing to do"
        )
        second = run(kind="hnsw")
        assert second.failed == 1
        assert second.encoded == 2
        assert second.resumed == 4
        memory.pipe("/again/red.png", images["red.png"])
        third = run(kind="hnsw", force=True)
    finally:
        memory.rm("/again", recursive=True)
    assert third.count == 6
    assert third.failed == 0
    assert third.encoded == 1


def test_only_new_and_changed_images_are_encoded(
    small: Build,
    gallery: Path,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    assert small(gallery).encoded == 24
    draw("pink", "circle").resize((60, 40)).save(gallery / "a first one.png")
    shutil.copy(gallery / "circle/red.png", gallery / "circle/twin.png")
    (gallery / "broken.png").write_bytes(b"no picture")
    (gallery / "square/red.png").unlink()
    draw("lime", "square").save(gallery / "square/blue.png")
    found = small(gallery)
    assert found.encoded == 4
    assert found.resumed == 22
    assert found.count == 25
    assert found.failed == 1
    (failed,) = lines_of(index, "failed.jsonl")
    assert failed["name"] == "broken.png"
    assert failed["fault"] == "not_an_image"
    same_as_anew(small, gallery, index)
    (gallery / "broken.png").unlink()
    listed = gallery / "list.jsonl"
    names = sorted(
        (str(path.relative_to(gallery)) for path in gallery.rglob("*.png")),
        reverse=True,
    )
    write_jsonl(
        listed, *({"file_name": name, "id": f"b{n}"} for n, name in enumerate(names))
    )
    assert small(listed).encoded == 0, "in another order, with other ids"
    same_as_anew(small, listed, index)
    first = open_current(index).item(names.index("a first one.png"))
    assert first.width == 60
    assert first.height == 40


def test_another_model_and_damaged_shards_are_encoded_anew(
    small: Build,
    gallery: Path,
    other_checkpoint: Path,
    tmp_path: Path,
) -> None:
    index = tmp_path / "index"
    small(gallery)
    (gallery / "square/red.png").unlink()
    assert small(gallery, other_checkpoint).encoded == 23
    (gallery / "square/blue.png").unlink()
    (damaged,) = (index / "work").glob("*/000000.npz")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert small(gallery, other_checkpoint).encoded == 4
    same_as_anew(small, gallery, index, checkpoint=other_checkpoint)


def interrupt(build: Build, gallery: Path, shards: int) -> None:
    """Run a job that ends before it saves another shard than so many."""
    saved = 0
    extend = ShardStore.extend

    def dies(self: ShardStore, *given: Any) -> object:
        nonlocal saved
        saved += 1
        if saved > shards:
            raise KeyboardInterrupt
        return extend(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardStore, "extend", dies)
        with pytest.raises(KeyboardInterrupt):
            build(gallery)


def test_vectors_of_interrupted_jobs_are_reused_and_go_once_a_version_is_published(
    small: Build,
    gallery: Path,
    other_checkpoint: Path,
    tmp_path: Path,
) -> None:
    """The served version is of another model, so its vectors are of no use, but they
    stay.
    """
    index = tmp_path / "index"
    small(gallery, other_checkpoint)
    (served,) = (index / "work").iterdir()
    # the later ones end before they have copied anything
    for number, shards in enumerate((5, 0, 0)):
        interrupt(small, gallery, shards)
        assert len(list((index / "work").iterdir())) == 2
        draw("pink", "circle").resize((32 + number, 32)).save(gallery / f"{number}.png")
    found = small(gallery)
    assert found.encoded == 7
    assert found.resumed == 20
    assert len(list((index / "work").iterdir())) == 1
    assert not served.exists()
    same_as_anew(small, gallery, index)


def contents(index: Path) -> list[str]:
    return sorted(
        path.name
        for folder in ("blobs", "versions")
        for path in (index / folder).glob("*")
    )


def test_missing_disk_space_is_an_error_before_encoding(
    build: Build,
    small: Build,
    gallery: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 vectors of 32 take 3,072 bytes as shards, and as many again in the index."""
    index = tmp_path / "index"
    usage = shutil.disk_usage(tmp_path)
    table = scan(gallery).table.nbytes

    def left(free: int) -> None:
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: usage._replace(free=free)
        )

    left(table + 2 * 3072 - 1)
    with pytest.raises(
        DcarError,
        match=(
            r"takes at least 0\.0 GB more, 0\.0 of them for vectors.* GB left; make"
            r" room"
        ),
    ):
        build(gallery)
    assert list(index.glob("work*")) == []
    assert contents(index) == []
    left(table + 2 * 3072)
    assert build(gallery).encoded == 24
    monkeypatch.undo()
    interrupt(partial(small, out=tmp_path / "other"), gallery, shards=5)
    (rest,) = (tmp_path / "other" / "work").iterdir()
    draw("pink", "circle").save(gallery / "new.png")
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: usage._replace(free=0 if rest.exists() else usage.free),
    )
    assert small(gallery, out=tmp_path / "other").encoded == 25, (
        "vectors of an interrupted job give way"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds child processes in /proc"
)
def test_killed_command_ends_its_workers_and_resumes(
    build: Build,
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    for copy in range(8):
        shutil.copytree(gallery / "circle", gallery / f"copy{copy}")
    index = tmp_path / "index"
    arguments = [
        "--gallery",
        gallery,
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        index,
        "--quiet",
    ]
    small = ["--workers", 2, "--batch-size", 1, "--shard-rows", 1]
    process = Command(
        "index_jobs.rebuild",
        *arguments,
        *small,
        stdout=os.devnull,
        stderr=os.devnull,
    )
    limit = time.monotonic() + 200
    while len(shards := list(index.glob("work/*/*.npz"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    limit = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < limit, "a worker outlived its job"
        time.sleep(0.05)
    assert current_version(index) is None
    leftover = shards[0].with_name(f".{shards[0].name}.{'0' * 32}.tmp")
    leftover.touch()
    summary = build(gallery, workers=0, batch_size=1, shard_rows=1)
    assert summary.count == 72
    assert summary.resumed + summary.encoded == 72
    assert summary.resumed >= 5
    assert not leftover.exists()
    verify_index(index)


@pytest.mark.slow
def test_training_behind_the_image_tower_needs_no_encoding(
    build: Build,
    gallery: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """The features of the frozen tower stay, and an adapter is applied to them."""
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    encoded = list[int]()
    images = [gallery / place for place in scan(gallery).table["name"].to_pylist()[:3]]
    for name in ("clip", "clip-adapter", "coop", "maple"):
        model = seeded_model(backbone, find_method(name).config, 0)
        with torch.no_grad():
            for _, parameter in model.trainables():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_checkpoint(model, checkpoint := tmp_path / name)
        encoded.append(build(gallery, checkpoint, margin=1).encoded)
        opened = open_current(tmp_path / "index")
        encoder = Encoder.load(checkpoint, device="cpu")
        opened.require(encoder.fingerprint)
        np.testing.assert_allclose(
            opened.vectors(np.arange(3)),
            encoder.encode_images(images),
            atol=1e-5,
        )
    assert encoded == [24, 0, 0, 24]  # image prompts are part of the tower


@pytest.fixture
def required(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    places = {
        "--gallery": tiny_gallery,
        "--checkpoint": tiny_checkpoint,
        "--out": tmp_path / "index",
    }
    return [str(part) for part in chain.from_iterable(places.items())]


def test_the_first_process_of_a_container_is_interrupted_by_sigterm(
    required: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # as the kernel does for this process
    own = os.getpid()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(
        "index_jobs.jobs.build.rebuild", lambda *_, **__: os.kill(own, signal.SIGTERM)
    )
    try:
        assert main(required) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--max-failed", "2"], "--max-failed"),
        (
            ["--memory", "lots"],
            (
                "'lots' is not a size of a megabyte or more; give one such as 800MiB or"
                " 4GiB"
            ),
        ),
        (["--unknown"], "--unknown"),
        ([], "--gallery"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    wrong: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--gallery", "g", "--checkpoint", "c", "--out", "o"] if wrong else []
    assert main([*places, *wrong]) == 2
    assert message in capsys.readouterr().err


def test_both_forms_have_the_same_help_and_output(
    required: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [*required, "--kind", "ivf", "--text-fields", "color, color,"]
    assert main(given) == 0
    assert open_current(tmp_path / "index").manifest.spec.text_fields == ("color",)
    out, err = capfd.readouterr()
    summary = json.loads(out)
    assert summary["version"] == 1
    assert summary["count"] == 24
    assert summary["reused"] is False
    assert summary["kind"] == "IVF1,Flat"
    assert "24/24" in err
    shown = list[tuple[str, str, Any]]()
    for form in ("module", "dcar"):
        outputs = []
        for options in (
            ["--help"],
            [*given, "--text"],
            [*given, "--json", "--quiet"],
        ):
            monkeypatch.setattr(sys, "argv", ["dcar", "index", "build", *options])
            with pytest.raises(SystemExit, match="0"):
                sys.exit(main(options)) if form == "module" else dcar()
            outputs.append(capfd.readouterr().out)
        usage, _, text = outputs[0].partition("\n")
        assert usage.endswith("[OPTIONS]")
        shown.append((text, outputs[1], json.loads(outputs[2]) | {"seconds": 0}))
    assert shown[0] == shown[1]
    for part in (
        "--gallery",
        "--checkpoint",
        "--out",
        "exit-codes.md",
        "metadata.jsonl",
        "Example:",
    ):
        assert part in shown[0][0]
    lines = shown[0][1].splitlines()
    assert (
        lines[0]
        == f"{tmp_path / 'index'}: version 1 is up to date with 24 images, IVF1,Flat, 0"
        " broken"
    )
    assert lines[1].startswith(
        "searches are tuned by captions and words, and return 100.0 %"
    )


def test_every_failure_has_its_exit_code_and_one_line(
    required: list[str],
    gallery: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "index"
    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "trainables.safetensors").write_bytes(b"no tensors")
    (tmp_path / "file").write_text("")

    def fails(code: int, *more: object) -> str:
        assert main([*required, "--quiet", *map(str, more)]) == code
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        return stderr

    for code, *more in (
        (3, "--gallery", tmp_path / "nowhere"),
        (3, "--kind", "nonsense"),
        (4, "--checkpoint", tmp_path / "nowhere"),
        (4, "--checkpoint", gallery),
        (4, "--checkpoint", broken),
        (4, "--device", "cuda:99"),
        (1, "--out", tmp_path / "file"),
    ):
        fails(code, *more)
    out.mkdir(exist_ok=True)
    with FileLock(out / ".lock"):
        fails(5)
    assert current_version(out) is None
    assert not (out / "versions").exists()


IMAGES = 40  # beside a broken one


def encoders_of(pid: int) -> list[int]:
    """Ray's processes that encode, by the title that Ray gives them."""
    titles = dict.fromkeys(children_of(pid), b"")
    for child in titles:
        with suppress(OSError):
            titles[child] = Path(f"/proc/{child}/cmdline").read_bytes()
    return [
        child
        for child, title in titles.items()
        if title.startswith(b"ray::") and b"ShardWorker" in title
    ]


@needs("ray")
@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds Ray's workers in /proc"
)
def test_killed_ray_worker_changes_no_vector(
    build: Build,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    """Of images that are slow to decode, one of them broken."""
    index = tmp_path / "index"
    gallery = tmp_path / "gallery"
    cells = np.random.default_rng(0).integers(
        0,
        256,
        (8, 30, 40, 3),
        dtype=np.uint8,
    )
    write_file(gallery / "broken.png", b"no picture")
    for number in range(IMAGES):
        Image.fromarray(cells[number % 8]).resize((1200, 900)).save(
            gallery / f"{number:03}.png", compress_level=1
        )
    small = ("--batch-size", 2, "--shard-rows", 2, "--workers", 2, "--device", "cpu")
    # beside other tests, nice workers starve
    environment = {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    process = Command(
        "index_jobs.rebuild",
        "--ray",
        "local",
        "--gallery",
        gallery,
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        index,
        *small,
        environment=environment,
    )
    limit = time.monotonic() + 200
    while len(list(index.glob("work/*/*.npz"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.02)
    victim = encoders_of(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    done = len(list(index.glob("work/*/*.npz")))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert done < IMAGES / 2 - 5, "the job was over before a worker could be killed"
    assert not is_alive(victim)
    summary = json.loads(out)
    assert summary["count"] == IMAGES
    assert summary["failed"] == 1
    assert summary["encoded"] == IMAGES + 1
    assert f"{IMAGES + 1}/{IMAGES + 1}" in err
    verify_index(index)
    same_as_anew(build, gallery, index, batch_size=2, shard_rows=2)
