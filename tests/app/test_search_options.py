"""Search options, alone and combined, against `Oracle`, which computes the same with
NumPy.
"""

import base64
import json
import random
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from dcar_client.models import BatchResponse, ItemsResponse
from PIL import Image

from app.search import Index
from index_jobs.jobs.update import add, remove
from index_jobs.rebuild import rebuild
from tests.support.files import write_jsonl
from tests.support.images import draw, encoded
from tests.support.oracle import Oracle
from tests.support.responses import assert_problem
from tests.support.searches import VALID
from tests.support.service import ServiceClient, opened

ITEMS = 150
ADDED = 8
REMOVED = ("item3", "item40", "item151")
LEFT = {"x": 0, "y": 0, "width": 0.5, "height": 1}
RIGHT = LEFT | {"x": 0.5}


def halves() -> Image.Image:
    image = Image.new("RGB", (80, 40), "blue")
    image.paste("red", (0, 0, 40, 40))
    return image


HALVES = encoded(halves())


def shop(folder: Path, numbers: range) -> Path:
    """Write images, some of them equal, with fields of all types, which some of them
    lack.
    """
    folder.mkdir()
    rows = list[dict[str, Any]]()
    for number in numbers:
        rng = random.Random(number)
        color = rng.choice(["red", "green", "blue", "orange"])
        shape = rng.choice(["square", "circle", "cross"])
        image = draw(color, shape)
        if number % 4:
            noise = np.random.default_rng(number).integers(
                0,
                255,
                (48, 48, 3),
                np.uint8,
            )
            image = Image.blend(
                image,
                Image.fromarray(noise),
                rng.choice([0.2, 0.5, 0.8]),
            )
        image.save(folder / f"{number}.png")
        fields = {
            "caption": rng.choice(
                [
                    "",
                    f"a {color} {shape}",
                    f"a {color} {shape}, WX-{number}",
                    f"{shape} mirror",
                ]
            ),
            "category": rng.choice(["", "cat", "dog", "Étoile"]),
            "color": color,
            "price": rng.choice([None, round(rng.gauss(20, 9), 2)]),
            "stock": rng.choice([None, -1, 0, 7, 10]),
            "brand": rng.choice([None, "", "acme", "Acme", "zeta", "été"]),
            "sale": rng.choice([None, True, False]),
            "tags": rng.choice(
                [
                    None,
                    ["a"],
                    ["b", "c"],
                    ["a", "c", "d"],
                ]
            ),
            "product": rng.choice([None, *"pqrstuvw"]),
            "story": "x" * 5000,
            "note": "".join(rng.choices("éz9Z \uffff\U0001f600'", k=3)),
        }
        row = {name: value for name, value in fields.items() if value is not None}
        rows.append({"file_name": f"{number}.png", "id": f"item{number}", **row})
    write_jsonl(folder / "metadata.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with added and removed items."""
    root = tmp_path_factory.mktemp("options")
    rebuild(
        shop(root / "shop", range(ITEMS)),
        tiny_checkpoint,
        root / "index",
        workers=0,
        progress=False,
    )
    add(
        root / "index",
        shop(root / "more", range(ITEMS, ITEMS + ADDED)),
        progress=False,
    )
    remove(root / "index", REMOVED)
    return root / "index"


@pytest.fixture(scope="module")
def searched(catalogue: Path) -> tuple[Index, Oracle]:
    index = Index.open(catalogue, device="cpu")
    return index, Oracle(index.served)


RED = "a red square"
# "top 9", "share 0.1" and "cutoff" as in `Oracle.prepare`
TABLE: list[dict[str, Any]] = [
    {"query": RED},
    {"query": "  a red\tsquare\u200b ", "k": 155},
    {"query": RED, "k": 154, "offset": 1},
    {"query": RED, "k": 7, "offset": 151},
    {"query": "x", "offset": 500},
    *(
        {"query": RED, "k": 20, "filter": filter}
        for filter in (
            {"category": "cat"},
            {"category": ["cat", "dog"], "color": "red"},
            {"category": None},
            {"brand": None},
            {"category": {"not": ["cat", None]}},
            {"brand": {"not": "acme"}},
            {"color": "pink"},
            {"sale": True},
            {"color": {"gt": "green", "lt": "purple"}},
            {"price": {"gte": 15, "lt": 25.5}},
            {"stock": {"lte": 0}},
            {"tags": "c"},
            {"tags": {"in": ["b", "d"], "not": "a"}},
            {"caption": {"contains": "wX-1"}},
            {
                "$or": [{"color": "red", "sale": False}, {"price": {"gt": 30}}],
                "stock": {"not": None},
            },
            {"id": ["item3", "item4"]},
            {},
        )
    ),
    {"query": RED, "k": 155, "min_score": "top 10"},
    {"query": RED, "min_score": 1.0},
    {"query": RED, "k": 155, "cutoff": (20, 3)},
    {
        "query": RED,
        "k": 4,
        "offset": 30,
        "cutoff": (20, 3),
    },
    {
        "query": RED,
        "k": 155,
        "cutoff": (20, 3),
        "min_score": "auto",
    },
    {"query": "zzqx blorp", "k": 155, "cutoff": (20, 3)},
    {"query": "zzqx blorp", "k": 155, "cutoff": (20, 0)},
    {
        "query": "red mirorr zzqx",
        "k": 155,
        "cutoff": (20, 0),
        "hybrid": 0.5,
    },
    {
        "query": RED,
        "k": 155,
        "cutoff": (20, 0),
        "hybrid": True,
    },
    {
        "query": RED,
        "filter": {"color": "blue"},
        "cutoff": (1, 0),
    },
    {
        "query": RED,
        "without": "blue",
        "weights": {"without": 0},
        "cutoff": (20, 3),
    },
    {"query": "a circle", "without": "  red ", "k": 50},
    {"query": "a circle", "without": "red", "weights": {"without": 0.8}},
    {
        "query": "a circle",
        "without": "red",
        "weights": {"text": 5e-5, "without": 5e-5},
    },
    {
        "query": "a circle",
        "without": "red",
        "weights": {"text": 1e-38, "without": 2.5e-39},
    },
    {"more_like": ["item5"], "k": 154},
    {"more_like": ["item5"], "k": 5, "offset": 5},
    {"more_like": ["item5", "item152"], "without": "red"},
    {"more_like": ["item5"], "group_by": "product", "k": 50},
    {
        "query": "red",
        "less_like": ["item9"],
        "group_by": "product",
        "sort": "price",
        "min_score": "top 90",
        "k": 90,
    },
    {
        "query": "red",
        "more_like": ["item5", "item8"],
        "less_like": ["item9"],
        "weights": {"more": 2, "less": 0.25},
    },
    *(
        {
            "image": HALVES,
            "k": 50,
            "cutoff": (20, 3),
            **more,
        }
        for more in (
            {},
            {"min_score": "auto"},
            {"sort": "price"},
            {"query": RED},
            {"less_like": ["item4"]},
        )
    ),
    {"image": HALVES, "cutoff": (20, 0)},
    {"image": HALVES, "crop": LEFT, "less_like": ["item4", "item8"]},
    {
        "image": HALVES,
        "query": RED,
        "weights": {"text": 3, "image": 0.5},
        "hybrid": 0.8,
    },
    {"image": HALVES, "query": "circle", "without": "red", "crop": RIGHT},
    {
        "image": HALVES,
        "query": RED,
        "weights": {"text": 0},
        "fields": ["color"],
    },
    {
        "image": HALVES,
        "sort": "-caption",
        "min_score": "top 40",
        "facets": ["color"],
        "k": 60,
    },
    {"query": "x", "k": 155, "fold": "share 0.1"},
    {"query": "x", "k": 4, "offset": 4, "fold": "share 0.3"},
    {"query": RED, "k": 155, "fold": 1.0, "hybrid": True},
    {"query": RED, "fold": "share 0.1", "sort": "price", "min_score": "top 60"},
    *(
        {"query": query, "k": 155, "hybrid": weight}
        for query, weight in product((RED, "mirorr", "WX12"), (0.05, 1.0))
    ),
    {"query": "wx 155", "hybrid": 1, "k": 1},
    {
        "query": RED,
        "without": "blue",
        "hybrid": True,
        "min_score": "top 30",
        "k": 50,
    },
    {
        "query": "red mirror",
        "hybrid": 0.7,
        "group_by": "product",
        "filter": {"sale": True},
        "k": 3,
        "offset": 3,
    },
    *(
        {"query": "x", "group_by": name, "k": 4, "offset": at}
        for name, at in product(("product", "category"), (0, 4))
    ),
    {
        "query": "x",
        "group_by": "color",
        "filter": {"category": ["cat", "dog"]},
        "facets": ["product", "color"],
    },
    {
        "query": "x",
        "group_by": "price",
        "min_score": "top 20",
        "facets": ["price", "tags"],
        "k": 50,
    },
    *(
        {
            "query": "x",
            "k": 1,
            "facets": ["category", "tags", "sale", "stock", "price", "note", "id"],
            **more,
        }
        for more in (
            {},
            {"group_by": "product"},
            {"filter": {"color": "red"}},
            {"min_score": "top 60"},
        )
    ),
    *(
        {
            "query": RED,
            "sort": sort,
            "k": 60,
            "cutoff": (50, 3),
            "facets": ["color"],
            **more,
        }
        for sort, more in product(
            ("price", "-price", "brand", "-brand", "-sale", "stock", "id"),
            ({}, {"hybrid": True, "group_by": "product"}),
        )
    ),
    {
        "query": RED,
        "sort": "-caption",
        "k": 2,
        "offset": 2,
        "min_score": "top 30",
        "cutoff": (50, 3),
    },
    {
        "query": "red mirror",
        "sort": "caption",
        "hybrid": True,
        "without": "square",
        "k": 60,
    },
    {
        "query": "zzz",
        "sort": "caption",
        "min_score": 1.0,
        "facets": ["color"],
    },
    {"query": RED, "fields": ["*"]},
    {
        "query": RED,
        "fields": ["color", "price", "id", "caption"],
        "k": 30,
    },
]


def search(searched: tuple[Index, Oracle], row: dict[str, Any]) -> None:
    index, oracle = searched
    options = oracle.prepare(row)
    oracle.check({**index.search(**options)}, **options)


@pytest.mark.parametrize(
    "row",
    TABLE,
    ids=lambda row: str(row | {"image": "halves"} if "image" in row else row),
)
def test_results_are_those_of_the_oracle(
    searched: tuple[Index, Oracle], row: dict[str, Any]
) -> None:
    search(searched, row)


@pytest.mark.parametrize("seed", range(150))
def test_combined_options_give_the_results_of_the_oracle(
    searched: tuple[Index, Oracle], seed: int
) -> None:
    draw = random.Random(seed)
    row: dict[str, Any] = {
        "query": draw.choice([RED, "blue mirror", "gohst zzz", "WX-12 circle", ""]),
        "without": draw.choice(["", "", "red"]),
        "more_like": draw.choice([(), (), ("item5",), ("item20", "item152")]),
        "less_like": draw.choice([(), (), ("item9",)]),
        "k": draw.choice([1, 5, 24, 155]),
        "offset": draw.choice([0, 0, 3, 20]),
        "min_score": draw.choice([None, "top 60"]),
        "filter": draw.choice(
            [
                None,
                None,
                {"sale": True},
                {"price": {"gt": 18}},
                {"color": {"not": ["red", "blue"]}},
            ]
        ),
        "facets": draw.choice([(), ("tags", "price", "brand")]),
        "fields": draw.choice([(), ("price",)]),
    }
    if not row["query"]:
        row["more_like"] = row["more_like"] or ("item7",)
    elif draw.random() < 0.5:
        row["hybrid"] = draw.choice([True, 0.2, 0.95])
    row |= draw.choice(
        [
            {},
            {"group_by": "product"},
            {"group_by": "brand"},
            {"fold": "share 0.05"},
        ]
    )
    if draw.random() < 0.5:
        row["cutoff"] = (draw.choice([20, 100]), draw.choice([0, 3]))
    is_text = row["query"] and not (
        row["without"] or row["more_like"] or row["less_like"]
    )
    if row["min_score"] or row.get("hybrid") or ("cutoff" in row and is_text):
        row["sort"] = draw.choice(["", "", "price", "-stock", "brand", "-sale"])
    search(searched, row)


async def test_the_service_answers_the_table_as_the_oracle(catalogue: Path) -> None:
    async with opened(catalogue, poll_s=0, deadline_ms=60_000) as http:
        oracle = Oracle(http.app.state.collections[None].current)
        for row in TABLE:
            options = oracle.prepare(row)
            plain = {**options}
            image = options.get("image")
            if image is None:
                answer = await http.post("/search/text", json=plain)
            else:
                form = {
                    name: (
                        value
                        if name in ("query", "without", "sort")
                        else json.dumps(value)
                    )
                    for name, value in plain.items()
                    if name != "image"
                }
                answer = await http.post(
                    "/search/image",
                    files={"file": image},
                    data=form,
                )
                plain["image"] = base64.b64encode(image).decode()
            batch = await http.post(
                "/search/batch", json={"queries": [{"query": "blue"}, plain]}
            )
            assert (answer.status_code, batch.status_code) == (200, 200), (
                answer.text + batch.text
            )
            VALID.validate_python(answer.json(), strict=True)
            BatchResponse.model_validate(batch.json(), strict=True)
            for body in (answer.json(), batch.json()["answers"][1]):
                oracle.check(body, **options)


async def test_listings_are_those_of_the_oracle(
    catalogue: Path, products: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"filter": {"category": ["cat"]}},
        {"sort": "price"},
        {"sort": "-price", "group_by": "product"},
        {"sort": "brand", "filter": {"price": {"gt": 20}}},
        {"group_by": "color"},
    ]
    for index, listings in (
        (catalogue, rows),
        (products, [{}, {"group_by": ""}, {"group_by": "category"}]),
    ):
        async with opened(index) as http:
            oracle = Oracle(http.app.state.collections[None].current)
            for given in listings:
                params = {
                    name: json.dumps(value) if name == "filter" else value
                    for name, value in given.items()
                }
                expected = oracle.listed(**given)
                found = list[dict[str, Any]]()
                offset = 0
                while offset is not None:
                    response = await http.get(
                        "/items", params={"k": 40, "offset": offset, **params}
                    )
                    page = response.json()
                    ItemsResponse.model_validate(page, strict=True)
                    assert page["count"] == len(expected)
                    found = found + page["items"]
                    offset = page.get("next_offset")
                assert [each["id"] for each in found] == expected, given
            response = await http.get(f"/items/{quote(found[0]['id'], safe='')}")
            one = response.json()
            item = oracle.items[oracle.row_of[found[0]["id"]]]
            found[0].pop("group", None)
            assert one == found[0] | {"index_version": page["index_version"]}
            assert one["caption"] == item.caption
            assert one["category"] == item.category
            assert one["metadata"] == item.metadata


