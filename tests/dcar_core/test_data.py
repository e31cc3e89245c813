"""FDRD's annotations, and repairs of the annotations of every form."""

import csv
import errno
import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from dcar_core.data import Annotations, CleaningReport, Dataset, write_splits
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


def test_newer_fdrd_annotations_are_read(tmp_path: Path) -> None:
    content = {
        "a.jpg": entry(file_name="a.jpg", class_name="Apply_Eye_Makeup", negative=[]),
        "b.jpg": entry(file_name="b.jpg", class_name="", negative=[], file_path="YOUR_IMAGE_PATH/b.jpg"),
        "v_BoxingSpeedBag_g01_c02.jpg": {k: v for k, v in entry(file_name="c.jpg").items() if k != "class_name"},
    }
    data, report = read(write_json(tmp_path / "train.json", content))
    assert [s.category for s in data.samples] == ["Apply Eye Makeup", "b", "Boxing Speed Bag"]
    assert report.counts["placeholder paths, replaced by the image root"] == 3
    assert report.counts["pairs without a negative"] == 2
    assert report.counts["captions that another image has too (positives of each other in training)"] == 2


def test_negative_that_is_true_of_the_image_is_left_out(tmp_path: Path) -> None:
    negatives = ["A blue van.", "A fast car.", "red", "This is red.The car."]
    first = {"image": "1.png", "caption": "This is red.The car.", "negatives": negatives, "attributes": ["Red"]}
    others = {"image": "1.png", "caption": "A fast car."}, {"image": "2.png", "caption": "A blue van."}
    write_jsonl(tmp_path / "train.jsonl", first, *others)
    data, report = read(tmp_path)
    assert data.samples[0].negatives == ("A blue van.",)
    assert report.counts["negatives equal to a caption or an attribute of their image, left out"] == 3


def test_negative_categories_of_another_number_are_left_out(tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", {"a": entry(negative=["a van", "a bus"], negative_class=["van"])})
    data, report = read(tmp_path)
    assert (data.samples[0].negatives, data.samples[0].negative_categories) == (("a van", "a bus"), ())
    assert report.counts["entries whose negatives and negative categories differ in number, categories left out"] == 1


def test_repeated_keys_and_several_captions_are_kept(tmp_path: Path) -> None:
    two = entry(positive=["two", "Two", "", "three"], negative="One")
    content = f'{{"k": {json.dumps(entry(positive="one"))}, "k": {json.dumps(two)}}}'
    (tmp_path / "train.json").write_text(content, encoding="utf-8-sig")
    data, report = read(tmp_path)
    assert [(s.image, s.caption) for s in data.samples] == [("a.png", text) for text in ("one", "two", "three")]
    assert report.counts["keys that occur twice, both entries kept"] == 1
    assert report.counts["pairs that occur twice, left out once"] == 1
    assert report.names["empty captions, left out"] == ["a.png"]


def test_image_metadata_survives_reading_and_writing(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    more = {"meta_category": "vehicles", "negative_class": ["van", "truck"], "negative": ["a red van", "a red truck"]}
    more["attributes"] = ["red", "vintage"]
    write_json(tmp_path / "fdrd" / "train.json", {"a": entry(positive="a red car", **more)})
    row = {"image": ".\\a.png", "caption": "a red car", "class_name": "car", **more}
    write_jsonl(tmp_path / "rows" / "train.jsonl", row)
    found = [Annotations(tmp_path / form, tmp_path).load("train")[0] for form in ("fdrd", "rows")]
    for data in found:
        (sample,) = data.samples
        assert (sample.image, sample.category, sample.meta_category) == ("a.png", "car", "vehicles")
        assert sample.negatives == ("a red van", "a red truck")
        assert sample.negative_categories == ("van", "truck")
        assert sample.attributes == ("red", "vintage")
    write_splits({"train": found[0]}, tmp_path / "out")
    assert Annotations(tmp_path / "out", tmp_path).load("train")[0].samples == found[0].samples


def test_splits_are_written_again_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "train.json", {"a": entry()})
    data, _ = read(tmp_path)
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
    assert read(tmp_path / "out", "val")[0].samples == data.samples


def test_attributes_are_a_list_of_texts_or_ignored(tmp_path: Path) -> None:
    others: list[object] = [{"colour": "red"}, "red", 3, ["red", 3], None]
    write_json(
        tmp_path / "train.json", {f"{n}": entry(file_name=f"{n}.png", attributes=a) for n, a in enumerate(others)}
    )
    rows = [("a.png", "a", "red | fast"), ("b.png", "b", "[3]"), ("c.png", "c", '["red", "two | doors"]')]
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "attributes"), *rows])
    write_json(tmp_path / "val.json", {"a": entry()})
    for split, wanted in (("train", [()] * 5), ("test", [(), (), ("red", "two | doors")])):
        data, report = read(tmp_path, split)
        assert [sample.attributes for sample in data.samples] == wanted
        assert SKIPPED_ROWS not in report.counts


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


def test_file_without_splits_is_divided_by_image(tmp_path: Path) -> None:
    rows = ({"image": f"{i}.png", "caption": f"{word} {i}"} for i in range(300) for word in ("one", "two"))
    file = write_jsonl(tmp_path / "mine.jsonl", *rows)
    splits, reports = Annotations(file).load_all(None, "ignore")
    images = {split: set(data.images) for split, data in splits.items()}
    assert sum(map(len, images.values())) == 300  # no image is in two splits
    assert len(images["train"]) > 210
    assert min(len(images["val"]), len(images["test"])) > 10
    assert [n for what, n in reports["val"].counts.items() if "split by a hash" in what] == [2 * len(images["val"])]


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
    with pytest.raises(DataError, match=r"has no val pairs; it has test"):
        read(file, "val")
    write_json(tmp_path / "pets_test.json", {"a": entry()})
    with pytest.raises(DataError, match=r"several files for test \(cars_test.json, pets_test.json\)"):
        read(tmp_path, "test")


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


def test_an_ambiguous_name_is_not_guessed(tmp_path: Path) -> None:
    file = write_json(tmp_path / "train.json", {"k": entry(file_name="1.jpg")})
    write_image(tmp_path / "a" / "1.jpg")
    write_image(tmp_path / "b" / "1.jpg")
    with pytest.raises(DataError, match=r"1 of 1 images are not in .*: 1\.jpg\. Point --images .* --skip-broken"):
        Annotations(file).load("train")


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
