"""Filters against the same conditions in plain Python, over a gallery with every type
of field.
"""

import json
import operator
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import scan
from index_jobs.index.filters import FilterError, match_column, match_rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.versions import open_current
from index_jobs.rebuild import rebuild
from tests.support.images import draw

Row = dict[str, Any]


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> IndexVersion:
    root = tmp_path_factory.mktemp("shop")
    lines: list[Row] = []
    for i in range(20):
        draw("red", "circle").save(root / f"{i}.png")
        row: Row = {
            "file_name": f"{i}.png",
            "id": f"p{i:02}",
            "caption": f"thing {i}",
            "category": "abcd"[i % 4],
        }
        row |= {
            "price": i * 1.5,
            "stock": i,
            "new": i % 3 == 0,
            "day": f"2024-01-{i + 1:02}",
        }
        row["serial"] = 2**60 + i - 10
        if i == 19:
            del row["caption"]
        row["brand"] = "" if i % 6 == 0 else "Zoe"
        if i % 5:
            row["tags"] = ["x", "y"][: i % 3]
            row["size"] = i % 4
        lines.append(row)
    (root / "metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    rebuild(
        root,
        tiny_checkpoint,
        root.parent / "shop_index",
        workers=0,
        progress=False,
    )
    return open_current(root.parent / "shop_index")


CASES: list[tuple[Row, Callable[[Row], bool]]] = [
    ({}, lambda r: True),
    ({"category": "a"}, lambda r: r["category"] == "a"),
    ({"category": ["a", "c"]}, lambda r: r["category"] in "ac"),
    (
        {"category": {"in": ["a", "c"]}, "new": True},
        lambda r: r["category"] in "ac" and r["new"],
    ),
    ({"category": {"not": ["a", "c"]}}, lambda r: r["category"] in "bd"),
    ({"category": {"not": {"not": "a"}}}, lambda r: r["category"] == "a"),
    ({"category": []}, lambda r: False),
    ({"id": ["p03", "nothing"]}, lambda r: r["id"] == "p03"),
    ({"price": {"gte": 3, "lt": 9.5}}, lambda r: 3 <= r["price"] < 9.5),
    ({"price": 3}, lambda r: r["price"] == 3),
    ({"price": [3, 2**60 + 1]}, lambda r: r["price"] == 3),  # which no float is
    ({"price": {"lt": 2**60 + 1}}, lambda r: True),
    ({"stock": {"gt": 3.5}}, lambda r: r["stock"] > 3.5),
    ({"stock": {"lte": 3, "not": 2}}, lambda r: r["stock"] <= 3 and r["stock"] != 2),
    ({"stock": [1, 2.0, 2.5]}, lambda r: r["stock"] in (1, 2)),
    ({"serial": [float(2**60), 1.5]}, lambda r: r["serial"] == 2**60),
    ({"caption": ["thing 1", "\ud800"]}, lambda r: r["id"] == "p01"),
    (
        {"day": {"gt": "2024-01-03", "lte": "2024-01-07"}},
        lambda r: "2024-01-03" < r["day"] <= "2024-01-07",
    ),
    (
        {"caption": {"contains": "NG 1"}},
        lambda r: r["stock"] == 1 or 10 <= r["stock"] < 19,
    ),
    ({"caption": {"contains": ".", "not": "thing 1"}}, lambda r: False),
    ({"tags": {"contains": "Y"}}, lambda r: "y" in r.get("tags", ())),
    (
        {"$or": [{"category": "a"}, {"stock": {"gt": 15}, "new": True}]},
        lambda r: r["category"] == "a" or (r["stock"] > 15 and r["new"]),
    ),
    (
        {
            "$or": [{"id": "p01"}, {"$or": [{"id": "p02"}, {"id": "p03"}]}],
            "stock": {"gt": 1},
        },
        lambda r: r["stock"] in (2, 3),
    ),
    ({"tags": "y"}, lambda r: "y" in r.get("tags", ())),
    ({"tags": {"not": ["y"]}}, lambda r: "y" not in r.get("tags", ())),
    ({"tags": {"gte": "y"}}, lambda r: "y" in r.get("tags", ())),
    ({"caption": None}, lambda r: r["id"] == "p19"),
    ({"caption": {"not": [None, "thing 1"]}}, lambda r: r["id"] not in ("p01", "p19")),
    ({"category": None}, lambda r: False),
    ({"size": None}, lambda r: "size" not in r),
    ({"size": {"not": None}}, lambda r: "size" in r),
    ({"size": [None, 3]}, lambda r: r.get("size", 3) == 3),
    ({"size": {"lt": 2}}, lambda r: r.get("size", 9) < 2),
    ({"stock": {"lt": 10**30}}, lambda r: True),
    ({"stock": [10**400, 3]}, lambda r: r["stock"] == 3),
    ({"price": {"gt": -(10**400)}}, lambda r: True),
    ({"caption": {"gte": ""}}, lambda r: r["id"] != "p19"),
    ({"caption": {"not": {"lt": "z"}}}, lambda r: r["id"] == "p19"),
    ({"caption": {"contains": ""}}, lambda r: r["id"] != "p19"),
    ({"brand": {"lt": "A"}}, lambda r: r["brand"] == ""),
    ({"tags": {"gt": "x", "lt": "y"}}, lambda r: False),
    ({"tags": {"gt": "w", "lt": "y"}}, lambda r: "x" in r.get("tags", ())),
]


