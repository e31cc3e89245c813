"""Pairs of annotations in every form: repairs, splits without leaks, images found, and
files that cannot be used.
"""

import json
import re
import unicodedata
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dcar_core.data import (
    Annotations,
    CleaningReport,
    Dataset,
    Sample,
    check_dataset,
    records,
    write_splits,
)
from dcar_core.data.readers import SKIPPED_ROWS
from dcar_core.data.records import read_records
from dcar_core.util.errors import DataError
from tests.support.commands import dcar
from tests.support.files import (
    write_file,
    write_json,
    write_jsonl,
    write_rows,
    write_tar,
)
from tests.support.images import png, write_image

MISSING = "images missing, left out"


def entry(**change: object) -> dict[str, object]:
    usual = {"file_name": "a.png", "file_path": "YOUR_IMAGE_PATH", "class_name": "car"}
    return usual | {"positive": "a red car", "negative": ["a van"]} | change


def older(number: str, **change: object) -> dict[str, object]:
    """As the first released files have it."""
    path = f"/home/somebody/DATA/pets/images/{number}.jpg"
    return {
        "file_name": number,
        "file_path": path,
        "positive": f"a cat, {number}",
        "negative": [],
    } | change


Row = dict[str, object]


def row(image: str, **more: object) -> Row:
    return {"image": image, "caption": f"a picture, {image}", **more}


def pictures(root: Path, *names: str) -> None:
    for name in names:
        write_image(root / name)


def read(path: Path, split: str = "train") -> tuple[Dataset, CleaningReport]:
    return Annotations(path).load(split, "ignore")


RED = "a red car"
VAN = ("a van",)
LEFT_OUT = (
    "negatives that are empty, repeated, or equal to a caption or an attribute of their"
    " image, left out"
)


@pytest.mark.parametrize(
    ("rows", "pairs", "counts"),
    [
        (  # older FDRD
            {
                "Maine_Coon_12": older(
                    "Maine_Coon_12",
                    negative=["A CAT,  maine_coon_12", "a dog", "A dog", ""],
                ),
                "Maine_Coon_13": older("Maine_Coon_13", positive=" a  cat "),
                "707-320_0001": older("0001", positive=["one", "One", "", "two"]),
                "monkshood_image_06": older(
                    "monkshood_image_06",
                    positive="A monks_hood.",
                    class_name="monks_hood",
                ),
            },
            [
                Sample(
                    "Maine_Coon_12.jpg",
                    "a cat, Maine_Coon_12",
                    "Maine Coon",
                    "",
                    ("a dog",),
                ),
                Sample("Maine_Coon_13.jpg", "a cat", "Maine Coon"),
                Sample("0001.jpg", "one", "707-320"),
                Sample("0001.jpg", "two", "707-320"),
                Sample("monkshood_image_06.jpg", "A monks_hood.", "monks hood"),
            ],
            {
                "categories derived from the key": 3,
                LEFT_OUT: 3,
                "pairs without a negative": 4,
                "pairs that occur twice, left out once": 1,
                "captions that are empty or missing, left out": 1,
            },
        ),
        (  # newer FDRD
            {
                "a.jpg": entry(
                    file_name="a.jpg",
                    class_name="Apply_Eye_Makeup",
                    negative=[],
                ),
                "b.jpg": entry(
                    file_name="b.jpg",
                    class_name="",
                    negative=[],
                    file_path="YOUR_IMAGE_PATH/b.jpg",
                ),
                "v_BoxingSpeedBag_g01_c02.jpg": {
                    k: v for k, v in entry().items() if k != "class_name"
                },
            },
            [
                Sample("a.jpg", RED, "Apply Eye Makeup"),
                Sample("b.jpg", RED, "b"),
                Sample("a.png", RED, "Boxing Speed Bag", "", VAN),
            ],
            {
                "categories derived from the key": 2,
                "pairs without a negative": 2,
                "captions that another image has too"
                " (positives of each other in training)": 2,
            },
        ),
        (
            [
                {
                    "image": "1.png",
                    "caption": "So red.",
                    "attributes": ["Red"],
                    "negatives": ["A blue van.", "A fast car.", "red", "So red."],
                },
                {"image": "1.png", "caption": "A fast car."},
                {"image": "2.png", "caption": "A blue van."},
            ],
            [
                Sample(
                    "1.png",
                    "So red.",
                    "",
                    "",
                    ("A blue van.",),
                    (),
                    ("Red",),
                ),
                Sample("1.png", "A fast car."),
                Sample("2.png", "A blue van."),
            ],
            {LEFT_OUT: 3, "pairs without a negative": 2},
        ),
        (
            {
                f"{n}": entry(file_name=f"{n}.png", positive=f"{n}", attributes=value)
                for n, value in enumerate(
                    [
                        {"colour": "red"},
                        "red",
                        3,
                        ["red", 3],
                        None,
                    ]
                )
            },
            [Sample(f"{n}.png", f"{n}", "car", "", VAN) for n in range(5)],
            {},
        ),
        (
            [
                row("a.png", category=0),
                row("b.png", category=float("nan")),
                row("c.png", class_name=0.5),
            ],
            [
                Sample(f"{n}.png", f"a picture, {n}.png", kind)
                for n, kind in (
                    ("a", "0"),
                    ("b", ""),
                    ("c", "0.5"),
                )
            ],
            {"pairs without a negative": 3},
        ),
    ],
)
def test_rows_of_every_form_become_pairs_and_what_was_left_out_is_told(
    rows: Any,
    pairs: list[Sample],
    counts: dict[str, int],
    tmp_path: Path,
) -> None:
    write_json(tmp_path / "val.json", {"v": entry(file_name="v.png")})
    if isinstance(rows, dict):
        write_json(tmp_path / "train.json", rows)
    else:
        write_jsonl(tmp_path / "train.jsonl", *rows)
    data, report = read(tmp_path)
    assert data.samples == pairs
    assert report.counts == counts


