"""Annotations that cannot be read, whose errors name the place and what to do."""

import json
from pathlib import Path

import pytest

from dcar_core.data import load_split
from dcar_core.util.errors import DataError
from tests.support.files import write_json
from tests.support.images import write_image


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold an object"),
        ("{", "is not JSON"),
        ('{"k": 3}', "entry 'k': must be an object"),
        ('{"k": {"file_name": "a.png"}}', "entry 'k': field 'positive' is missing"),
        ('{"k": {"positive": "a"}}', "entry 'k': field 'file_path' is missing"),
        ('{"k": {"file_name": "a.png", "positive": {"a": 1}}}', "field 'positive' must be text or a list of texts"),
        ("{}", "has no train pairs; it needs pairs"),
        ('{"k": {"file_name": "a.png", "positive": " "}}', "no train pairs that can be used"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_bad_annotations_are_named_with_their_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        load_split(tmp_path, "train", image_policy="ignore")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", '{"image": "a.png", "caption": "a"}\n{', r"line 2: not JSON"),
        ("pairs.jsonl", "[1]", r"line 1: must be an object"),
        ("pairs.jsonl", '{"caption": "a"}', r"line 1: field 'image' is missing"),
        ("pairs.jsonl", '{"image": "a.png"}', r"line 1: field 'caption' is missing"),
        (
            "pairs.jsonl",
            '{"image": "a.png", "caption": "a", "split": "train"}\n{"image": "b.png", "caption": "b"}',
            r"1 rows have no split, such as 'b\.png'",
        ),
        ("pairs.csv", "image,caption,split\na.png,one, two,train\n", r"line 2: more cells than the header"),
        ("notes.txt", "a", r"needs pairs\.csv"),
    ],
)
def test_bad_tables_are_named_with_their_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_split(tmp_path, "train", image_policy="ignore")


HALF = r'"a red car \ud83d"'  # of an emoji, as a caption that was cut off ends


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", f'{{"a": {{"file_name": "a.png", "file_path": "", "positive": {HALF}, "class_name": {HALF}}}}}'),
        (
            "train.json",
            f'{{"a": {{"file_name": "a.png", "file_path": "", "positive": [{HALF}], "negative": [{HALF}]}}}}',
        ),
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


@pytest.mark.parametrize("content", [{"images": [{"filename": "1.jpg"}]}, {"annotations": [], "images": []}])
def test_files_of_other_data_sets_are_named(content: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"the form of COCO or of Karpathy's splits, which is not read"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_deep_nesting_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DataError, match=r"train\.json.*nested too deeply"):
        load_split(tmp_path, "train")


def test_directory_without_annotations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no val pairs; it needs pairs\.csv, .* `dcar data caption` writes captions"
    ):
        load_split(tmp_path, "val")
    with pytest.raises(DataError, match="does not exist"):
        load_split(tmp_path / "gone", "val")
    write_json(tmp_path / "train.json", {"a": {"file_name": "a.png", "positive": "a red car"}})
    with pytest.raises(DataError, match="has no test pairs; it has train"):
        load_split(tmp_path, "test")
    with pytest.raises(DataError, match="has no val pairs; it has train"):  # one pair, and it is needed for training
        load_split(tmp_path, "val")
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"read from \.json, \.jsonl, \.csv, \.parquet, \.tar"):
        load_split(tmp_path / "a.xml", "val")
