"""Annotations that cannot be read, whose errors name the place and what to do."""

from pathlib import Path

import pytest

from dcar_core.data import load_split
from dcar_core.util.errors import DataError
from tests.support.files import write_json
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
        ("train.json", "{}", "has no train pairs; it needs pairs"),
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
        load_split(tmp_path, "train", image_policy="ignore")


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
    (sample,) = load_split(tmp_path, "train")[0].samples
    assert sample.caption == "a red car \ufffd"
    repr(sample).encode()


def test_directory_without_annotations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no val pairs; it needs pairs\.csv, .* `dcar data caption` writes captions"
    ):
        load_split(tmp_path, "val")
    with pytest.raises(DataError, match="does not exist"):
        load_split(tmp_path / "gone", "val")
    write_json(tmp_path / "train.json", {"a": {"file_name": "a.png", "positive": "a red car"}})
    for split in ("test", "val"):  # one pair, and it is needed for training
        with pytest.raises(DataError, match=f"has no {split} pairs; it has train"):
            load_split(tmp_path, split)
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"read from \.json, \.jsonl, \.csv, \.parquet, \.tar"):
        load_split(tmp_path / "a.xml", "val")
