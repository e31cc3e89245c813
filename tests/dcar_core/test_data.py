import json
from pathlib import Path

import pytest

from dcar_core.data import load_split
from dcar_core.errors import DataError


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def entry(**change: object) -> dict[str, object]:
    return {
        "file_name": "a.png",
        "file_path": "YOUR_IMAGE_PATH/a.png",
        "positive": "a red car",
        "negative": ["a van"],
    } | change


def test_fdrd_and_what_is_repaired(tmp_path: Path) -> None:
    write(
        tmp_path / "train.json",
        {
            "sports_car_001": entry(negative=["A Red  Car", "a blue car"]),
            "sports_car_002": entry(file_name="b.png", negative=[]),
            "van-3": entry(positive="a van", class_name="big van"),
        },
    )
    data, report = load_split(tmp_path, "train")
    assert [s.category for s in data.samples] == ["sports car", "sports car", "big van"]
    assert data.samples[0].negatives == ("a blue car",)
    assert report.counts["categories derived from the key"] == 2
    assert report.counts["negatives equal to their positive, left out"] == 2
    assert sum(report.counts[k] for k in report.counts if k.startswith("captions that another")) == 1
    assert "2 pairs without a negative" in str(report)


def test_file_name_is_taken_from_a_path_when_missing(tmp_path: Path) -> None:
    content = {"x": {"file_path": "/home/someone/images/c.png", "positive": "a"}}
    assert load_split(write(tmp_path / "one.json", content), "train")[0].samples[0].image == "c.png"


def test_tables(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "caption": "a", "split": "train", "category": "x", "negatives": ["b"]},
        {"image": "b.png", "caption": "b", "split": "test"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_split(tmp_path, "train")[0].samples[0].negatives == ("b",)
    (tmp_path / "pairs.jsonl").unlink()
    (tmp_path / "pairs.csv").write_text("image,caption,split,category\na.png,a,val,x\n")
    assert load_split(tmp_path, "val")[0].samples[0].category == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold an object"),
        ("{", "is not JSON"),
        ('{"k": 3}', "entry 'k': must be an object"),
        ('{"k": {"file_name": "a.png"}}', "entry 'k': field 'positive' is missing"),
        ("{}", "has no train pairs"),
    ],
)
def test_bad_annotations_name_the_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_split(tmp_path, "train")


def test_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither val\.json"):
        load_split(tmp_path, "val")
