"""Recall, hard-negative accuracy and nDCG by hand, the paired bootstrap, and judged
lists.
"""

import importlib
from pathlib import Path

import numpy as np
import pytest

from dcar_core.data.judgements import JudgedList, read_judgements
from dcar_core.util import metrics
from dcar_core.util.errors import DataError
from dcar_core.util.metrics import (
    Comparison,
    Scores,
    compute_ranks,
    graded_measures,
    hard_negative_accuracy,
    recall_at_k,
    recall_of_ranks,
)
from tests.support.files import write_file, write_jsonl, write_rows
from tests.support.parts import needs


@pytest.mark.parametrize(
    ("width", "count"),
    [
        (256, 60),
        (512, 33),
        (512, 122),
    ],
)
@pytest.mark.parametrize("chunk", [37, 1024])
def test_equal_vectors_tie_at_any_position(
    width: int,
    count: int,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    one = rng.standard_normal((1, width)).astype(np.float32)
    one /= np.linalg.norm(one)
    same = np.repeat(one, count, 0)
    assert set(recall_at_k(same, same, np.arange(count)).values()) == {0.0}
    twice = rng.standard_normal((count, width)).astype(np.float32)
    twice = np.concatenate([twice, twice]) / np.linalg.norm(twice, axis=1).mean()
    found = recall_at_k(twice, twice, np.arange(2 * count))
    assert found["t2i_r1"] == 0
    assert found["i2t_r1"] == 0
    assert found["t2i_r5"] == 100
    assert hard_negative_accuracy(twice, twice, [row[None] for row in twice]) == 0


def test_nan_vectors_are_no_hits() -> None:
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(2, 20, 8)).astype(np.float32)
    assert set(
        recall_at_k(
            np.full_like(text, np.nan),
            image,
            np.arange(20),
        ).values()
    ) == {0}
    assert set(
        recall_at_k(
            text,
            np.full_like(image, np.nan),
            np.arange(20),
        ).values()
    ) == {0}
    text = np.eye(20, dtype=np.float32)
    image = np.eye(20, dtype=np.float32)
    image[0] = np.nan
    found = recall_at_k(
        text,
        image,
        np.arange(20),
        ks=(1,),
    )
    # the broken image may come before any other
    assert found == {"t2i_r1": 0, "i2t_r1": 95}


def test_recall_equals_a_hand_calculation_with_two_captions_per_image() -> None:
    image = np.eye(3, dtype=np.float32)
    text = np.array(
        [
            [1, 0, 0],
            [0.9, 0.8, 0],
            [0.1, 0.6, 0.5],
            [0, 0.9, 0.2],
        ],
        np.float32,
    )
    of = np.array([0, 1, 1, 2])
    found = recall_at_k(text, image, of, ks=(1, 2))
    assert found["t2i_r1"] == 50  # texts 0 and 2
    assert found["t2i_r2"] == 100
    # image 0 finds text 0; image 1 finds text 3, image 2 text 2
    assert round(found["i2t_r1"], 1) == 33.3
    assert found["i2t_r2"] == 100


def test_best_caption_counts_and_an_image_without_one_is_a_target_alone() -> None:
    image = np.eye(3, dtype=np.float32)
    text = np.array(
        [
            [0.6, 0, 0],
            [0.9, 0, 0],
            [0.9, 0, 0],
            [0.8, 0, 0.1],
        ],
        np.float32,
    )
    found = compute_ranks(text, image, np.array([0, 0, 0, 2]))
    assert found.described.tolist() == [0, 2]
    assert found.image.tolist() == [0, 0]
    assert found.text.tolist() == [0, 0, 0, 1]


def test_hard_negative_accuracy_and_scores_that_differ_in_the_last_bit() -> None:
    """Ties on any machine: whether a product of matrices rounds equal rows alike
    depends on its library.
    """
    below = np.nextafter(np.float32(1), np.float32(0))
    same = np.array([[1, 0], [1, 0]], np.float32)
    almost = np.array([[1, 0], [below, 0]], np.float32)
    assert set(
        recall_at_k(
            same,
            almost,
            np.arange(2),
            ks=(1,),
        ).values()
    ) == {0}
    assert hard_negative_accuracy(same, same, [almost[1:], almost[1:]]) == 0
    image = np.eye(2, dtype=np.float32)
    negatives = [np.array([[0.5, 0]], np.float32), np.array([[0, 1]], np.float32)]
    assert hard_negative_accuracy(image, image, negatives) == 50  # the second is a tie
    both = [
        np.array([[0.5, 0], [1, 0]], np.float32),
        np.array([[0, 0.5], [0, 0.6]], np.float32),
    ]
    # above one of its negatives is not above all
    assert hard_negative_accuracy(image, image, both) == 50


