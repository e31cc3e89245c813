"""Items added, replaced, changed and removed, and versions rolled back and rebuilt,
against dictionaries.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, DataError, LockedError
from index_jobs.engines.faiss import index as faiss_index
from index_jobs.gallery.metadata import read_changes
from index_jobs.index import versions
from index_jobs.index.changes import change_metadata
from index_jobs.index.filters import filter_rows, match_rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.manifest import ITEMS
from index_jobs.index.versions import (
    current_version,
    list_versions,
    open_current,
    rollback,
    verify_index,
    version_numbers,
)
from index_jobs.jobs import update as updates
from index_jobs.jobs.update import add, apply_waiting, live_gallery, remove
from index_jobs.rebuild import rebuild
from tests.support.files import write_jsonl
from tests.support.galleries import write_images
from tests.support.images import png
from tests.support.jobs import patch
from tests.support.parts import PARTS, uses_parts
from tests.support.versions import Build, publish_copy

COLORS = ("pink", "cyan", "lime", "navy")
NAMES = tuple(f"n{number}" for number in range(6))
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "caption": st.sampled_from([f"a {color} tile" for color in COLORS]),
    "price": st.sampled_from([None, 1, 2.5]),
    "tags": st.sampled_from([None, ["lime"], ["pink", "new"]]),
    "sold": st.sampled_from([None, True]),
}
CIRCLES = '{"category": "circle"}'
Fields = dict[str, Any]


def ids(index: Path) -> list[str]:
    return open_current(index).column("id").to_pylist()


def row_of(opened: IndexVersion, item_id: str) -> int:
    row = opened.row_of(item_id)
    assert row is not None
    return row


def metadata(index: Path, item_id: str) -> Fields:
    opened = open_current(index)
    return opened.item(row_of(opened, item_id)).metadata


def nearest_ids(opened: IndexVersion, vectors: np.ndarray) -> list[str]:
    return [opened.item(int(row)).id for row in opened.search(vectors, 1)[1][:, 0]]


def die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@uses_parts
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # hypothesis warns about itself
def test_any_sequence_of_changes_leaves_the_items_that_dictionaries_have(
    encoder: Encoder,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    pictures = dict(
        zip(
            COLORS,
            encoder.encode_images([png(color) for color in COLORS]),
            strict=True,
        )
    )

    class Versions(RuleBasedStateMachine):
        """An index, and the items of each of its versions: fields by id. The field
        `drawn` is the picture's colour.
        """

        def __init__(self) -> None:
            super().__init__()
            self.folder = Path(tempfile.mkdtemp(dir=tmp_path))
            self.index = self.folder / "index"
            self.versions = dict[int, dict[str, Fields]]()
            self.publish(
                {"n0": {"drawn": "pink", "caption": "a pink tile"}}, self.rebuild
            )

        @property
        def items(self) -> dict[str, Fields]:
            return self.versions[current_version(self.index) or 0]

        def publish(
            self,
            items: dict[str, Fields],
            job: Callable[[dict[str, Fields]], object],
        ) -> None:
            """Run a job that ends before it publishes, and once more."""
            served = current_version(self.index)
            with pytest.MonkeyPatch.context() as killed:
                killed.setattr(versions.NewVersion, "commit", die)
                with pytest.raises(KeyboardInterrupt):
                    job(items)
            assert current_version(self.index) == served
            job(items)
            self.versions[max(self.versions, default=0) + 1] = items
            assert current_version(self.index) == max(self.versions)

        def gallery(self, items: dict[str, Fields]) -> Path:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            for name, fields in items.items():
                (folder / f"{name}.png").write_bytes(png(fields["drawn"]))
            rows = (
                fields | {"id": name, "file_name": f"{name}.png"}
                for name, fields in items.items()
            )
            write_jsonl(folder / "metadata.jsonl", *rows)
            return folder

        def rebuild(self, items: dict[str, Fields]) -> None:
            options = {
                "workers": 0,
                "keep": 99,
                "force": True,
                "progress": False,
                "margin": 1,
                "max_vanished": 1,
            }
            rebuild(self.gallery(items), tiny_checkpoint, self.index, **options)

        @rule()
        def build(self) -> None:
            self.publish(self.items, self.rebuild)

        @rule(
            names=st.lists(
                st.sampled_from(NAMES),
                min_size=1,
                max_size=3,
                unique=True,
            ),
            color=st.sampled_from(COLORS),
        )
        def add(self, names: list[str], color: str) -> None:
            given: Fields = {
                name: {"drawn": color, "caption": f"a {color} tile", "price": 1}
                for name in names
            }
            gallery = self.gallery(given)
            options: dict[str, Any] = {
                "replicas": [encoder],
                "workers": 0,
                "keep": 99,
                "progress": False,
            }
            self.publish(
                {**self.items, **given},
                lambda _: add(self.index, gallery, replace_existing=True, **options),
            )

        @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        def remove(self, names: list[str]) -> None:
            left = {
                name: fields for name, fields in self.items.items() if name not in names
            }
            if left and {*names} <= {*self.items}:
                self.publish(left, lambda _: remove(self.index, names, keep=99))
            else:
                with pytest.raises(
                    DataError, match=r"nothing was removed|no item would be left"
                ):
                    remove(self.index, names)

        @rule(
            names=st.sets(st.sampled_from(NAMES), min_size=1),
            fields=st.fixed_dictionaries({}, optional=CHANGES),
        )
        def change(self, names: set[str], fields: Fields) -> None:
            after = {
                name: {**self.items[name], **fields} for name in names & {*self.items}
            }
            after = {
                name: {key: value for key, value in each.items() if value}
                for name, each in after.items()
            }
            if not after:
                with pytest.raises(DataError, match=r"none of the \d ids"):
                    change_metadata(
                        self.index,
                        [(name, fields) for name in names],
                        "a test",
                    )
            elif {**self.items, **after} != self.items:
                given = [(name, fields) for name in names]
                changed = {**self.items, **after}
                self.publish(
                    changed,
                    lambda _: change_metadata(self.index, given, "a test", keep=99),
                )

        @rule(data=st.data())
        def roll_back(self, data: st.DataObject) -> None:
            to = data.draw(st.sampled_from(version_numbers(self.index)))
            assert rollback(self.index, to) == to

        @rule()
        def move(self) -> None:
            self.index = self.index.rename(
                Path(tempfile.mkdtemp(dir=self.folder)) / "index"
            )

        @invariant()
        def finds_the_items(self) -> None:
            opened = open_current(self.index)
            items = self.items
            live = np.flatnonzero(opened.live).tolist()
            found = {item.id: item for item in map(opened.item, live)}
            shown = {
                name: item.metadata | {"caption": item.caption}
                for name, item in found.items()
            }
            assert shown == {
                name: fields | {"file_name": f"{name}.png"}
                for name, fields in items.items()
            }
            rows = {name: opened.row_of(name) for name in NAMES}
            assert sorted(row for row in rows.values() if row is not None) == live
            given = [items[opened.item(row).id] for row in live]
            columns = {
                name: opened.column(name, np.array(live)).to_pylist()
                for name in {*CHANGES} & {*opened.fields}
            }
            # A column stays when no item has its field any more, until a build.
            for name in CHANGES:
                wanted = [each.get(name) for each in given]
                assert columns.get(name, [None] * len(given)) == wanted
            for row in {*range(opened.rows)} - {*live}:
                with pytest.raises(IndexError, match=f"row {row} was removed"):
                    opened.item(row)
            for allowed in (None, filter_rows(opened, {})):
                lines = opened.search(
                    np.stack([*pictures.values()]),
                    len(live) + 2,
                    allowed,
                )[1].tolist()
                assert [sorted(line) for line in lines] == [[-1, -1, *live]] * len(
                    pictures
                )
            for color, vector in pictures.items():
                drawn = {rows[name] for name in items if items[name]["drawn"] == color}
                assert (
                    {*opened.search(vector[None], len(drawn))[1][0].tolist()} == drawn
                    if drawn
                    else True
                )
                told = {rows[name] for name in items if color in items[name]["caption"]}
                assert {
                    *np.flatnonzero(
                        match_rows(opened, {"caption": {"contains": color}})
                    ).tolist()
                } == told
                told |= {rows[name] for name in items if color in str(items[name])}
                assert opened.lexical is not None
                assert {
                    *opened.lexical.search(color, 99, opened.live)[1].tolist()
                } == told

        def teardown(self) -> None:
            assert [
                manifest.version for manifest in verify_index(self.index)
            ] == sorted(self.versions)
            os.umask(umask := os.umask(0))
            files = [
                path
                for folder in ("blobs", "versions")
                for path in (self.index / folder).iterdir()
            ]
            assert {path.stat().st_mode & 0o777 for path in files} == {
                0o666 & ~umask
            }, "other users may read it"

    examples = 5 if PARTS["time"].is_present else 2
    quick = settings(
        max_examples=examples,
        stateful_step_count=10,
        deadline=None,
        database=None,
        derandomize=True,
    )
    healthy = settings(
        quick,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Versions, settings=healthy)


def test_added_items_have_images_fields_and_sizes_and_stay_a_gallery(
    build: Build,
    index: Path,
    encoder: Encoder,
    tmp_path: Path,
) -> None:
    gallery = write_images(tmp_path / "one, two", "pink", "cyan", year=1999)
    before = open_current(index)
    done = add(index, gallery, progress=False)
    assert done.version == 2
    assert done.count == 26
    assert done.added == 2
    assert done.removed == 0
    assert done.failed == 0
    assert done.rebuild == ""
    opened = open_current(index)
    pictures = [
        gallery / "pink.png",
        gallery / "cyan.png",
        Path(before.manifest.root) / "circle" / "red.png",
    ]
    vectors = encoder.encode_images(pictures)
    assert nearest_ids(opened, vectors) == [
        "pink",
        "cyan",
        nearest_ids(before, vectors[2:])[0],
    ]
    assert (np.diff(opened.search(vectors, 26)[0]) <= 0).all()
    row = row_of(opened, "pink")
    np.testing.assert_allclose(opened.vectors(np.array([row])), vectors[:1], atol=1e-5)
    assert opened.image_bytes(row) == (gallery / "pink.png").read_bytes()
    assert opened.item(row).width == 48
    assert opened.item(row).height == 48
    assert opened.item(row).metadata == {
        "file_name": "pink.png",
        "color": "pink",
        "year": 1999,
    }
    assert opened.fields["year"] == "int64"
    assert opened.column("year").to_pylist() == [None] * 24 + [1999, 1999]
    remove(index, ["cyan"])
    served = open_current(index)
    build(live_gallery(served), out=tmp_path / "again")
    again = open_current(tmp_path / "again")
    rows = np.flatnonzero(served.live)
    np.testing.assert_allclose(
        again.vectors(np.arange(25)),
        served.vectors(rows),
        atol=1e-6,
    )
    assert [*map(again.item, range(25))] == [*map(served.item, rows.tolist())]


def test_a_field_of_the_index_does_not_become_text(index: Path, tmp_path: Path) -> None:
    given: Fields = {"price": 5, "tags": ["x"], "note": "7"}
    add(index, write_images(tmp_path / "typed", "pink", **given), progress=False)
    before = open_current(index).fields
    for name, value, said in (
        (
            "price",
            "5 EUR",
            (
                "the field 'price' is int64 in the index and string in .* give values"
                " of type int64"
            ),
        ),
        ("tags", "x", "the field 'tags' is list"),
        ("note", ["x"], "the field 'note' is string in the index and list"),
    ):
        gallery = write_images(
            tmp_path / name,
            "cyan",
            **(given | {name: value}),
        )
        # which would be the error if it were encoded first
        (gallery / "cyan.png").write_bytes(b"")
        with pytest.raises(DataError, match=said):
            add(index, gallery, progress=False)
    gallery = write_images(tmp_path / "csv", "lime", "navy")
    (gallery / "metadata.jsonl").unlink()
    (gallery / "metadata.csv").write_text(
        "file_name,id,price,note\nlime.png,lime,6.5,8\nnavy.png,navy,,x\n"
    )
    add(index, gallery, progress=False)
    opened = open_current(index)
    assert opened.fields == before | {"price": "double"}
    assert opened.column("price").to_pylist()[-3:] == [5.0, 6.5, None]
    assert match_rows(opened, {"price": {"gt": 5}}).sum() == 1


@pytest.mark.parametrize("kind", ["hnsw", "ivf-pq"])
@pytest.mark.slow
def test_every_kind_of_built_index_takes_updates(
    kind: str,
    build: Build,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faiss_index, "EXACT_UP_TO", 0)
    index = tmp_path / "index"
    build(kind=kind)
    built = open_current(index)
    assert built.manifest.kind != "Flat"
    names = ids(index)
    changed = write_images(tmp_path / "changed", "cyan", id=names[3])
    add(index, write_images(tmp_path / "more", "pink"), progress=False)
    assert add(index, changed, replace_existing=True, progress=False).removed == 1
    remove(index, [names[17], "pink"])
    opened = open_current(index)
    expected = sorted({*names} - {names[17]})
    vectors = encoder.encode_images(
        [changed / "cyan.png", tmp_path / "more" / "pink.png"]
    )
    assert nearest_ids(opened, vectors[:1]) == [names[3]]
    for allowed in (None, filter_rows(opened, {})):
        rows = opened.search(
            np.concatenate([vectors, built.vectors(np.arange(24))]),
            opened.rows,
            allowed,
        )[1]
        assert all(
            sorted(opened.item(row).id for row in line if row >= 0) == expected
            for line in rows.tolist()
        )


def test_additions_are_merged_and_a_rebuild_is_recommended(
    index: Path,
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ids(index)
    assert remove(index, names[:4]).rebuild == ""
    assert remove(index, names[4:5]).rebuild.startswith("5 of 24 rows are removed")
    for color, parts in (
        ("pink", [1]),
        ("cyan", [2]),
        ("lime", [3]),
        ("navy", [3, 1]),
        ("teal", [5]),
    ):
        add(
            index,
            write_images(tmp_path / color, color),
            progress=False,
            workers=0,
        )
        assert [
            addition.count for addition in open_current(index).manifest.additions
        ] == parts
    monkeypatch.setattr(versions, "ADDED_ROWS", 3)
    said = add(index, write_images(tmp_path / "gold", "gold"), progress=False).rebuild
    assert "6 of 30 items are outside the built index" in said
    monkeypatch.undo()
    change_metadata(index, [(names[9], {"stock": 1})], "stock.csv")
    assert not build(max_vanished=0.3).reused, (
        "although neither gallery nor checkpoint has changed"
    )
    opened = open_current(index)
    assert opened.manifest.count == 24
    assert opened.manifest.rebuild == ""
    assert opened.row_of("pink") is None
    assert "stock" not in opened.fields


def test_refused_updates_change_nothing(
    index: Path,
    other_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = write_images(tmp_path / "broken", "pink")
    (broken / "pink.png").write_bytes(b"")
    same = Path(open_current(index).manifest.root)
    for gallery, says in (
        (tmp_path / "nowhere", "does not exist"),
        (broken, "can be read"),
        (
            same,
            "24 of the 24 images of .* have an id that is in the index.*; --replace",
        ),
    ):
        with pytest.raises(DataError, match=says):
            add(index, gallery, progress=False)
    with FileLock(index / ".lock"), pytest.raises(LockedError):
        remove(index, ["x"])
    with pytest.raises(ArtifactError, match="holds no published index"):
        remove(tmp_path / "other", ["x"])
    # the sizes in the manifest do not tell that it has changed
    other = Encoder.load(other_checkpoint, device="cpu")
    monkeypatch.setattr(updates, "load_replicas", lambda *_, **__: [other])
    with pytest.raises(ArtifactError, match="was built by encoder"):
        add(index, write_images(tmp_path / "more", "pink"), progress=False)
    assert current_version(index) == 1
    assert version_numbers(index) == [1]


def test_commands_add_list_and_remove(index: Path, tmp_path: Path) -> None:
    gallery = write_images(tmp_path / "more", "pink", "cyan", "lime", "gold")
    assert "version 2, 28 images (4 added, 0 broken)" in run(
        "add",
        index,
        "--gallery",
        gallery,
    )
    assert "version 3, 24 images (4 removed)" in run(
        "remove",
        index,
        "pink",
        "cyan",
        "lime",
        "gold",
    )
    assert "4 items removed" in run("list", index).splitlines()[0]
    for refused in (
        ["remove", index],
        ["remove", index, "--filter", "{}"],
        ["items", index, "--filter", "[]"],
    ):
        assert run(*refused).startswith("2 ")
    both = run("remove", index, ids(index)[0], "--filter", CIRCLES)
    assert both.startswith("2 "), "it may mean all of both, or what is in both"
    with pytest.raises(DataError, match="pink"):
        run("remove", index, "pink")
    assert "version 3, 24 images (0 removed)" in run(
        "remove",
        index,
        "pink",
        "--missing-ok",
    )
    shown = [json.loads(line) for line in run("items", index)[2:].splitlines()]
    assert len(shown) == 24
    assert shown[0].keys() >= {"id", "caption", "category", "file_name"}
    some = [
        json.loads(line)
        for line in run("items", index, "--filter", CIRCLES)[2:].splitlines()
    ]
    assert some == [each for each in shown if each["category"] == "circle"]
    assert "version 4, 18 images (6 removed)" in run(
        "remove",
        index,
        "--filter",
        CIRCLES,
    )


def test_a_change_writes_the_files_of_its_items_and_words_alone(
    index: Path, tmp_path: Path
) -> None:
    add(index, write_images(tmp_path / "more", "pink", price=3, text="own"), workers=0)
    first = ids(index)[0]
    before = open_current(index)
    changes: list[tuple[str, Fields]] = [
        (first, {"price": 4.5, "caption": "a guitar", "sizes": ["S", "M"]}),
        ("pink", {"price": 2, "text": None}),
        ("unknown", {"price": 1}),
    ]
    done = change_metadata(index, changes, "prices.csv")
    assert done.version == 3
    assert done.changed == 2
    assert done.new_fields == ["sizes"]
    assert done.unknown == ["unknown"]
    after = open_current(index)
    types = before.fields | {"price": "double", "sizes": "list<item: string>"}
    assert after.fields == {
        name: kind for name, kind in types.items() if name != "text"
    }, "no item has it any more"
    written = {
        name
        for name, info in after.manifest.files.items()
        if before.manifest.files.get(name) != info
    }
    assert {name for name in written if not name.startswith("lexical/")} == {
        ITEMS,
        f"added-2/{ITEMS}",
    }
    assert list_versions(index)[-1].change == "metadata of prices.csv: 2 items changed"
    change_metadata(index, [(first, {"stock": 4})], "stock")
    last = open_current(index).manifest.files
    assert {
        name for name, info in last.items() if after.manifest.files[name] != info
    } == {ITEMS}
    assert change_metadata(index, [(first, {"stock": 4.0})], "stock").version == 4, (
        "nothing has changed"
    )


def test_wrong_changes_publish_nothing(index: Path) -> None:
    first = ids(index)[0]
    change_metadata(index, [(first, {"price": 3})], "prices")
    wrong: list[tuple[Fields, str]] = [
        ({"price": "cheap"}, "'price' is int64 in the index, not string"),
        ({"text": "x" * 70_000}, "more than 64 KiB"),
        ({"deep": json.loads("[" * 100 + "]" * 100)}, "more than 100 nested levels"),
    ]
    for fields, message in wrong:
        with pytest.raises(DataError, match=message):
            change_metadata(index, [(first, fields)], "prices.csv")
    assert version_numbers(index) == [1, 2]


def run(*given: object) -> str:
    """Run `dcar index` in this process; return its status and output."""
    result = CliRunner().invoke(
        app,
        ["index", *map(str, given)],
        catch_exceptions=False,
    )
    return f"{result.exit_code} {result.output}"


def test_update_command_merges_a_table(index: Path, tmp_path: Path) -> None:
    first, second, *_ = ids(index)
    before = metadata(index, first)
    table = tmp_path / "prices.csv"
    lines = tmp_path / "more.jsonl"
    table.write_text(
        f"id,price,brand,file_name\n{first},10.5,Acme,x.png\n{second},12,,y.png\nnew,1,,\n"
    )
    done = run("update", index, "--metadata", table)
    assert (
        done
        == f"0 {index}: version 2, 2 items changed\nnew fields: brand, price\n1 unknown"
        " id: new\n"
    )
    assert metadata(index, first) == before | {"price": 10.5, "brand": "Acme"}
    assert metadata(index, second)["price"] == 12
    assert "brand" not in metadata(index, second)
    lines.write_text(
        json.dumps({"id": first, "brand": None, "category": "tools"}) + "\n"
    )
    run("update", index, "--metadata", lines)
    opened = open_current(index)
    assert opened.item(0).category == "tools"
    assert "brand" not in opened.fields
    for position, sku in enumerate(("007", "8", "007")):
        change_metadata(index, [(ids(index)[position], {"sku": sku})], "skus")
    table.write_text("sku,price\n007,5\n9,6\n")
    done = run("update", index, "--metadata", table, "--by", "sku")
    assert done.split(": ", 1)[1] == "version 7, 2 items changed\n1 unknown sku: 9\n"
    assert [metadata(index, item)["price"] for item in ids(index)[:3]] == [5, 12, 5]
    with pytest.raises(DataError, match="no item has the field 'ean'"):
        change_metadata(
            index,
            [("1", {"price": 1})],
            "prices.csv",
            by="ean",
        )
    for name, text, said in (
        ("a.csv", "sku,price\na,1\n", r"row 2: no id; .* it has sku, price"),
        (
            "a.csv",
            "id,price\na,1\nb,2\na,3\n",
            "rows 2 and 4 both have the id 'a'; keep one",
        ),
        (
            "a.xlsx",
            "",
            r"a\.xlsx is not a table of one of the kinds \.csv, \.jsonl, \.parquet",
        ),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=said):
            list(read_changes(str(tmp_path / name)))


def test_builds_and_changes_over_http_have_histories_of_their_own(index: Path) -> None:
    first, second, *_ = ids(index)
    publish_copy(index)  # 2: another build
    for number in range(4):
        patch(index, first, stock=number)
        apply_waiting(index, keep=3)
    assert version_numbers(index) == [1, 2, 4, 5, 6], "3 is the oldest change"
    assert [each.origin for each in list_versions(index)] == [
        "",
        "",
        *["over HTTP"] * 3,
    ]
    assert metadata(index, first)["stock"] == 3
    assert rollback(index) == 5
    assert metadata(index, first)["stock"] == 2
    assert rollback(index, 2) == 2
    remove(index, [first], keep=2)
    assert version_numbers(index) == [2, 4, 5, 6, 7]
    remove(index, [second], keep=1)
    assert version_numbers(index) == [8], "nothing that was removed is left"