def test_repeated_keys_are_kept_and_bad_rows_left_out(tmp_path: Path) -> None:
    one = json.dumps(entry(positive="one"))
    two = json.dumps(entry(positive="two"))
    bad = json.dumps(entry(negative_class=["van", "bus"]))
    more = ",".join(f'"{n}": {json.dumps(entry(positive=str(n)))}' for n in range(7))
    (tmp_path / "train.json").write_text(
        f'{{"k": {one}, "k": {two}, "b": {bad}, {more}}}', encoding="utf-8-sig"
    )
    data, report = read(tmp_path)
    assert [sample.caption for sample in data.samples][:2] == ["one", "two"]
    assert report.names[SKIPPED_ROWS] == [
        "entry 'b': 1 negatives have 2 categories; give each its own"
    ]


def test_metadata_survives_reading_and_writing(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    more = {"meta_category": "vehicles", "attributes": ["red", "vintage"]}
    negatives = ["a red van", "a red truck"]
    categories = ["van", "truck"]
    write_json(
        tmp_path / "fdrd" / "train.json",
        {"a": entry(negative=negatives, negative_class=categories, **more)},
    )
    more |= {
        "class_name": "car",
        "negatives": negatives,
        "negative_categories": categories,
    }
    write_jsonl(
        tmp_path / "rows" / "train.jsonl",
        {"image": ".\\a.png", "caption": "a red car", **more},
    )
    data, rows = (
        Annotations(tmp_path / form, tmp_path).load("train")[0]
        for form in ("fdrd", "rows")
    )
    more_fields = (tuple(negatives), tuple(categories), ("red", "vintage"))
    wanted = Sample("a.png", "a red car", "car", "vehicles", *more_fields)
    assert data.samples == rows.samples == [wanted]
    write_splits({"train": data, "val": data}, tmp_path / "out")
    assert (
        Annotations(tmp_path / "out", tmp_path).load("val")[0].samples == data.samples
    )


def test_a_file_without_splits_is_divided_by_image_wherever_it_is_mounted(
    tmp_path: Path,
) -> None:
    def divided(name: str, prefix: str) -> dict[str, set[str]]:
        rows = (
            row(f"{prefix}{i}.png", caption=f"{word} {i}")
            for i, word in product(range(300), ("one", "two"))
        )
        splits, reports = Annotations(
            write_jsonl(tmp_path / name / "all.jsonl", *rows)
        ).load_all(None, "ignore")
        assert [
            n for what, n in reports["val"].counts.items() if "split by a hash" in what
        ] == [600]
        return {
            split: {image.removeprefix(prefix) for image in data.images}
            for split, data in splits.items()
        }

    images = divided("relative", "data/")
    assert sum(map(len, images.values())) == 300, "no image is in two splits"
    assert len(images["train"]) > 210
    assert min(len(images["val"]), len(images["test"])) > 10
    assert (
        images == divided("here", "/home/anna/data/") == divided("there", "/mnt/data/")
    )


def test_missing_val_split_is_taken_from_training_images(tmp_path: Path) -> None:
    train = {
        f"{i}_{j}": entry(file_name=f"{i}.jpg", positive=f"a cat {i} {j}")
        for i, j in product(range(200), range(2))
    }
    write_json(tmp_path / "pets_train.json", train)
    write_json(tmp_path / "pets_test.json", {"a": entry(file_name="x.jpg")})
    splits, reports = Annotations(tmp_path).load_all(None, "ignore")
    images = {split: set(data.images) for split, data in splits.items()}
    assert list(splits) == Annotations(tmp_path).splits() == ["train", "val", "test"]
    assert not images["train"] & images["val"]
    assert len(images["train"] | images["val"]) == 200
    assert 10 < len(images["val"]) < 40
    assert images["test"] == {"x.jpg"}
    moved = "training pairs used for validation, as the data has no val split"
    assert (
        reports["train"].counts[moved]
        == reports["val"].counts[moved]
        == 2 * len(images["val"])
    )
    write_json(tmp_path / "val.json", {"a": entry(file_name="y.jpg")})
    assert len(read(tmp_path)[0]) == 400


def test_split_is_the_name_of_its_file(tmp_path: Path) -> None:
    file = write_json(tmp_path / "cars_test.json", {"a": entry()})
    assert len(read(file, "test")[0]) == len(read(tmp_path, "test")[0]) == 1
    write_json(tmp_path / "pets_test.json", {"a": entry()})
    with pytest.raises(
        DataError, match=r"several files for test \(cars_test.json, pets_test.json\)"
    ):
        read(tmp_path, "test")
    for name in ("val", "valid", "validation", "dev"):
        file = write_jsonl(tmp_path / name / f"{name}.jsonl", row("v.png"))
        write_jsonl(
            tmp_path / name / "train.jsonl",
            *(row(f"{number}.png") for number in range(40)),
        )
        splits, _ = Annotations(tmp_path / name).load_all(None, "ignore")
        assert {split: len(data) for split, data in splits.items()} == {
            "train": 40,
            "val": 1,
        }
        assert len(read(file, "val")[0]) == 1
    write_jsonl(tmp_path / "dev" / "train.jsonl", row("a.png", split="Training"))
    assert len(read(tmp_path / "dev")[0]) == 1


@pytest.mark.parametrize(
    "name",
    ["Maine_Coon_12.jpg", "pets/images/Maine_Coon_12.jpg", "deep/er/Maine_Coon_12.jpg"],
)
def test_images_are_found_below_another_root(tmp_path: Path, name: str) -> None:
    file = write_json(
        tmp_path / "train.json", {"Maine_Coon_12": older("Maine_Coon_12")}
    )
    write_image(tmp_path / "photos" / name)
    data, report = Annotations(file, tmp_path / "photos").load("train")
    assert data.samples[0].image == name
    assert data.read(name)
    is_renamed = (
        "images found under a name that differs from the annotated one" in report.names
    )
    assert is_renamed == name.startswith("deep")


def test_an_image_is_found_in_another_unicode_form(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "Stück.png")
    decomposed = unicodedata.normalize("NFD", "Stück.png")
    write_jsonl(
        tmp_path / "train.jsonl",
        row(decomposed),
        row("Stück.png", caption="one more"),
    )
    write_jsonl(tmp_path / "val.jsonl", row(decomposed))
    assert [
        sample.image for sample in Annotations(tmp_path).load("train")[0].samples
    ] == ["Stück.png"] * 2


def test_missing_image_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "cats/2.png", "dogs/1.png")
    write_jsonl(tmp_path / "train.jsonl", row("cats/1.png"), row("cats/2.png"))
    write_jsonl(tmp_path / "test.jsonl", row("dogs/1.png"))
    for splits in (("train",), ("train", "test")):
        with pytest.raises(
            DataError,
            match=(
                r"train: 1 of 2 images are not in .*: cats/1\.png\. Point --images"
                r" .*--sk"
            ),
        ):
            Annotations(tmp_path).load_all(splits)

    def missing(path: Path) -> list[str]:
        pictures(path, "here.png")
        write_jsonl(path / "val.jsonl", row("here.png"))
        return Annotations(path).load("train", "present")[1].names[MISSING]

    assert missing(tmp_path) == ["cats/1.png"]
    pictures(tmp_path, "1.png")
    assert missing(tmp_path) == ["cats/1.png"], "nor from above the folders"
    here = row("here.png", caption="here")
    write_jsonl(tmp_path / "alone" / "train.jsonl", row("cats/1.png"), here)
    pictures(tmp_path / "alone", "cats/2.png", "dogs/1.png")
    assert missing(tmp_path / "alone") == ["cats/1.png"], (
        "nor where the folder alone tells that it is another"
    )
    write_jsonl(tmp_path / "twice" / "train.jsonl", row("1.png"), here)
    pictures(tmp_path / "twice", "a/1.png", "b/1.png")
    assert missing(tmp_path / "twice") == ["1.png"], "nor from one of two"