# mutmut collects twice in one process, and pytest then escapes a backslash in a name
# twice.
@pytest.mark.parametrize(
    ("filter", "wanted"),
    CASES,
    ids=[json.dumps(case[0]).replace("\\", "") for case in CASES],
)
def test_filters_match_conditions_in_python(
    shop: IndexVersion,
    filter: Row,
    wanted: Callable[[Row], bool],
) -> None:
    items = [shop.item(row) for row in range(shop.rows)]
    rows = [
        {"id": item.id, "category": item.category} | item.metadata for item in items
    ]
    assert match_rows(shop, filter).tolist() == [wanted(row) for row in rows]


@pytest.mark.parametrize(
    ("filter", "field", "said"),
    [
        ({"colour": "red"}, "colour", "there are: brand, caption, category"),
        ({"price": "cheap"}, "price", "values are numbers"),
        ({"stock": True}, "stock", "values are whole numbers"),
        ({"new": 1}, "new", "values are true or false"),
        ({"category": 1}, "category", "values are texts"),
        ({"category": {}}, "category", "empty"),
        ({"category": {"like": "a"}}, "category", "unknown operator 'like'; use"),
        ({"category": {"in": "a"}}, "category", "list"),
        ({"price": {"gt": None}}, "price", "'gt' takes"),
        ({"price": {"gt": [1]}}, "price", "values are numbers"),
        ({"new": {"gt": False}}, "new", "'gt' takes"),
        ({"price": {"not": {"gt": {}}}}, "price", "values are numbers"),
        ({"price": {"contains": "1"}}, "price", "field of texts"),
        ({"caption": {"contains": 1}}, "caption", "takes a text"),
        ({"caption": {"contains": "x" * 257}}, "caption", "at most 256 characters"),
        ({"$or": {"price": 1}}, "$or", "list of filters"),
        ({"$or": []}, "$or", "list of filters"),
        ({"$or": [{}] * 65}, "$or", "at most 64 conditions"),
        (
            {
                "$or": (
                    [
                        {
                            "$or": [
                                {"price": {"gt": 1, "not": {"lt": n}}} for n in range(9)
                            ]
                        }
                    ]
                    * 4
                )
            },
            "price",
            "at most 64",
        ),
        (
            {"$or": [{"price": 1}, {"colour": "red"}]},
            "colour",
            "there are: brand, caption, category",
        ),
    ],
)
def test_conditions_that_do_not_fit_the_field_are_named(
    shop: IndexVersion,
    filter: Row,
    field: str,
    said: str,
) -> None:
    with pytest.raises(FilterError) as caught:
        match_rows(shop, filter)
    assert caught.value.field == field
    assert said in caught.value.message
    assert str(caught.value) == f"{field}: {caught.value.message}"


