"""Matching annotations to images and splits, without guesses and without leaks between splits."""

import json
from pathlib import Path

import pytest

from dcar_core.data import Annotations, check_dataset
from dcar_core.util.errors import DataError
from tests.support.files import write_jsonl
from tests.support.images import write_image

Row = dict[str, object]


def pictures(root: Path, *names: str) -> None:
    for name in names:
        write_image(root / name)


def row(image: str, **more: object) -> Row:
    return {"image": image, "caption": f"a picture, {image}", **more}


def test_missing_image_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "cats/2.png", "dogs/1.png")
    write_jsonl(tmp_path / "train.jsonl", row("cats/1.png"), row("cats/2.png"))
    write_jsonl(tmp_path / "test.jsonl", row("dogs/1.png"))
    for splits in (("train",), ("train", "test")):
        with pytest.raises(DataError, match=r"train: 1 of 2 images are not in .*: cats/1\.png"):
            Annotations(tmp_path).load_all(splits)

    def missing(path: Path) -> list[str]:
        return check_dataset(path)[1]["train"].names["images missing"]

    assert missing(tmp_path) == ["cats/1.png"]
    # nor is any of them what lies there without a folder
    pictures(tmp_path, "1.png")
    assert missing(tmp_path) == ["cats/1.png"]
    # nor where only the folder tells that it is another
    write_jsonl(tmp_path / "alone" / "train.jsonl", row("cats/1.png"))
    pictures(tmp_path / "alone", "cats/2.png", "dogs/1.png")
    assert missing(tmp_path / "alone") == ["cats/1.png"]


def test_image_found_elsewhere_is_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "pets/a.png", "cat/0.png")
    write_jsonl(tmp_path / "train.jsonl", row("images/a.png"), row("data/cat/0.png"))
    report = check_dataset(tmp_path)[1]["train"]
    told = report.names["images found under a name that differs from the annotated one"]
    assert told == ["images/a.png as pets/a.png", "data/cat/0.png as cat/0.png"]
    assert "images missing" not in report.counts


@pytest.mark.parametrize("fdrd", [False, True])
def test_images_of_one_name_in_several_folders_are_distinct(fdrd: bool, tmp_path: Path) -> None:
    places = [f"/home/me/data/{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)]
    if fdrd:
        entries = {place: {"file_name": Path(place).name, "file_path": place, "positive": "a pet"} for place in places}
        (tmp_path / "train.json").write_text(json.dumps(entries))
    else:
        write_jsonl(tmp_path / "train.jsonl", *(row(place, caption="a pet") for place in places))
    train = check_dataset(tmp_path, decode_images=False)[0]["train"]
    assert [sample.image for sample in train.samples] == places
    pictures(tmp_path, *(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)))
    assert [sample.image for sample in Annotations(tmp_path).load("train")[0].samples] == [
        place.removeprefix("/home/me/data/") for place in places
    ]


def test_split_is_independent_of_the_mount_point(tmp_path: Path) -> None:
    def cut(name: str, prefix: str) -> list[str]:
        rows = (row(f"{prefix}{kind}/{i}.png") for kind in "ab" for i in range(40))
        file = write_jsonl(tmp_path / name / "all.jsonl", *rows)
        splits, _ = Annotations(file).load_all(None, "ignore")
        return [f"{split} {s.image.removeprefix(prefix)}" for split, data in splits.items() for s in data.samples]

    assert cut("here", "/home/anna/data/") == cut("there", "/mnt/data/") == cut("relative", "")


def test_images_in_two_splits_are_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "img/a.png", "img/b.png")
    write_jsonl(tmp_path / "train.jsonl", row("img/a.png"), row("img/b.png"))
    write_jsonl(tmp_path / "val.jsonl", row("img/b.png"))
    write_jsonl(tmp_path / "test.jsonl", row("a.png", caption="spelled otherwise"))
    _, reports = Annotations(tmp_path).load_all()
    assert reports["val"].names["images that train has too, so val measures nothing new"] == ["img/b.png"]
    assert reports["test"].names["images that train has too, so test measures nothing new"] == ["img/a.png"]
    assert "images that train has too" in str(check_dataset(tmp_path)[1]["val"])


def test_a_column_that_contradicts_the_files_name_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", row("a.png", split="train"), row("b.png", split="valid"))
    with pytest.raises(DataError, match=r"rows of another split, such as 'b\.png' \(valid\)"):
        Annotations(tmp_path).load("train", "ignore")
    write_jsonl(tmp_path / "train.jsonl", row("a.png", split="Training"))
    assert len(Annotations(tmp_path).load("train", "ignore")[0]) == 1


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_validation_split_has_several_names(name: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", *(row(f"{number}.png") for number in range(40)))
    write_jsonl(tmp_path / f"{name}.jsonl", row("v.png"))
    splits, reports = Annotations(tmp_path).load_all(None, "ignore")
    assert {split: len(data) for split, data in splits.items()} == {"train": 40, "val": 1}
    assert not [what for what in reports["train"].counts if "held out" in what]
    assert [sample.image for sample in Annotations(tmp_path / f"{name}.jsonl").load("val", "ignore")[0].samples]


def test_empty_split_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", row("a.png"))
    with pytest.raises(DataError, match="can lack one: add a column `split`"):
        Annotations(file).load_all(("train", "val", "test"), "ignore")


def test_category_can_be_a_number(tmp_path: Path) -> None:
    rows = [row("a.png", category=0), row("b.png", category=float("nan")), row("c.png", class_name=0.5)]
    write_jsonl(tmp_path / "train.jsonl", *rows)
    assert [s.category for s in Annotations(tmp_path).load("train", "ignore")[0].samples] == ["0", "", "0.5"]