def test_missing_and_broken_images_are_named_and_skipped_on_request(
    tmp_path: Path,
) -> None:
    good = write_image(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:40])
    rows = {
        name: entry(file_name=f"{name}.png", positive=f"a {name} one")
        for name in ("good", "cut", "gone")
    }
    write_json(tmp_path / "train.json", rows)
    with pytest.raises(DataError, match=r"train: 1 of 3 images .*gone\.png"):
        Annotations(tmp_path).load("train")
    data, report = Annotations(tmp_path).load("train", "skip")
    assert [s.image for s in data.samples] == ["good.png"]
    assert report.names[MISSING] == ["gone.png"]
    [broken] = report.names["images broken, left out"]
    assert broken.startswith("cut.png (")
    assert "gone.png" in str(report)
    good.unlink()
    with pytest.raises(DataError, match="no train pairs that can be used"):
        Annotations(tmp_path).load("train", "skip")


@pytest.mark.parametrize("fdrd", [False, True])
def test_images_of_one_name_in_several_folders_are_distinct(
    fdrd: bool, tmp_path: Path
) -> None:
    places = [
        f"/home/me/data/{kind}/{number}.png"
        for kind, number in product(("cat", "dog"), range(3))
    ]
    if fdrd:
        entries = {
            place: {
                "file_name": Path(place).name,
                "file_path": place,
                "positive": "a pet",
            }
            for place in places
        }
        (tmp_path / "train.json").write_text(json.dumps(entries))
    else:
        write_jsonl(
            tmp_path / "train.jsonl", *(row(place, caption="a pet") for place in places)
        )
    write_jsonl(tmp_path / "val.jsonl", row("other.png"))
    assert [sample.image for sample in read(tmp_path)[0].samples] == places
    pictures(
        tmp_path,
        *(f"{kind}/{number}.png" for kind, number in product(("cat", "dog"), range(3))),
    )
    assert [
        sample.image for sample in Annotations(tmp_path).load("train")[0].samples
    ] == [place.removeprefix("/home/me/data/") for place in places]


