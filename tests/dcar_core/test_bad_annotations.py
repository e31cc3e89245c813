"""Annotations that cannot be read, and the check of a data set before training."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dcar_core.data import Annotations, check_dataset
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.text.tokenizer import count_clip_tokens
from dcar_core.util.errors import DataError
from tests.support.commands import dcar
from tests.support.files import write_json, write_jsonl
from tests.support.images import write_image

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
COCO = "the form of COCO or of Karpathy's splits, which is not read"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "[]", "must hold an object"),
        ("train.json", "{", "is not JSON"),
        ("train.json", '{"k": 3}', "entry 'k': must be an object"),
        ("train.json", '{"k": {"file_name": "a.png"}}', "entry 'k': field 'positive' is missing"),
        ("train.json", '{"k": {"positive": "a"}}', "entry 'k': field 'file_path' is missing"),
        ("train.json", '{"k": {"file_name": "a.png", "positive": {"a": 1}}}', "'positive' must be text or a list of"),
        ("train.json", "{}", "has no train pairs in train.json; it needs pairs"),
        ("train.json", '{"k": {"file_name": "a.png", "positive": " "}}', "no train pairs that can be used"),
        ("train.json", "\udcff", "is not UTF-8"),
        ("train.json", '{"images": [{"filename": "1.jpg"}]}', COCO),
        ("train.json", '{"annotations": [], "images": []}', COCO),
        ("train.json", DEEP, r"train\.json.*nested too deeply"),
        ("train.jsonl", DEEP, r"train\.jsonl.*nested too deeply"),
        ("pairs.jsonl", '{"image": "a.png", "caption": "a"}\n{', r"line 2: not JSON"),
        ("pairs.jsonl", "[1]", r"line 1: must be an object"),
        ("pairs.jsonl", '{"caption": "a"}', r"line 1: field 'image' is missing"),
        ("pairs.jsonl", '{"image": 12, "caption": "a"}', "field 'image' must be text, not 12"),
        ("pairs.jsonl", '{"image": "a.png"}', r"line 1: field 'caption' is missing"),
        (
            "pairs.jsonl",
            '{"image": "a.png", "caption": "a", "category": ["a"]}',
            r"'category' must be one text, not \[",
        ),
        ("pairs.csv", "image,caption,split\na.png,a,train\nb.png,b,\n", r"1 rows have no split, such as 'b\.png'"),
        ("pairs.csv", "image,caption,split\na.png,one, two,train\n", r"line 2: more cells than the header"),
        ("notes.txt", "a", r"needs pairs\.csv"),
    ],
)
def test_bad_annotations_are_named_with_their_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        Annotations(tmp_path).load("train", "ignore")


HALF = r'"a red car \ud83d"'  # of an emoji, as a caption that was cut off ends
FDRD = '{"a": {"file_name": "a.png", "file_path": "", %s}}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", FDRD % f'"positive": {HALF}, "class_name": {HALF}'),
        ("train.json", FDRD % f'"positive": [{HALF}], "negative": [{HALF}]'),
        ("train.jsonl", f'{{"image": "a.png", "captions": [{HALF}], "negatives": {HALF}, {HALF}: [{{"a": {HALF}}}]}}'),
        ("train.csv", f'image,captions\na.png,"[{HALF.replace(chr(34), chr(34) * 2)}]"\n'),
    ],
)
def test_half_of_a_surrogate_pair_can_be_written_again(tmp_path: Path, name: str, content: str) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    (sample,) = Annotations(tmp_path).load("train")[0].samples
    assert sample.caption == "a red car \ufffd"
    repr(sample).encode()


def test_directory_without_annotations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no val pairs; it needs pairs\.csv, "):
        Annotations(tmp_path).load("val")
    with pytest.raises(DataError, match="does not exist"):
        Annotations(tmp_path / "gone").load("val")
    write_json(tmp_path / "train.json", {"a": {"file_name": "a.png", "positive": "a red car"}})
    for split in ("test", "val"):  # one pair, and it is needed for training
        with pytest.raises(DataError, match=f"has no {split} pairs; it has train"):
            Annotations(tmp_path).load(split)
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"read from \.json, \.jsonl, \.csv, \.parquet, \.tar"):
        Annotations(tmp_path / "a.xml").load("val")


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
def test_training_skips_unusable_images_on_request(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(tiny_data, tmp_path / "photos")
    entries = {split: json.loads((photos / f"{split}.json").read_text()) for split in ("train", "val")}
    name = next(iter(entries["train"].values()))["file_name"]
    (photos / name).write_bytes((photos / name).read_bytes()[:60])
    for split, content in entries.items():
        content["lost_1"] = {"file_name": "lost.png", "positive": "a lost one", "negative": [], "class_name": "square"}
        (photos / f"{split}.json").write_text(json.dumps(content))
    given = ("--data", photos, "--model", tiny_model, "--epochs", "1", "--out", tmp_path / "c")
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