@pytest.mark.parametrize(
    "row",
    [
        {"query": "x"},
        {"more_like": ["circle/red.png"]},
        {"query": "x", "group_by": "", "k": 24},
        {"query": "x", "fold": 1.0, "k": 24},
        {"query": "red", "hybrid": True, "sort": "-caption"},
    ],
    ids=str,
)
def test_the_group_field_of_an_index_is_the_default(
    products: Path, row: dict[str, Any]
) -> None:
    index = Index.open(products, device="cpu")
    search((index, Oracle(index.served)), row)


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"filter": {"weight": 3}}, "filter.weight"),
    ({"filter": ["red"]}, "filter"),
    *(({"filter": {"color": wrong}}, "filter.color") for wrong in (3, {"near": "red"})),
    *(({"min_score": wrong}, "min_score") for wrong in (2, -2, "high", True)),
    *(
        ({"min_score": "auto", name: ["item4"]}, "min_score")
        for name in ("more_like", "less_like")
    ),
    ({"min_score": "auto", "without": "red"}, "min_score"),
    *(({"more_like": wrong}, "more_like") for wrong in (["item3"], ["a"] * 40)),
    ({"query": "", "without": "red", "more_like": ["nothing"]}, "more_like"),
    ({"less_like": ["nothing"]}, "less_like"),
    ({"query": "", "less_like": ["item4"]}, "less_like"),
    ({"weights": {"text": 0}}, "weights"),
    ({"query": "red", "without": "red", "weights": {"without": 1}}, "weights"),
    (
        {
            "query": "",
            "more_like": ["item4"],
            "less_like": ["item4"],
            "weights": {"more": 1, "less": 1},
        },
        "weights",
    ),
    *(({"fold": wrong}, "fold") for wrong in (0, 1.5, "much")),
    ({"fields": ["colour"]}, "fields"),
    ({"crop": LEFT}, "crop"),
    *(({"hybrid": wrong}, "hybrid") for wrong in (1.5, -0.1, "yes", None)),
    ({"hybrid": True, "rerank": True}, "hybrid"),
    ({"query": "", "more_like": ["item4"], "hybrid": True}, "hybrid"),
    *(
        ({"group_by": wrong}, "group_by")
        for wrong in ("weight", "tags", "story", 7, "c" * 1025)
    ),
    ({"group_by": "color", "fold": 0.9}, "group_by"),
    *(({"facets": wrong}, "facets") for wrong in (["weight"], "color", ["color"] * 9)),
    *(({"without": wrong}, "without") for wrong in (" ", "r" * 21, 7)),
    ({"query": "", "without": "red"}, "without"),
    ({"k": 20, "offset": 181}, "offset"),
    *(
        ({"sort": wrong, "min_score": 0.1}, "sort")
        for wrong in ("weight", "-", "tags", 3)
    ),
    ({"sort": "color", "rerank": True, "min_score": 0.1}, "sort"),
    ({"sort": "color", "more_like": ["item4"]}, "sort"),
]
INVALID_IMAGES: list[tuple[dict[str, Any], str]] = [
    *(
        ({"filter": wrong}, "filter")
        for wrong in (
            "red",
            r'{"category": "\ud800"}',
            r'{"\ud800": 1}',
            '{"category": ' + "[" * 5000 + "]" * 5000 + "}",
        )
    ),
    *(
        ({"weights": wrong}, "weights")
        for wrong in (
            r'{"\udfff": 1}',
            '{"text": -1}',
            '{"text": "a"}',
            '{"colour": 1}',
            "3",
            '{"text": NaN}',
        )
    ),
    ({"query": "x", "weights": '{"text": 0, "image": 0}'}, "weights"),
    ({"without": " "}, "without"),
    *(({"min_score": wrong}, "min_score") for wrong in (r'"\ud800"', "9")),
    ({"min_score": "auto", "query": "x"}, "min_score"),
    *(
        ({"crop": json.dumps(wrong)}, field)
        for wrong, field in (
            (LEFT | {"x": 0.6}, "crop"),
            (LEFT | {"width": 0}, "crop.width"),
            (LEFT | {"x": -0.1}, "crop.x"),
            (LEFT | {"x": "0"}, "crop.x"),
            ({"x": 0, "y": 0, "width": 0.5}, "crop.height"),
            (LEFT | {"z": 1}, "crop.z"),
            ([0, 0, 1, 1], "crop"),
            ("left", "crop"),
        )
    ),
]
INVALID_LISTINGS: list[tuple[dict[str, Any], str]] = [
    ({"filter": "{"}, "filter"),
    ({"filter": "[]"}, "filter"),
    ({"filter": '{"colour": 1}'}, "filter.colour"),
    ({"k": 201}, "k"),
    ({"k": 0}, "k"),
    ({"offset": -1}, "offset"),
    ({"filters": "{}"}, "filters"),
    ({"group_by": "weight"}, "group_by"),
    *(({"sort": wrong}, "sort") for wrong in ("weight", "-", "tags")),
]
INVALID_BATCHES: list[tuple[Any, int, str]] = [
    ([], 422, "queries"),
    ([{"query": "x"}] * 5, 422, "queries"),
    ([{"query": "x"}, {"query": ""}], 422, "queries.1.query"),
    ([{"query": "x", "k": 0}], 422, "queries.0.k"),
    ([{"query": "x", "filter": {"a": 1}}], 422, "queries.0.filter.a"),
    *(
        ([{"query": "x", "sort": name}], status, "queries.0.sort")
        for name, status in (("weight", 422), ("color", 409))
    ),
    *(
        ([{"image": wrong}], status, "queries.0.image")
        for wrong, status in (
            ("no base64!", 422),
            (base64.b64encode(b"no image").decode(), 422),
            ("", 422),
            (base64.b64encode(bytes(20_001)).decode(), 413),
        )
    ),
    ([{"image": None}], 422, "queries.0.query"),
]