def test_images_in_two_splits_are_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "img/a.png", "img/b.png")
    write_jsonl(tmp_path / "train.jsonl", row("img/a.png"), row("img/b.png"))
    write_jsonl(tmp_path / "val.jsonl", row("img/b.png"))
    write_jsonl(tmp_path / "test.jsonl", row("a.png", caption="spelled otherwise"))
    _, reports = check_dataset(tmp_path)
    assert reports["val"].names[
        "images that train has too, so val measures nothing new"
    ] == ["img/b.png"]
    assert reports["test"].names[
        "images that train has too, so test measures nothing new"
    ] == ["img/a.png"]


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
COCO = (
    r"entry 'images': must be an object; docs/how-to/prepare-data\.md shows how to"
    r" convert COCO"
)
HEAD = "image,caption\n"


def test_webdataset_tars_hold_pairs(tmp_path: Path) -> None:
    image = png()
    # two lines: a caption may have other signs that end one
    lines = "a red\u2028square\r\nall\x85red\n".encode()
    first = {
        "0.depth.png": b"depth",
        "0.png": image,
        "0.mask.png": b"mask",
        "0.txt": lines,
        "1.png": image,
    }
    write_tar(tmp_path / "train-0000.tar", first | {"2.txt": b"-"})
    row = json.dumps(
        {"caption": "red", "class_name": "square", "negatives": ["blue"]}
    ).encode()
    write_tar(
        tmp_path / "train-0001.tar",
        {"./0.png": image, "./0.json": row, "./0.cls": b"17"},
    )
    write_tar(
        tmp_path / "val.tar",
        {"v/0.png": image, "v/0.txt": b"for validation", "v/0.cls": b"square\n"},
    )
    data, report = Annotations(tmp_path).load("train", "skip")
    assert [(s.image, s.caption) for s in data.samples] == [
        ("train-0000.tar/0.png", "a red square"),
        ("train-0000.tar/0.png", "all red"),
        ("train-0001.tar/0.png", "red"),
    ]
    assert (data.samples[2].category, data.samples[2].negatives) == (
        "square",
        ("blue",),
    ), "the name, not its number"
    assert data.read(data.samples[2].image) == image
    assert report.names["captions that are empty or missing, left out"] == [
        "train-0000.tar/1.png"
    ]
    assert report.names["tar samples without an image, left out"] == [
        "train-0000.tar/2"
    ]
    (validation,) = Annotations(tmp_path).load("val")[0].samples
    assert validation.caption == "for validation"
    assert validation.category == "square"
    assert len(Annotations(tmp_path / "val.tar").load("val")[0]) == 1


