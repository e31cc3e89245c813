"""FDRD's annotations, repairs of every form, images found for them, and splits without leaks."""

import errno
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcar_core.data import Annotations, CleaningReport, Dataset, Sample, check_dataset, write_splits
from dcar_core.data.entries import SKIPPED_ROWS
from dcar_core.util.errors import DataError
from tests.support.files import write_json, write_jsonl
from tests.support.images import write_image


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


def test_older_fdrd_annotations_are_read(tmp_path: Path) -> None:
    content = {
        "Maine_Coon_12": older("Maine_Coon_12", negative=["A CAT,  maine_coon_12", "a dog", "A dog", "a bird"]),
        "Maine_Coon_13": older("Maine_Coon_13", positive=" a  cat "),
        "707-320_0001": older("0001", positive="An airplane.The sky is blue."),
        "monkshood_image_06": older("monkshood_image_06", positive="A monks_hood.", class_name="monks_hood"),
    }
    data, report = read(write_json(tmp_path / "pets_train.json", content))
    images = ["Maine_Coon_12.jpg", "Maine_Coon_13.jpg", "0001.jpg", "monkshood_image_06.jpg"]
    assert [s.image for s in data.samples] == images
    assert [s.category for s in data.samples] == ["Maine Coon", "Maine Coon", "707-320", "monks hood"]
    assert data.samples[0].negatives == ("a dog", "a bird")
    assert [s.caption for s in data.samples[1:3]] == ["a cat", "An airplane. The sky is blue."]
    assert report.counts == {
        "absolute paths of another machine, replaced by the image root": 4,
        "file names without a suffix": 4,
        "categories derived from the key": 3,
        "negatives equal to a caption or an attribute of their image, left out": 1,
        "negatives that occur twice for one caption, left out once": 1,
        "pairs without a negative": 3,
        "captions with stray white space, repaired": 1,
        "captions with sentences that touch, repaired": 1,
        "captions with an underscore, kept as written": 2,
    }


RED, VAN = "a red car", ("a van",)


@pytest.mark.parametrize(
    ("rows", "pairs", "told"),
    [
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
                "placeholder paths, replaced by the image root": 3,
                "pairs without a negative": 2,
                "captions that another image has too (positives of each other in training)": 2,
            },
        ),
        (
            [
                {"image": "1.png", "caption": "So red.The car.", "attributes": ["Red"],
                 "negatives": ["A blue van.", "A fast car.", "red", "So red.The car."]},
                {"image": "1.png", "caption": "A fast car."},
                {"image": "2.png", "caption": "A blue van."},
            ],
            [
                Sample("1.png", "So red. The car.", "", "", ("A blue van.",), (), ("Red",)),
                Sample("1.png", "A fast car."), Sample("2.png", "A blue van."),
            ],
            {"negatives equal to a caption or an attribute of their image, left out": 3},
        ),
        (
            {"a": entry(negative=["a van", "a bus"], negative_class=["van"])},
            [Sample("a.png", RED, "car", "", ("a van", "a bus"))],
            {"entries whose negatives and negative categories differ in number, categories left out": 1},
        ),
        (
            {
                f"{n}": entry(file_name=f"{n}.png", attributes=value)
                for n, value in enumerate([{"colour": "red"}, "red", 3, ["red", 3], None])
            },
            [Sample(f"{n}.png", RED, "car", "", VAN) for n in range(5)],
            {SKIPPED_ROWS: 0},
        ),
        (
            [row("a.png", category=0), row("b.png", category=float("nan")), row("c.png", class_name=0.5)],
            [Sample(f"{n}.png", f"a picture, {n}.png", kind) for n, kind in (("a", "0"), ("b", ""), ("c", "0.5"))],
            {},
        ),
    ],
)  # fmt: skip
def test_fields_of_many_spellings_are_read_and_what_was_repaired_is_told(
    rows: Any, pairs: list[Sample], told: dict[str, int], tmp_path: Path
) -> None:
    if isinstance(rows, dict):
        write_json(tmp_path / "train.json", rows)
    else:
        write_jsonl(tmp_path / "train.jsonl", *rows)
    data, report = read(tmp_path)
    assert data.samples == pairs
    assert {what: report.counts.get(what, 0) for what in told} == told


def test_repeated_keys_and_several_captions_are_kept(tmp_path: Path) -> None:
    two = entry(positive=["two", "Two", "", "three"], negative="One")
    content = f'{{"k": {json.dumps(entry(positive="one"))}, "k": {json.dumps(two)}}}'
    (tmp_path / "train.json").write_text(content, encoding="utf-8-sig")
    data, report = read(tmp_path)
    assert [(s.image, s.caption) for s in data.samples] == [("a.png", text) for text in ("one", "two", "three")]
    assert report.counts["keys that occur twice, both entries kept"] == 1
    assert report.counts["pairs that occur twice, left out once"] == 1
    assert report.names["empty captions, left out"] == ["a.png"]