def scores(*rows: list[float]) -> Scores:
    """Hits of texts, and of their images where they differ; each image has one text."""
    return Scores(np.ones((2, len(rows[0]))), np.array([rows[0], rows[-1]]))


def test_hits_of_ranks_have_the_recall_of_the_ranks() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(9, 4)).astype(np.float32)
    image = rng.normal(size=(6, 4)).astype(np.float32)
    image_of_text = np.array([0, 0, 2, 2, 2, 3, 4, 4, 5])  # image 1 has no caption
    ranks = compute_ranks(text, image, image_of_text)
    found = Scores.of_ranks(ranks, image_of_text)
    assert found.queries.tolist() == [[2, 3, 1, 2, 1], [1] * 5]
    recall = recall_of_ranks(ranks)
    estimate = Comparison.of(found, found, resamples=10).model
    for measure in ("t2i_r1", "i2t_r1"):
        assert estimate[measure].value == pytest.approx(recall[measure])
    assert estimate["mean_r1"].value == pytest.approx(
        (recall["t2i_r1"] + recall["i2t_r1"]) / 2
    )


def test_a_comparison_is_the_bootstrap_of_the_mean_over_seeds_by_groups() -> None:
    """Computed here query by query: units are drawn, and all captions and images of a
    drawn unit count.
    """
    rng = np.random.default_rng(3)
    units = 12
    resamples = 50
    captions = rng.integers(1, 4, 30)
    group_of = np.sort(rng.integers(0, units, 30))
    # of two models, three seeds: the share of each image's captions that are hits
    runs = rng.random((2, 3, 30))
    sides = [
        Scores.mean(
            [
                Scores(
                    np.array([captions, np.ones(30)]),
                    np.array([captions * run, run > 0.5]),
                )
                for run in model
            ]
        )
        for model in runs
    ]
    found = Comparison.of(
        *(side.grouped(group_of) for side in sides), resamples=resamples
    )
    drawn = np.random.default_rng(0).multinomial(
        units,
        np.full(units, 1 / units),
        size=resamples,
    )
    expected = []
    for times in [np.ones(units, np.int64), *drawn]:
        images = np.repeat(np.arange(30), times[group_of])
        shares = runs.mean(1)[:, images]
        hits = (runs > 0.5).mean(1)[:, images]
        recalls = np.array(
            [np.average(shares, axis=1, weights=captions[images]), hits.mean(1)]
        )
        expected.append(100 * np.array([*recalls, recalls.mean(0)]))
    values = np.array(expected)  # [1 + R, 3, 2]
    for side, own in (
        (found.model, values[..., 0]),
        (found.baseline, values[..., 1]),
        (found.difference, values @ [1, -1]),
    ):
        ends = np.quantile(own[1:], [0.025, 0.975], axis=0)
        wanted = np.array([own[0], *ends]).T
        np.testing.assert_allclose(
            [[each.value, each.low, each.high] for each in side.values()], wanted
        )
    assert found.queries == captions.sum()
    assert found.images == 30
    assert found.resampled == units


def test_a_difference_in_words_and_against_the_other() -> None:
    better = scores([1.0] * 50)
    worse = scores([0.0] * 50)
    found = Comparison.of(better, worse, resamples=999)
    assert f"{found.gain}" == "100.0 (100.0 to 100.0)"
    assert (
        found.gain.points("of R@1", "50 pairs")
        == "+100.0 points of R@1 (95 % interval +100.0 to +100.0; 50 pairs)"
    )
    assert -found.gain == Comparison.of(worse, better, resamples=999).gain
    equal = Comparison.of(better, better, resamples=200)
    assert (-equal.gain).points() == "+0.0 points (95 % interval +0.0 to +0.0)"
    assert equal.visible == 2, "a hit of one image of 50"
    with pytest.raises(ValueError, match="not of the same queries"):
        Comparison.of(better, scores([1, 0, 1]))