def test_annotations_take_precedence_over_a_gallerys_metadata(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"file_name": f"{n}.png", "caption": f"image {n}"} for n in range(40)
    ]
    write_rows(tmp_path / "metadata.jsonl", rows)
    write_rows(tmp_path / "train.parquet", rows[:30])
    images = {
        sample.image
        for split in ("train", "val")
        for sample in read(tmp_path, split)[0].samples
    }
    assert images == {row["file_name"] for row in rows[:30]}
    with pytest.raises(DataError, match="has no test pairs; it has train"):
        Annotations(tmp_path).load("test")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_form_gives_the_same_pairs(suffix: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "image": "a.png",
            "caption": "a",
            "split": "train",
            "category": "007",
            "negatives": ["b", "c"],
        },
        {
            "image": "a.png",
            "caption": "a, again",
            "split": "training",
            "category": "007",
            "negatives": None,
        },
        {
            "image": "b.png",
            "caption": "b",
            "split": "validation",
            "category": None,
            "negatives": ["d"],
        },
        {
            "image": "c.png",
            "caption": "c",
            "split": "extra",
            "category": None,
            "negatives": None,
        },
    ]
    if suffix == ".csv":
        rows = [
            row | {"negatives": cell}
            for row, cell in zip(rows, ("b | c", "", '["d"]', ""), strict=True)
        ]
    write_rows(tmp_path / f"pairs{suffix}", rows)
    assert read(tmp_path)[0].samples == [
        Sample("a.png", "a", "007", "", ("b", "c")),
        Sample("a.png", "a, again", "007"),
    ]
    data, report = Annotations(tmp_path).load("val", "ignore")
    assert data.samples == [Sample("b.png", "b", negatives=("d",))]
    assert report.counts["pairs of the split 'extra', left out"] == 1
    assert Annotations(tmp_path).splits() == ["train", "val"]


