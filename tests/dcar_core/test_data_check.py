"""The check of a data set before training: faults, captions beyond the context, and broken images."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dcar_core.data import UNUSABLE, check_dataset
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.text.tokenizer import count_clip_tokens
from tests.support.commands import dcar
from tests.support.files import write_jsonl


def test_sound_data_set_has_no_faults(tiny_data: Path) -> None:
    splits, reports = check_dataset(tiny_data)
    assert {name: len(data) for name, data in splits.items()} == {"train": 12, "val": 6, "test": 6}
    assert not any(report.counts[phrase] for report in reports.values() for phrase in UNUSABLE)


def test_command_names_every_fault(tiny_data: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "red.png", "caption": "a red square", "split": "train", "category": "square"},
        {"image": "cut.png", "caption": "a square that goes " + "on and " * 80 + "on", "split": "train"},
        {"image": "gone.png", "caption": "a square nobody has", "split": "train", "category": "square"},
    ]
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    photo = (tiny_data / "square" / "red.png").read_bytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "red.png").write_bytes(photo)
    (tmp_path / "photos" / "cut.png").write_bytes(photo[: len(photo) // 2])
    done = dcar("data", "check", tmp_path, "--images", tmp_path / "photos")
    assert done.returncode == 1
    for line in (
        r"train: 3 pairs, 3 images, 1 category",
        r" 1 pairs without a category",
        r" 1 splits with one category only",
        r" 1 captions longer than the context's 77 tokens, cut",
        r" 1 images missing: gone\.png",
        r" 1 images broken: cut\.png \(",
    ):
        assert re.search(line, done.stdout), line
    assert "2 images cannot be used: set --images" in done.stderr
    done = dcar("data", "check", tmp_path, "--annotations-only", "--context", "0")
    assert done.returncode == 0
    assert "missing" not in done.stdout


def test_caption_of_exactly_the_context_is_not_cut(tmp_path: Path) -> None:
    rows = [{"image": f"{words}.jpg", "caption": "a " * words, "split": "train"} for words in (5, 6)]
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    for report in check_dataset(tmp_path, decode_images=False, context=7)[1].values():
        assert report.counts["captions longer than the context's 7 tokens, cut"] == 1


def test_captions_beyond_the_context_are_found(tiny_model: Path) -> None:
    backbone = load_backbone(BackboneSource(str(tiny_model)))  # a context of 32
    texts = ["a " * n for n in (26, 27, 30, 31)]
    assert count_clip_tokens(texts) == [28, 29, 32, 33]
    assert list(map(backbone.text_tokenizer(0).exceeds_limit, texts)) == [False, False, False, True]
    assert list(map(backbone.text_tokenizer(4).exceeds_limit, texts)) == [False, True, True, True]


@pytest.mark.slow
def test_training_names_unusable_images_and_skips_them_on_request(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(tiny_data, tmp_path / "photos")
    entries = {split: json.loads((photos / f"{split}.json").read_text()) for split in ("train", "val")}
    name = next(iter(entries["train"].values()))["file_name"]
    (photos / name).write_bytes((photos / name).read_bytes()[:60])
    given = ("--data", photos, "--model", tiny_model, "--epochs", "1", "--out", tmp_path / "c")
    done = dcar("train", *given)
    assert done.returncode == 3
    assert re.search(rf"^error: train: {re.escape(name)}: broken or truncated", done.stderr, re.M)
    for split, content in entries.items():
        content["lost_1"] = {"file_name": "lost.png", "positive": "a lost one", "negative": [], "class_name": "square"}
        (photos / f"{split}.json").write_text(json.dumps(content))
    done = dcar("train", *given)
    assert done.returncode == 3
    assert re.search(r"^error: train: 1 of 13 images are not in .*: lost\.png\. Point --images", done.stderr, re.M)
    done = dcar("train", *given, "--skip-broken")
    assert "adapted" in done.stdout, done.stderr
    assert "1 images missing, left out: lost.png" in done.stderr
    assert f"1 images broken, left out: {name} (" in done.stderr
    saved = json.loads((tmp_path / "c" / "cleaning.json").read_text())
    assert saved["train"]["names"]["images missing, left out"] == ["lost.png"]
    assert saved["val"]["counts"]["images missing, left out"] == 1