def test_metadata_survives_reading_writing_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    more = {"meta_category": "vehicles", "negative_class": ["van", "truck"], "negative": ["a red van", "a red truck"]}
    more["attributes"] = ["red", "vintage"]
    write_json(tmp_path / "fdrd" / "train.json", {"a": entry(**more)})
    write_jsonl(
        tmp_path / "rows" / "train.jsonl", {"image": ".\\a.png", "caption": "a red car", "class_name": "car", **more}
    )
    data, rows = (Annotations(tmp_path / form, tmp_path).load("train")[0] for form in ("fdrd", "rows"))
    wanted = Sample(
        "a.png", "a red car", "car", "vehicles", ("a red van", "a red truck"), ("van", "truck"), ("red", "vintage")
    )
    assert data.samples == rows.samples == [wanted]
    sync, left = os.fsync, iter([True, True])  # the file and the directory of the first split

    def sync_or_fail(descriptor: int) -> None:
        if not next(left, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync_or_fail)
        with pytest.raises(OSError, match="No space left"):
            write_splits({"train": data, "val": data}, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write_splits({"train": data, "val": data}, tmp_path / "out")
    assert Annotations(tmp_path / "out", tmp_path).load("val")[0].samples == data.samples


def test_other_spellings_of_names_and_categories_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "Stück.png")
    decomposed = unicodedata.normalize("NFD", "Stück.png")
    rows = (
        {"image": decomposed, "caption": "a piece", "category": "Part"},
        {"image": "Stück.png", "caption": "one more"},
    )
    write_jsonl(tmp_path / "train.jsonl", rows[0], rows[1] | {"category": "part"})
    write_jsonl(tmp_path / "val.jsonl", rows[0])
    data, report = Annotations(tmp_path).load("train")
    assert [sample.image for sample in data.samples] == ["Stück.png"] * 2
    what = "categories written in several ways, which results and filters keep apart"
    assert report.names[what] == ["Part = part"]


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


def test_a_file_without_splits_is_divided_by_image_wherever_it_is_mounted(tmp_path: Path) -> None:
    def divided(name: str, prefix: str) -> dict[str, set[str]]:
        rows = (row(f"{prefix}{i}.png", caption=f"{word} {i}") for i in range(300) for word in ("one", "two"))
        splits, reports = Annotations(write_jsonl(tmp_path / name / "all.jsonl", *rows)).load_all(None, "ignore")
        images = {split: {image.removeprefix(prefix) for image in data.images} for split, data in splits.items()}
        told = [n for what, n in reports["val"].counts.items() if "split by a hash" in what]
        assert told == [2 * len(images["val"])]
        return images

    images = divided("relative", "")
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
    held = 2 * len(images["val"])
    assert reports["train"].counts["pairs held out for validation, as the data has no val split"] == held
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


def test_files_that_another_form_hides_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "pairs.json", {"a": entry()})
    assert not read(tmp_path)[1].names
    (tmp_path / "pairs.csv").write_text("image,caption,split\n1.png,one,train\n2.png,two,val\n")
    write_jsonl(tmp_path / "valid.jsonl", {"image": "3.png", "caption": "three"})
    _, reports = Annotations(tmp_path).load_all(None, "ignore")
    what = "files of annotations that are not read, as another one comes first"
    assert {split: report.names[what] for split, report in reports.items()} == {
        "train": ["pairs.json"],
        "val": ["pairs.csv", "pairs.json"],
    }


@pytest.mark.parametrize("place", ["Maine_Coon_12.jpg", "pets/images/Maine_Coon_12.jpg", "deep/er/Maine_Coon_12.jpg"])
def test_images_are_found_below_another_root(tmp_path: Path, place: str) -> None:
    file = write_json(tmp_path / "train.json", {"Maine_Coon_12": older("Maine_Coon_12")})
    write_image(tmp_path / "photos" / place)
    data, _ = Annotations(file, tmp_path / "photos").load("train")
    assert data.samples[0].image == place
    assert data.read(data.samples[0].image)


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
        return check_dataset(path)[1]["train"].names["images missing"]

    assert missing(tmp_path) == ["cats/1.png"]
    pictures(tmp_path, "1.png")
    assert missing(tmp_path) == ["cats/1.png"], "nor from above the folders"
    write_jsonl(tmp_path / "alone" / "train.jsonl", row("cats/1.png"))
    pictures(tmp_path / "alone", "cats/2.png", "dogs/1.png")
    assert missing(tmp_path / "alone") == ["cats/1.png"], "nor where the folder alone tells that it is another"
    write_jsonl(tmp_path / "twice" / "train.jsonl", row("1.png"))
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
    assert report.names["images missing, left out"] == ["gone.png"]
    [broken] = report.names["images broken, left out"]
    assert broken.startswith("cut.png (")
    assert "gone.png" in str(report)
    good.unlink()
    with pytest.raises(DataError, match="no train pairs that can be used"):
        Annotations(tmp_path).load("train", "skip")


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


def test_images_in_two_splits_are_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "img/a.png", "img/b.png")
    write_jsonl(tmp_path / "train.jsonl", row("img/a.png"), row("img/b.png"))
    write_jsonl(tmp_path / "val.jsonl", row("img/b.png"))
    write_jsonl(tmp_path / "test.jsonl", row("a.png", caption="spelled otherwise"))
    _, reports = Annotations(tmp_path).load_all()
    assert reports["val"].names["images that train has too, so val measures nothing new"] == ["img/b.png"]
    assert reports["test"].names["images that train has too, so test measures nothing new"] == ["img/a.png"]
    assert "images that train has too" in str(check_dataset(tmp_path)[1]["val"])


def test_caption_of_exactly_the_context_is_not_cut(tmp_path: Path) -> None:
    rows = [{"image": f"{words}.jpg", "caption": "a " * words, "split": "train"} for words in (5, 6)]
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    for report in check_dataset(tmp_path, decode_images=False, context=7)[1].values():
        assert report.counts["captions longer than the context's 7 tokens, cut"] == 1