def test_fields_of_other_kinds_are_read_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(
        "image,caption,captions\na.png,,x|y\nb.png,z,\n"
    )
    write_jsonl(
        tmp_path / "val.jsonl",
        {"image": "a.png", "caption": " ", "captions": ["x", "y"]},
    )
    row = {"image": "a.png", "caption": "z"}
    write_jsonl(
        tmp_path / "test.jsonl",
        row | {"captions": 5},
        row | {"image": "b.png", "captions": [{}], "note": [1]},
    )
    for split, wanted in (
        ("train", ["x", "y", "z"]),
        ("val", ["x", "y"]),
        ("test", ["z", "z"]),
    ):
        data, report = Annotations(tmp_path).load(split, "ignore")
        assert [sample.caption for sample in data.samples] == wanted
        assert not [
            what
            for what in report.counts
            if "left out" in what or "cannot be used" in what
        ]
    cells = [
        ("a", "red | fast"),
        ("b", "[3]"),
        ("c", '["red", "two | doors"]'),
    ]
    write_rows(
        tmp_path / "train.csv",
        [{"image": name, "caption": name, "attributes": cell} for name, cell in cells],
    )
    assert [sample.attributes for sample in read(tmp_path)[0].samples] == [
        (),
        (),
        ("red", "two | doors"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "[]", "must hold an object"),
        (
            "train.json",
            '{"k": {"file_name": "a.png"}}',
            "entry 'k': no field caption or captions",
        ),
        (
            "train.json",
            '{"k": {"positive": "a"}}',
            "entry 'k': field 'image' is missing",
        ),
        (
            "train.json",
            '{"k": {"file_name": "a.png", "positive": {"a": 1}}}',
            "'caption' must be text or a list of",
        ),
        ("train.json", "{}", "has no train pairs in train.json; it needs pairs"),
        (
            "train.json",
            '{"k": {"file_name": "a.png", "positive": " "}}',
            "no train pairs that can be used",
        ),
        ("train.json", "\udcff", "is not JSON in UTF-8"),
        ("train.json", '{"images": [{"filename": "1.jpg"}]}', COCO),
        ("train.json", DEEP, r"train\.json.*nested too deeply"),
        (
            "train.jsonl",
            '{"image": "a.png", "caption": "a", "split": "val"}',
            r"of another split, such as 'a\.png' \(",
        ),
        ("pairs.jsonl", '{"image": "a.png", "caption": "a"}\n{', r"line 2: not JSON"),
        (
            "pairs.jsonl",
            '{"caption": "a"}',
            r"line 1: no field file_name or image or path; it has caption",
        ),
        (
            "pairs.jsonl",
            '{"image": 12, "caption": "a"}',
            "field 'image' must be text, not 12",
        ),
        (
            "pairs.jsonl",
            '{"image": "a.png"}',
            r"line 1: no field caption or captions; it has image",
        ),
        (
            "pairs.jsonl",
            '{"image": "a.png", "caption": "a", "category": ["a"]}',
            "'category' must be one text, not",
        ),
        (
            "pairs.csv",
            "image,caption,split\na.png,a,train\nb.png,b,\n",
            r"1 pairs have no split, such as 'b\.png'",
        ),
        (
            "pairs.csv",
            "image,caption,split\na.png,one, two,train\n",
            r"line 2: more cells than the header",
        ),
        (
            "train.csv",
            HEAD + 'a.png,"a red owl\nb.png,"a ""green"" owl"\n',
            r"line 2 is not CSV: .* quote not closed",
        ),
        (
            "train.csv",
            HEAD + 'a.png,"a ""red"" owl"\nb.png,"a" blue owl\n',
            r"line 3 is not CSV",
        ),
        (
            "train.csv",
            "image,caption,caption\na.png,x,y\n",
            "two columns named 'caption'",
        ),
        (
            "train.csv",
            "Picture,Text\na.png,a\n",
            "no field file_name or image or path; it has Picture, Text",
        ),
        ("notes.txt", "a", r"needs pairs\.csv"),
        (
            "cars_test.json",
            '{"a": {"file_name": "a", "positive": "a"}}',
            "has no train pairs; it has test",
        ),
    ],
)
def test_bad_annotations_are_named_with_their_place(
    tmp_path: Path,
    name: str,
    content: str,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        Annotations(tmp_path).load("train", "ignore")


def test_directory_without_annotations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no val pairs; it needs pairs\.csv, "):
        Annotations(tmp_path).load("val")
    with pytest.raises(DataError, match="does not exist"):
        Annotations(tmp_path / "gone").load("val")
    write_json(
        tmp_path / "train.json", {"a": {"file_name": "a.png", "positive": "a red car"}}
    )
    for split in ("test", "val"):  # one pair, and it is needed for training
        with pytest.raises(DataError, match=f"has no {split} pairs; it has train"):
            Annotations(tmp_path).load(split)
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(
        DataError, match=r"read from \.json, \.jsonl, \.csv, \.parquet, \.tar"
    ):
        Annotations(tmp_path / "a.xml").load("val")


def test_parquet_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    good = pa.table({"image": ["a.png"], "caption": ["a"]})
    pq.write_table(good, file)
    damaged = file.read_bytes()
    for content, message in (
        (b"not parquet", r"train\.parquet is damaged or no Parquet file"),
        (
            damaged[:4] + b"\xff" * 36 + damaged[40:],
            r"train\.parquet is damaged or no Parquet file, after row 0: .+",
        ),
        ({"caption": ["a"]}, "no field file_name or image or path; it has caption"),
        (
            {"image": [{"bytes": b"x", "path": "a.png"}], "caption": ["a"]},
            "field 'image' must be text, not",
        ),
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            pq.write_table(pa.table(content), file)
        with pytest.raises(DataError, match=message):
            Annotations(tmp_path).load("train")


def count(file: Path) -> int:
    return sum(
        1
        for _ in read_records(
            str(file),
            lambda: file.open("rb"),
            infer_types=True,
        )
    )


def test_files_without_bounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "x" * (records.MAX_LINE + 1)
    for name, content in (
        ("l.jsonl", '{"image": "a.png"}\n' + line),
        ("l.csv", "image,caption\n" + line),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(
            DataError, match=rf"{name}, line 2: longer than 16,000,000 characters"
        ):
            count(tmp_path / name)
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table({"image": ["a.png"] * 100_000}), file)
    assert count(file) == 100_000
    monkeypatch.setattr(records, "MAX_PACKED_ROWS", 50_000)
    with pytest.raises(
        DataError,
        match=r"list\.parquet has 100,000 rows in [\d,]+ bytes, at most 50,000",
    ):
        count(file)
    pq.write_table(
        pa.table({"image": [f"{number}.png" for number in range(100_000)]}), file
    )
    assert count(file) == 100_000


def test_the_check_names_every_fault(tiny_data: Path, tmp_path: Path) -> None:
    rows = [
        {
            "image": "red.png",
            "caption": "a red square",
            "split": "train",
            "category": "square",
        },
        {
            "image": "red.png",
            "caption": "a square that goes " + "on and " * 80 + "on",
            "split": "train",
        },
        {"image": "cut.png", "caption": "a square", "split": "train"},
        {
            "image": "gone.png",
            "caption": "a square nobody has",
            "split": "train",
            "category": "square",
        },
    ]
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    photo = (tiny_data / "square" / "red.png").read_bytes()
    write_file(tmp_path / "photos" / "red.png", photo)
    write_file(tmp_path / "photos" / "cut.png", photo[: len(photo) // 2])
    done = dcar("data", "check", tmp_path, "--images", tmp_path / "photos")
    assert done.returncode == 1
    for line in (
        "train: 2 pairs, 1 images, 1 categories",
        " 1 pairs without a category",
        " 1 splits with one category only",
        " 1 captions longer than the context's 77 tokens, cut",
        r" 1 images missing, left out: gone\.png",
        r" 1 images broken, left out: cut\.png \(",
    ):
        assert re.search(line, done.stdout), line
    assert "2 images cannot be used: set --images" in done.stderr
    done = dcar("data", "check", tmp_path, "--annotations-only", "--context", "0")
    assert done.returncode == 0
    assert "missing" not in done.stdout