@pytest.mark.parametrize(
    ("field", "none"),
    [
        ("caption", True),
        ("category", True),
        ("color", False),
    ],
)
def test_empty_caption_or_category_counts_as_missing(field: str, none: bool) -> None:
    column = pa.chunked_array([["a", "", None]], pa.string())
    assert match_column(column, None, field).tolist() == [False, none, True]


@pytest.mark.parametrize(
    "bound",
    [
        -2.5,
        -0.0,
        0.5,
        2.5,
        1e300,
        -1e300,
        float("inf"),
        float("nan"),
        10**30,
        -(2**63),
    ],
)
def test_fractions_and_huge_numbers_compare_with_whole_numbers(bound: float) -> None:
    whole = [-(2**63), -3, -2, -1, 0, 1, 2, 3, 2**63 - 1]
    column = pa.chunked_array([[*whole, None]], pa.int64())
    for name, holds in (
        ("gt", operator.gt),
        ("gte", operator.ge),
        ("lt", operator.lt),
        ("lte", operator.le),
    ):
        assert match_column(column, {name: bound}, "n").tolist() == [
            *(holds(value, bound) for value in whole),
            False,
        ]
    assert match_column(column, [bound, 0.25], "n").tolist() == [
        *(value == bound for value in whole),
        False,
    ]


bounded = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a", "x"])
)
names = st.sampled_from(["in", "not", "contains", "gt", "gte", "lt", "lte"]) | st.text(
    max_size=3
)
conditions = st.recursive(
    values | st.lists(values, max_size=5),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["id", "caption", "category", "price", "tags"]) | st.text(
    max_size=5
)
filters = st.recursive(
    st.dictionaries(fields, conditions, max_size=3),
    lambda inner: st.fixed_dictionaries({"$or": st.lists(inner, max_size=3) | values}),
    max_leaves=4,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # hypothesis warns about itself
def test_generated_filters_are_applied_or_refused(shop: IndexVersion) -> None:
    @bounded
    @given(filters)
    def check(filter: Row) -> None:
        with suppress(FilterError):
            mask = match_rows(shop, filter)
            assert mask.shape == (shop.rows,)
            if {*filter} <= {"id", "caption", "category"} and len(filter) == 1:
                ((field, condition),) = filter.items()
                assert (match_rows(shop, {field: {"not": condition}}) == ~mask).all()

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_generated_lists_are_read_or_refused(suffix: str, tmp_path: Path) -> None:
    columns = st.sampled_from(
        ["path", "image", "id", "caption", "captions", "price"]
    ) | st.text(max_size=5)
    cells = st.recursive(
        values,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(columns, inner, max_size=2)
        ),
    )
    row = st.dictionaries(columns, cells, max_size=4).map(
        lambda each: json.dumps(each).encode()
    )
    table = st.lists(st.text('ab,"\n;\t1é', max_size=12).map(str.encode), max_size=5)
    if suffix == ".jsonl":
        lines = st.lists(row | st.binary(max_size=30), max_size=5)
    else:
        lines = table

    @bounded
    @given(
        lines.map(b"\n".join),
        st.sampled_from([b"", b"path,caption\n", b"PAR1", b"\xef\xbb\xbf"]),
    )
    def check(content: bytes, head: bytes) -> None:
        (tmp_path / f"list{suffix}").write_bytes(head + content)
        with suppress(DataError):
            assert len(scan(tmp_path / f"list{suffix}")) > 0

    check()