async def test_invalid_options_name_the_field(catalogue: Path) -> None:
    picture = {"file": HALVES}
    limits: dict[str, Any] = {
        "max_query_chars": 20,
        "max_window": 200,
        "max_queries": 4,
        "max_upload_bytes": 20_000,
    }
    async with opened(catalogue, poll_s=0, **limits) as http:
        Oracle(http.app.state.collections[None].current).change_manifest(
            cutoff={}, image_cutoff={}
        )
        for body, field in INVALID:
            problem = assert_problem(
                await http.post("/search/text", json={"query": "x", **body}), 422
            )
            assert problem["errors"][0]["field"].startswith(field), body
            if field == "fields":
                assert (
                    "available: brand, caption, category, color, file_name, id"
                    in problem["detail"]
                )
        for form, field in INVALID_IMAGES:
            problem = assert_problem(
                await http.post("/search/image", files=picture, data=form), 422
            )
            assert all(
                error["field"].startswith(field) for error in problem["errors"]
            ), form
        for params, field in INVALID_LISTINGS:
            assert_problem(await http.get("/items", params=params), 422, field)
        for queries, status, field in INVALID_BATCHES:
            assert_problem(
                await http.post("/search/batch", json={"queries": queries}),
                status,
                field,
            )
        assert_problem(await http.post("/search/batch", content=b"{}"), 415)
        for name, given in (
            ("min_score", {"min_score": "auto"}),
            ("sort", {"sort": "color"}),
        ):
            problem = assert_problem(
                await http.post("/search/text", json={"query": "x", **given}),
                409,
                name,
            )
            assert "--validation" in problem["detail"]
            problem = assert_problem(
                await http.post("/search/image", files=picture, data=given),
                409,
                name,
            )
            assert (
                "has too few images and has no calibrated cut-off" in problem["detail"]
            )
        longest = {"query": "\U0001f534" * 20, "without": "\U0001f534" * 20}
        response = await http.post("/search/text", json=longest)
        assert response.status_code == 200
        response = await http.post(
            "/search/text", json={"query": "x", "k": 80, "offset": 60}
        )
        assert "next_offset" not in response.json()


