"""Metadata of items changed without their vectors: merged, searched, and kept in histories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dcar_core.util.errors import DataError
from index_jobs.gallery.metadata import read_changes
from index_jobs.index.changes import change_metadata
from index_jobs.index.filters import match_rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.items import Items, write_items
from index_jobs.index.lexical.lexical_index import LexicalIndex, item_texts, replace_texts, write_lexical
from index_jobs.index.manifest import ITEMS
from index_jobs.index.publish import rollback, verify_index
from index_jobs.index.versions import list_versions, open_current, version_numbers
from index_jobs.jobs.apply import apply_waiting
from index_jobs.jobs.update import add, remove
from tests.support.commands import dcar
from tests.support.jobs import patch
from tests.support.updates import write_images
from tests.support.versions import Build, publish_copy


def ids(index: Path) -> list[str]:
    return open_current(index).column("id").to_pylist()


def metadata(artifact: IndexVersion, item_id: str) -> dict[str, Any]:
    row = artifact.row_of(item_id)
    assert row is not None
    return artifact.item(row).metadata


def test_changed_fields_are_found_and_vectors_are_shared(index: Path, tmp_path: Path) -> None:
    add(index, write_images(tmp_path / "more", "pink", price=3, text="own"), workers=0)
    before, first = open_current(index), ids(index)[0]
    changes: list[tuple[str, dict[str, Any]]] = [
        (first, {"price": 4.5, "caption": "a guitar", "sizes": ["S", "M"]}),
        ("pink", {"price": 2, "text": None}),
    ]
    summary = change_metadata(index, [*changes, ("unknown", {"price": 1})], "prices.csv")
    assert (summary.version, summary.changed, summary.new_fields) == (3, 2, ["sizes"])
    assert summary.unknown == ["unknown"]
    after = open_current(index)
    assert metadata(after, first) == metadata(before, first) | {"price": 4.5, "sizes": ["S", "M"]}
    assert "text" not in metadata(after, "pink")
    types = before.fields | {"price": "double", "sizes": "list<item: string>"}
    assert after.fields == {name: kind for name, kind in types.items() if name != "text"}, "no item has it any more"
    matches: dict[str, Any] = {"price": {"lt": 3}, "sizes": "M", "caption": "a guitar"}
    found = {name: np.flatnonzero(match_rows(after, {name: value})).tolist() for name, value in matches.items()}
    assert found == {"price": [after.row_of("pink")], "sizes": [0], "caption": [0]}
    assert after.lexical is not None
    assert after.lexical.search("guitar", 5)[1].tolist() == [0]
    assert not len(after.lexical.search("sizes", 5)[1])
    written = {name for name, info in after.manifest.files.items() if before.manifest.files.get(name) != info}
    assert {name for name in written if not name.startswith("lexical/")} == {ITEMS, f"added-2/{ITEMS}"}
    for name in after.manifest.files.keys() - written:
        assert after.manifest.files[name] == before.manifest.files[name]
    assert [each.change for each in list_versions(index)][-1] == "metadata of prices.csv: 2 items changed"
    verify_index(index)


def test_changed_numbers_leave_the_words_as_they_are(index: Path) -> None:
    before = open_current(index)
    change_metadata(index, [(ids(index)[0], {"stock": 4})], "stock")
    after = open_current(index)
    written = {name for name, info in after.manifest.files.items() if before.manifest.files.get(name) != info}
    assert written == {ITEMS}
    assert change_metadata(index, [(ids(index)[0], {"stock": 4.0})], "stock").version == 2, "nothing has changed"


def test_changed_items_are_those_that_a_build_would_write(tmp_path: Path) -> None:
    """Columns, their types and the words, with random changes; in batches of some rows."""
    generator = np.random.default_rng(0)
    values: list[list[Any]] = [[1, 2, 3.5, None], ["red", "blue", None], [["a"], ["b", "c"], None], [True, None]]

    def draw() -> dict[str, Any]:
        chosen = (options[generator.integers(len(options))] for options in values)
        return dict(zip(("price", "color", "tags", "sold"), chosen, strict=True))

    def table(records: list[dict[str, Any]]) -> pa.Table:
        count = len(records)
        texts = {name: [record.get(name, "") for record in records] for name in ("caption", "category")}
        own = [{n: v for n, v in each.items() if n not in texts and v is not None} for each in records]
        columns = {"id": [f"{i}" for i in range(count)], **texts, "location": ["x"] * count}
        columns |= {"metadata": [json.dumps(each, sort_keys=True, separators=(",", ":")) for each in own]}
        numbers = {"offset": pa.array([-1] * count), "size": pa.array([1] * count)}
        sizes = {name: pa.nulls(count, pa.int32()) for name in ("width", "height")}
        return pa.table({**columns, **numbers, **sizes})

    for trial in range(20):
        records = [draw() | {"caption": f"item {i}"} for i in range(int(generator.integers(1, 9)))]
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        write_items(folder / "before", table(records), np.arange(len(records)))
        write_lexical(folder / "patched", item_texts(table(records), None))
        items, changes = Items(folder / "before"), dict[int, dict[str, Any]]()
        for row in generator.choice(len(records), generator.integers(1, len(records) + 1), replace=False).tolist():
            given = draw() | {"caption": f"thing {row}"}
            names = generator.choice([*given], generator.integers(1, 5), replace=False).tolist()
            records[row] = records[row] | {name: given[name] for name in names}
            changes[row] = {name: value for name, value in records[row].items() if value is not None}
        items.write_changed(folder / "after", changes, {"price", "color", "tags", "sold", "caption"})
        write_items(folder / "slow", table(records), np.arange(len(records)))
        write_lexical(folder / "fresh", item_texts(table(records), None))
        after, slow = Items(folder / "after"), Items(folder / "slow")
        assert after.fields.keys() == slow.fields.keys()
        for name, kind in slow.fields.items():
            assert kind in (after.fields[name], pa.int64()), "a number keeps the wider type"
            assert after.column(name).to_pylist() == slow.column(name).to_pylist()
        assert after.table() == slow.table()
        rows = sorted(changes)
        replace_texts(folder / "patched", dict(zip(rows, item_texts(after.table(np.array(rows)), None), strict=True)))
        patched, fresh = LexicalIndex(folder / "patched"), LexicalIndex(folder / "fresh")
        for word in {word for text in item_texts(after.table(), None) for word in text.split()}:
            assert {*patched.search(word, 9)[1].tolist()} == {*fresh.search(word, 9)[1].tolist()}


def test_wrong_changes_publish_nothing(index: Path) -> None:
    first = ids(index)[0]
    change_metadata(index, [(first, {"price": 3})], "prices")
    wrong: list[tuple[list[tuple[str, dict[str, Any]]], bool, str]] = [
        ([(first, {"price": "cheap"})], False, "'price' is int64 in the index, not string"),
        ([(first, {"stock": 3}), (first, {"stock": "three"})], False, "'stock' is int64 in the index"),
        ([(first, {"prise": 3})], True, "no item has the field 'prise'"),
        ([("a", {"price": 3})], False, "none of the 1 ids of prices.csv is in the index, such as 'a'"),
        ([], False, "prices.csv has no rows"),
        ([(first, {"text": "x" * 70_000})], False, "more than 64 KiB"),
        ([(first, {"deep": json.loads("[" * 100 + "]" * 100)})], False, "more than 100 nested levels"),
    ]
    for changes, strict, message in wrong:
        with pytest.raises(DataError, match=message):
            change_metadata(index, changes, "prices.csv", strict=strict)
    assert version_numbers(index) == [1, 2]
    assert change_metadata(index, [(first, {"price": 3, "prise": None})], "prices", strict=True).version == 2


def test_update_command_merges_a_table(index: Path, tmp_path: Path) -> None:
    first, second, *_ = ids(index)
    old = metadata(open_current(index), first)["file_name"]
    table = tmp_path / "prices.csv"
    table.write_text(f"id,price,brand,file_name\n{first},10.5,Acme,x.png\n{second},12,,y.png\nnew,1,,\n")
    done = dcar("index", "update", index, "--metadata", table)
    assert done.stdout.splitlines() == [
        f"{index}: version 2, 2 items changed", "new fields: brand, price", "1 unknown id: new"
    ]  # fmt: skip
    found = metadata(open_current(index), first), metadata(open_current(index), second)
    assert (found[0]["price"], found[0]["brand"], found[0]["file_name"]) == (10.5, "Acme", old)
    assert (found[1]["price"], "brand" in found[1]) == (12, False)
    lines = tmp_path / "more.jsonl"
    lines.write_text(json.dumps({"id": first, "brand": None, "category": "tools"}) + "\n")
    dcar("index", "update", index, "--metadata", lines)
    artifact = open_current(index)
    assert (artifact.item(0).category, "brand" in artifact.fields) == ("tools", False)
    table.write_text("id,prise\n" + f"{first},1\n")
    refused = dcar("index", "update", index, "--metadata", table, "--strict")
    assert (refused.returncode, "no item has the field 'prise'" in refused.stderr) == (3, True)
    table.write_text("sku,price\na,1\n")
    with pytest.raises(DataError, match=r"row 2: no id; .* it has sku, price"):
        list(read_changes(str(table)))
    table.write_text("id,price\na,1\nb,2\na,3\n")
    with pytest.raises(DataError, match="rows 2 and 4 both have the id 'a'; keep one"):
        list(read_changes(str(table)))
    with pytest.raises(DataError, match=r"prices\.xlsx is not a table of one of the kinds \.csv, \.jsonl, \.parquet"):
        list(read_changes(str(table.with_suffix(".xlsx"))))


def test_builds_and_changes_over_http_have_histories_of_their_own(index: Path, build: Build) -> None:
    first = ids(index)[0]
    publish_copy(index)  # 2: another build
    for number in range(4):
        patch(index, first, stock=number)
        apply_waiting(index, keep=3)
    assert version_numbers(index) == [1, 2, 4, 5, 6], "3 is the oldest change"
    assert [each.origin for each in list_versions(index)] == ["", "", *["over HTTP"] * 3]
    assert metadata(open_current(index), first)["stock"] == 3
    assert rollback(index) == 5
    assert metadata(open_current(index), first)["stock"] == 2
    assert rollback(index, 2) == 2
    assert "stock" not in metadata(open_current(index), first)
    remove(index, [first], keep=2)
    assert version_numbers(index) == [2, 4, 5, 6, 7]
    remove(index, [ids(index)[1]], keep=1)
    assert version_numbers(index) == [8], "nothing that was removed is left"


def test_build_of_an_unchanged_gallery_takes_changes_back(build: Build, tmp_path: Path) -> None:
    build()
    index = tmp_path / "index"
    assert build().reused
    change_metadata(index, [(ids(index)[0], {"stock": 1})], "stock.csv")
    assert not build().reused
    assert "stock" not in open_current(index).fields