def test_tables_are_joined_and_rows_with_an_empty_grade_do_not_count(
    tmp_path: Path,
) -> None:
    rows = [
        {
            "query_id": "q1",
            "query": "red shoe",
            "item_id": "a b.png",
            "grade": 3,
            "class": "word",
        },
        {
            "query_id": "q1",
            "query": "red shoe",
            "item_id": "1%20.png",
            "grade": 0,
            "class": "word",
        },
        {
            "query_id": "q 2",
            "query": "é",
            "item_id": "c",
            "grade": 1,
            "class": "",
        },
    ]
    write_rows(tmp_path / "list.csv", rows)
    judged = read_judgements([tmp_path / "list.csv"])
    assert judged.texts == {"q1": "red shoe", "q 2": "é"}
    assert judged.grades == {"q1": {"a b.png": 3, "1%20.png": 0}, "q 2": {"c": 1}}
    lines = write_jsonl(
        tmp_path / "list.jsonl", *(row | {"source": "clicks"} for row in rows)
    )
    assert read_judgements([lines]) == judged
    one = write_file(
        tmp_path / "one.csv",
        b"query,item_id,grade\nshoe,a,2.0\nshoe,a,2\nshoe,b,\nblue,a, \n",
    )
    grades: list[dict[str, object]] = [
        {"item_id": 7, "grade": 0},
        {"item_id": "c", "grade": None},
    ]
    judged = read_judgements(
        [
            one,
            write_jsonl(
                tmp_path / "other.jsonl", *(row | {"query": "shoe"} for row in grades)
            ),
        ]
    )
    assert judged.texts == {"shoe": "shoe"}
    assert judged.grades == {"shoe": {"a": 2, "7": 0}}


def test_every_bad_row_is_told_with_its_line_and_field(tmp_path: Path) -> None:
    rows = (
        b"q1,red,a,4 q1,,a,1 q1,red,,1 q1,red,b,? q1,red,c,1 q1,red,c,2 q1,blue,d,1"
        b" q1,red,e,1,9".replace(b" ", b"\n")
    )
    table = write_file(tmp_path / "list.csv", b"query_id,query,item_id,grade\n" + rows)
    with pytest.raises(DataError) as caught:
        read_judgements([table])
    assert [
        line.removeprefix(f"{table}, ") for line in str(caught.value).splitlines()
    ] == [
        "line 2: field 'grade' must be 0, 1, 2 or 3, not '4'; correct or remove it",
        (
            "line 3: field 'query' is missing or empty; the row has query_id, item_id,"
            " grade"
        ),
        (
            "line 4: field 'item_id' is missing or empty; the row has query_id, query,"
            " grade"
        ),
        "line 5: field 'grade' must be 0, 1, 2 or 3, not '?'; correct or remove it",
        "line 7: field 'grade' is 2, but 'c' had 1 for this query; remove one",
        "line 8: query_id 'q1' is of 'blue' here, of 'red' before; rename one",
        "line 9: more cells than the header has columns; quote a text that has ','",
    ]
    for content, says in (
        (
            b"query,item_id,grade\n" + b"red,a,x\n" * 50,
            r"line 21: .*\n30 more rows cannot be used$",
        ),
        (
            b"query,item_id,rating\nred,a,\n",
            "line 2: field 'grade' is missing or empty; the row has query, item_id",
        ),
        (b"query,item_id,grade\n", "has no judgement"),
    ):
        with pytest.raises(DataError, match=says):
            read_judgements([write_file(table, content)])


@needs("ir-measures")
@pytest.mark.parametrize("seed", range(4))
def test_measures_equal_those_of_ir_measures(seed: int) -> None:
    """On random lists: few or many judgements, queries without a relevant item, short
    results, unjudged ones.
    """
    tools = importlib.import_module("ir_measures")
    rng = np.random.default_rng(seed)
    judged = JudgedList()
    run = list[object]()
    found = np.zeros((40, 10), np.int64)
    for query in range(40):
        items = rng.permutation(60)
        for item in items[: rng.integers(1, 50)]:
            judged.add(
                {
                    "query": f"q{query}",
                    "item_id": f"i{item}",
                    "grade": int(rng.integers(0, 1 + query % 4)),
                },
                "",
            )
        for place, item in enumerate(
            rng.permutation(items[:50])[: rng.integers(0, 11)]
        ):
            run.append(tools.ScoredDoc(f"q{query}", f"i{item}", 10.0 - place))
            found[query, place] = judged.grades[f"q{query}"].get(f"i{item}", 0)
    own = graded_measures(
        found, [np.array([*graded.values()]) for graded in judged.grades.values()]
    )
    qrels = [
        tools.Qrel(query, item, grade)
        for query, graded in judged.grades.items()
        for item, grade in graded.items()
    ]
    measures = {
        "nDCG@10": tools.nDCG @ 10,
        "MRR@10": tools.RR @ 10,
        "recall@10": tools.R @ 10,
    }
    theirs = {
        (each.query_id, str(each.measure)): each.value
        for each in tools.iter_calc(measures.values(), qrels, run)
    }
    for name, measure in measures.items():
        wanted = [
            100 * theirs.get((query_id, str(measure)), 0) for query_id in judged.grades
        ]
        np.testing.assert_allclose(own[name], wanted, atol=1e-9, err_msg=name)
    assert (own["nDCG@10"] == 0).any()
    assert (own["nDCG@10"] > 0).any()