async def test_forms_repeat_lists_omit_nulls_and_know_charsets(
    started: ServiceClient,
) -> None:
    async def found(**form: Any) -> Any:
        answer = await started.post(
            "/search/image",
            files={"file": HALVES},
            data={"k": "24", **form},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["results"]

    ids = ["circle/red.png", "cross/blue.png"]
    without_ids = await found(less_like=ids)
    assert (
        without_ids
        == await found(less_like=json.dumps(ids))
        != await found(group_by="null", filter="")
    )
    assert await found(without="7") != await found()
    body = b'--b\r\nContent-Disposition: form-data; name="query"\r\n\r\nxn--a\r\n'
    body += (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="p"\r\n\r\n'
        + HALVES
        + b"\r\n--b--\r\n"
    )
    for charset, status in (
        *((codec, 400) for codec in ("idna", "undefined", "utf-7", "iso-8859-1", "")),
        *((codec, 200) for codec in ("utf-8", "UTF-8", '"utf-8"')),
    ):
        kind = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
        response = await started.post("/search/image", content=body, headers=kind)
        assert response.status_code == status, charset
        if status == 400:
            assert_problem(response, 400, "Content-Type")


async def test_crops_are_of_the_upright_image_and_cached_by_their_place(
    built_index: Path,
) -> None:
    exif = Image.Exif()
    # to be turned by 90 degrees: the upper half is the left one of the stored file
    exif[0x0112] = 6
    turned = encoded(halves().transpose(Image.Transpose.ROTATE_90), exif=exif)
    async with opened(built_index) as http:
        bodies = []
        for data, crop in (
            (halves(), LEFT),
            (halves(), LEFT),
            (halves(), None),
            (None, LEFT),
            (halves(), {"x": 0.1, "y": 0.2, "width": 1e-9, "height": 1e-9}),
        ):
            file = turned if data is None else encoded(data)
            form = {"crop": json.dumps(crop)} if crop else {}
            response = await http.post("/search/image", files={"file": file}, data=form)
            bodies.append(response.json())
        assert [body["cached"] for body in bodies[:3]] == [False, True, False]
        assert (
            bodies[0]["results"]
            == bodies[1]["results"]
            == bodies[3]["results"]
            != bodies[2]["results"]
        )
        assert bodies[4]["results"], "one pixel"


async def test_levels_follow_from_the_calibration(
    tiny_data: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    rebuild(
        tiny_data,
        tiny_checkpoint,
        tmp_path / "index",
        workers=0,
        progress=False,
        validation=tiny_data,
    )
    async with opened(tmp_path / "index") as http:
        oracle = Oracle(http.app.state.collections[None].current)
        response = await http.get("/collections")
        (collection,) = response.json()["collections"]
        assert collection["min_score"] == oracle.index.manifest.cutoff["min_score"]
        for more in ({}, {"min_score": "auto"}):
            options: dict[str, Any] = {"query": "red", "k": 24, **more}
            response = await http.post("/search/text", json=options)
            body = response.json()
            oracle.check(body, **options)
            assert (
                0
                < len(
                    [
                        result
                        for result in body["results"]
                        if result["level"] == "likely"
                    ]
                )
                < 24
            )


async def test_long_metadata_are_bounded_in_responses(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = {"query": "red", "k": 20, "fields": ["*"]}
    batch = {"queries": [query, {"query": "blue"}]}
    async with opened(built_index) as http:
        response = await http.post("/search/text", json=query)
        whole = response.json()["results"]
        monkeypatch.setattr("app.api.routing.QUICK_BYTES", 0)  # made in a thread
        monkeypatch.setattr("app.api.guard.UNCOUNTED_BYTES", 0)
        response = await http.post("/search/text", json=query)
        assert response.json()["results"] == whole
        response = await http.post("/search/batch", json=batch)
        assert response.json()["answers"][0]["results"] == whole
        http.app.state.bodies.held += 2**30
        assert_problem(await http.post("/search/text", json=query), 503)
        http.app.state.bodies.held -= 2**30
        monkeypatch.setattr("app.api.routing.QUICK_BYTES", 500)
        for module in ("api.routing", "service.retriever"):
            monkeypatch.setattr(f"app.{module}.MAX_TEXT_BYTES", 500)
        assert_problem(await http.post("/search/text", json=query), 422, "k")
        assert_problem(await http.post("/search/batch", json=batch), 422, "k")
        assert_problem(await http.get("/items", params={"k": 20}), 422, "k")
        response = await http.post("/search/text", json=query | {"k": 2})
        assert response.json()["results"] == whole[:2]


async def test_counts_of_the_best_rows_are_approximate(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(built_index) as http:
        response = await http.post("/search/text", json={"query": "red", "k": 5})
        first = response.json()["results"]
        for name in ("results.MAX_SCORED", "hits.MAX_SORTED"):
            monkeypatch.setattr(f"app.search.{name}", 5)
        query = {"query": "red", "min_score": -1.0, "facets": ["color"]}
        for options in ({}, {"sort": "caption"}):
            response = await http.post("/search/text", json=query | options)
            body = response.json()
            assert body["facets_approximate"]
            assert sum(each["count"] for each in body["facets"]["color"]) == 5
        assert body["count"] == 5
        assert body["count_approximate"] is True
        assert {result["id"] for result in body["results"]} == {
            each["id"] for each in first
        }
