"""Pairs of annotations: repairs, splits without leaks, and the images found for them."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcar_core.data import Annotations, CleaningReport, Dataset, Sample, check_dataset, write_splits
from dcar_core.data.readers import SKIPPED_ROWS
from dcar_core.util.errors import DataError
from tests.support.files import write_json, write_jsonl
from tests.support.images import write_image

MISSING = "images missing, left out"


def entry(**change: object) -> dict[str, object]:
    usual = {"file_name": "a.png", "file_path": "YOUR_IMAGE_PATH", "class_name": "car"}
    return usual | {"positive": "a red car", "negative": ["a van"]} | change


def older(number: str, **change: object) -> dict[str, object]:
    """As the first released files have it."""
    path = f"/home/somebody/DATA/pets/images/{number}.jpg"
    return {"file_name": number, "file_path": path, "positive": f"a cat, {number}", "negative": []} | change


Row = dict[str, object]


def row(image: str, **more: object) -> Row:
    return {"image": image, "caption": f"a picture, {image}", **more}


def pictures(root: Path, *names: str) -> None:
    for name in names:
        write_image(root / name)


def read(path: Path, split: str = "train") -> tuple[Dataset, CleaningReport]:
    return Annotations(path).load(split, "ignore")


RED, VAN = "a red car", ("a van",)
LEFT_OUT = "negatives that are empty, repeated, or equal to a caption or an attribute of their image, left out"


@pytest.mark.parametrize(
    ("rows", "pairs", "counts"),
    [
        (  # older FDRD
            {
                "Maine_Coon_12": older("Maine_Coon_12", negative=["A CAT,  maine_coon_12", "a dog", "A dog", ""]),
                "Maine_Coon_13": older("Maine_Coon_13", positive=" a  cat "),
                "707-320_0001": older("0001", positive=["one", "One", "", "two"]),
                "monkshood_image_06": older("monkshood_image_06", positive="A monks_hood.", class_name="monks_hood"),
            },
            [
                Sample("Maine_Coon_12.jpg", "a cat, Maine_Coon_12", "Maine Coon", "", ("a dog",)),
                Sample("Maine_Coon_13.jpg", "a cat", "Maine Coon"), Sample("0001.jpg", "one", "707-320"),
                Sample("0001.jpg", "two", "707-320"),
                Sample("monkshood_image_06.jpg", "A monks_hood.", "monks hood"),
            ],
            {
                "categories derived from the key": 3, LEFT_OUT: 3, "pairs without a negative": 4,
                "pairs that occur twice, left out once": 1, "captions that are empty or missing, left out": 1,
            },
        ),
        (  # newer FDRD
            {
                "a.jpg": entry(file_name="a.jpg", class_name="Apply_Eye_Makeup", negative=[]),
                "b.jpg": entry(file_name="b.jpg", class_name="", negative=[], file_path="YOUR_IMAGE_PATH/b.jpg"),
                "v_BoxingSpeedBag_g01_c02.jpg": {k: v for k, v in entry().items() if k != "class_name"},
            },
            [
                Sample("a.jpg", RED, "Apply Eye Makeup"), Sample("b.jpg", RED, "b"),
                Sample("a.png", RED, "Boxing Speed Bag", "", VAN),
            ],
            {
                "categories derived from the key": 2, "pairs without a negative": 2,
                "captions that another image has too (positives of each other in training)": 2,
            },
        ),
        (
            [
                {"image": "1.png", "caption": "So red.", "attributes": ["Red"],
                 "negatives": ["A blue van.", "A fast car.", "red", "So red."]},
                {"image": "1.png", "caption": "A fast car."},
                {"image": "2.png", "caption": "A blue van."},
            ],
            [
                Sample("1.png", "So red.", "", "", ("A blue van.",), (), ("Red",)),
                Sample("1.png", "A fast car."), Sample("2.png", "A blue van."),
            ],
            {LEFT_OUT: 3, "pairs without a negative": 2},
        ),
        (
            {
                f"{n}": entry(file_name=f"{n}.png", positive=f"{n}", attributes=value)
                for n, value in enumerate([{"colour": "red"}, "red", 3, ["red", 3], None])
            },
            [Sample(f"{n}.png", f"{n}", "car", "", VAN) for n in range(5)],
            {},
        ),
        (
            [row("a.png", category=0), row("b.png", category=float("nan")), row("c.png", class_name=0.5)],
            [Sample(f"{n}.png", f"a picture, {n}.png", kind) for n, kind in (("a", "0"), ("b", ""), ("c", "0.5"))],
            {"pairs without a negative": 3},
        ),
    ],
)  # fmt: skip
def test_rows_of_every_form_become_pairs_and_what_was_left_out_is_told(
    rows: Any, pairs: list[Sample], counts: dict[str, int], tmp_path: Path
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
    one, two = json.dumps(entry(positive="one")), json.dumps(entry(positive="two"))
    bad = json.dumps(entry(negative_class=["van", "bus"]))
    more = ",".join(f'"{n}": {json.dumps(entry(positive=str(n)))}' for n in range(7))
    (tmp_path / "train.json").write_text(f'{{"k": {one}, "k": {two}, "b": {bad}, {more}}}', encoding="utf-8-sig")
    data, report = read(tmp_path)
    assert [sample.caption for sample in data.samples][:2] == ["one", "two"]
    assert report.names[SKIPPED_ROWS] == ["entry 'b': 1 negatives have 2 categories; give each its own"]


def test_metadata_survives_reading_and_writing(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    more = {"meta_category": "vehicles", "attributes": ["red", "vintage"]}
    negatives, categories = ["a red van", "a red truck"], ["van", "truck"]
    write_json(tmp_path / "fdrd" / "train.json", {"a": entry(negative=negatives, negative_class=categories, **more)})
    more |= {"class_name": "car", "negatives": negatives, "negative_categories": categories}
    write_jsonl(tmp_path / "rows" / "train.jsonl", {"image": ".\\a.png", "caption": "a red car", **more})
    data, rows = (Annotations(tmp_path / form, tmp_path).load("train")[0] for form in ("fdrd", "rows"))
    wanted = Sample(
        "a.png", "a red car", "car", "vehicles", ("a red van", "a red truck"), ("van", "truck"), ("red", "vintage")
    )
    assert data.samples == rows.samples == [wanted]
    write_splits({"train": data, "val": data}, tmp_path / "out")
    assert Annotations(tmp_path / "out", tmp_path).load("val")[0].samples == data.samples


HALF = r'"a red car \ud83d"'  # of an emoji, as a caption that was cut off ends
FDRD = '{"a": {"file_name": "a.png", "file_path": "", %s}}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", FDRD % f'"positive": {HALF}, "class_name": {HALF}'),
        ("train.jsonl", f'{{"image": "a.png", "captions": [{HALF}], "negatives": {HALF}, {HALF}: [{{"a": {HALF}}}]}}'),
        ("train.csv", f'image,captions\na.png,"[{HALF.replace(chr(34), chr(34) * 2)}]"\n'),
    ],
)
def test_half_of_a_surrogate_pair_can_be_written_again(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (sample,) = read(tmp_path)[0].samples
    assert sample.caption == "a red car \ufffd"
    repr(sample).encode()


def test_a_file_without_splits_is_divided_by_image_wherever_it_is_mounted(tmp_path: Path) -> None:
    def divided(name: str, prefix: str) -> dict[str, set[str]]:
        rows = (row(f"{prefix}{i}.png", caption=f"{word} {i}") for i in range(300) for word in ("one", "two"))
        splits, reports = Annotations(write_jsonl(tmp_path / name / "all.jsonl", *rows)).load_all(None, "ignore")
        assert [n for what, n in reports["val"].counts.items() if "split by a hash" in what] == [600]
        return {split: {image.removeprefix(prefix) for image in data.images} for split, data in splits.items()}

    images = divided("relative", "data/")
    assert sum(map(len, images.values())) == 300, "no image is in two splits"
    assert len(images["train"]) > 210
    assert min(len(images["val"]), len(images["test"])) > 10
    assert images == divided("here", "/home/anna/data/") == divided("there", "/mnt/data/")


def test_missing_val_split_is_taken_from_training_images(tmp_path: Path) -> None:
    train = {f"{i}_{j}": entry(file_name=f"{i}.jpg", positive=f"a cat {i} {j}") for i in range(200) for j in range(2)}
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
    assert reports["train"].counts[moved] == reports["val"].counts[moved] == 2 * len(images["val"])
    write_json(tmp_path / "val.json", {"a": entry(file_name="y.jpg")})
    assert len(read(tmp_path)[0]) == 400


def test_split_is_the_name_of_its_file(tmp_path: Path) -> None:
    file = write_json(tmp_path / "cars_test.json", {"a": entry()})
    assert len(read(file, "test")[0]) == len(read(tmp_path, "test")[0]) == 1
    write_json(tmp_path / "pets_test.json", {"a": entry()})
    with pytest.raises(DataError, match=r"several files for test \(cars_test.json, pets_test.json\)"):
        read(tmp_path, "test")
    for name in ("val", "valid", "validation", "dev"):
        file = write_jsonl(tmp_path / name / f"{name}.jsonl", row("v.png"))
        write_jsonl(tmp_path / name / "train.jsonl", *(row(f"{number}.png") for number in range(40)))
        splits, _ = Annotations(tmp_path / name).load_all(None, "ignore")
        assert {split: len(data) for split, data in splits.items()} == {"train": 40, "val": 1}
        assert len(read(file, "val")[0]) == 1
    write_jsonl(tmp_path / "dev" / "train.jsonl", row("a.png", split="Training"))
    assert len(read(tmp_path / "dev")[0]) == 1


@pytest.mark.parametrize("name", ["Maine_Coon_12.jpg", "pets/images/Maine_Coon_12.jpg", "deep/er/Maine_Coon_12.jpg"])
def test_images_are_found_below_another_root(tmp_path: Path, name: str) -> None:
    file = write_json(tmp_path / "train.json", {"Maine_Coon_12": older("Maine_Coon_12")})
    write_image(tmp_path / "photos" / name)
    data, report = Annotations(file, tmp_path / "photos").load("train")
    assert data.samples[0].image == name
    assert data.read(name)
    is_renamed = "images found under a name that differs from the annotated one" in report.names
    assert is_renamed == name.startswith("deep")


def test_an_image_is_found_in_another_unicode_form(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "Stück.png")
    decomposed = unicodedata.normalize("NFD", "Stück.png")
    write_jsonl(tmp_path / "train.jsonl", row(decomposed), row("Stück.png", caption="one more"))
    write_jsonl(tmp_path / "val.jsonl", row(decomposed))
    assert [sample.image for sample in Annotations(tmp_path).load("train")[0].samples] == ["Stück.png"] * 2


def test_missing_image_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "cats/2.png", "dogs/1.png")
    write_jsonl(tmp_path / "train.jsonl", row("cats/1.png"), row("cats/2.png"))
    write_jsonl(tmp_path / "test.jsonl", row("dogs/1.png"))
    for splits in (("train",), ("train", "test")):
        with pytest.raises(
            DataError, match=r"train: 1 of 2 images are not in .*: cats/1\.png\. Point --images .*--skip"
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
    assert missing(tmp_path / "alone") == ["cats/1.png"], "nor where the folder alone tells that it is another"
    write_jsonl(tmp_path / "twice" / "train.jsonl", row("1.png"), here)
    pictures(tmp_path / "twice", "a/1.png", "b/1.png")
    assert missing(tmp_path / "twice") == ["1.png"], "nor from one of two"


def test_missing_and_broken_images_are_named_and_skipped_on_request(tmp_path: Path) -> None:
    good = write_image(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:40])
    rows = {name: entry(file_name=f"{name}.png", positive=f"a {name} one") for name in ("good", "cut", "gone")}
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
def test_images_of_one_name_in_several_folders_are_distinct(fdrd: bool, tmp_path: Path) -> None:
    places = [f"/home/me/data/{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)]
    if fdrd:
        entries = {place: {"file_name": Path(place).name, "file_path": place, "positive": "a pet"} for place in places}
        (tmp_path / "train.json").write_text(json.dumps(entries))
    else:
        write_jsonl(tmp_path / "train.jsonl", *(row(place, caption="a pet") for place in places))
    write_jsonl(tmp_path / "val.jsonl", row("other.png"))
    assert [sample.image for sample in read(tmp_path)[0].samples] == places
    pictures(tmp_path, *(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)))
    assert [sample.image for sample in Annotations(tmp_path).load("train")[0].samples] == [
        place.removeprefix("/home/me/data/") for place in places
    ]


def test_images_in_two_splits_are_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "img/a.png", "img/b.png")
    write_jsonl(tmp_path / "train.jsonl", row("img/a.png"), row("img/b.png"))
    write_jsonl(tmp_path / "val.jsonl", row("img/b.png"))
    write_jsonl(tmp_path / "test.jsonl", row("a.png", caption="spelled otherwise"))
    _, reports = check_dataset(tmp_path)
    assert reports["val"].names["images that train has too, so val measures nothing new"] == ["img/b.png"]
    assert reports["test"].names["images that train has too, so test measures nothing new"] == ["img/a.png"]


def test_caption_of_exactly_the_context_is_not_cut(tmp_path: Path) -> None:
    rows = [{"image": f"{words}.jpg", "caption": "a " * words, "split": "train"} for words in (5, 6)]
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    for report in check_dataset(tmp_path, decode_images=False, context=7)[1].values():
        assert report.counts["captions longer than the context's 7 tokens, cut"] == 1
