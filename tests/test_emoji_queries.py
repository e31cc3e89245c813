"""The short queries of the emoji example: every one can be answered, and the figures are counted as documented."""

import json
import runpy
from typing import Any

import numpy as np
import pytest

from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "emoji"
SETS = {"validation": 303, "test": 357}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE / "evaluate_queries.py"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLE / "twemoji" / "metadata.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_query_has_answers_in_the_gallery(name: str, script: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    queries = script["read_queries"](EXAMPLE / "queries" / f"{name}.tsv", rows)
    assert len(queries) == SETS[name]
    assert {query.kind for query in queries} == {"word", "synonym", "description", "tone", "typo"}
    assert all(query.answers for query in queries)


def test_no_query_is_in_both_sets() -> None:
    texts = [
        {line.split("\t")[1].lower() for line in (EXAMPLE / "queries" / f"{name}.tsv").read_text().splitlines()}
        for name in SETS
    ]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("🎃", {"jack-o-lantern"}),
        ("%heart", {"red heart", "black heart"}),
        ("🧛*", {"vampire", "man vampire", "woman vampire"}),
        ("@🚒", {"firefighter", "man firefighter", "woman firefighter"}),
    ],
)
def test_an_answer_names_one_emoji_or_several(
    answer: str, labels: set[str], script: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    assert labels <= {row["category"] for row in rows if script["answer_test"](answer)(row)}


@pytest.mark.parametrize(("answer", "count"), [("👍", 6), ("=👍🏿", 1)])
def test_an_answer_is_right_in_any_skin_tone_unless_it_names_one(
    answer: str, count: int, script: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    assert sum(map(script["answer_test"](answer), rows)) == count


def test_figures_count_the_first_answer_the_first_five_and_all(script: dict[str, Any]) -> None:
    query = script["Query"]("word", "boat", frozenset({2, 9}))
    scores = -np.arange(20.0)[None]
    scores[0, 9] = 1  # then rows 0, 1, 2, ..
    first, five, gain = script["measure"](scores, [query])[0]
    assert (first, five) == (1, 1)
    assert gain == pytest.approx((1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))


def test_queries_that_are_a_tag_or_name_can_be_left_out(script: dict[str, Any]) -> None:
    boat, crab, sail = (script["Query"]("word", text, frozenset({0})) for text in ("Boat", "crab", "to sail"))
    rows = [
        {"category": "sailboat", "attributes": ["boat"], "caption": "sailboat"},
        {"category": "crab", "attributes": [], "caption": "crab"},
    ]
    assert script["new_texts"]([boat, crab, sail], rows) == [sail]


def test_queries_that_a_training_emoji_answers_can_be_left_out(script: dict[str, Any]) -> None:
    trained, both, unseen = (script["Query"]("word", "", frozenset(rows)) for rows in ({0}, {0, 1}, {1, 2}))
    rows = [{"split": "train"}, {"split": "val"}, {"split": "test"}]
    assert script["held_out"]([trained, both, unseen], rows) == [unseen]
