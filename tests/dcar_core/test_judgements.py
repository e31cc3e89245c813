"""Judged lists: what is read, what is refused and how, and measures equal to those of ir-measures."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from dcar_core.data.judgements import JudgedList, read_judgements, trec_id
from dcar_core.util.errors import DataError
from dcar_core.util.retrieval_metrics import graded_measures
from tests.support.parts import needs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_tables_and_qrels_hold_the_same_list(tmp_path: Path) -> None:
    rows = [
        ("q1", "red shoe", "a b.png", 3, "word"),
        ("q1", "red shoe", "1%20.png", 0, "word"),
        ("q 2", "é", "c", 1, ""),
    ]
    names = "query_id", "query", "item_id", "grade", "class"
    table = "".join(",".join(map(str, row)) + "\n" for row in [names, *rows])
    judged = read_judgements([write(tmp_path / "list.csv", table)])
    assert judged.texts == {"q1": "red shoe", "q 2": "é"}
    assert judged.grades == {"q1": {"a b.png": 3, "1%20.png": 0}, "q 2": {"c": 1}}
    assert judged.classes == {"q1": "word"}
    lines = "".join(json.dumps(dict(zip(names, row, strict=True)) | {"source": "clicks"}) + "\n" for row in rows)
    assert read_judgements([write(tmp_path / "list.jsonl", lines)]) == judged
    qrels = write(tmp_path / "qrels.txt", judged.to_qrels())
    assert qrels.read_text() == "q1 0 a%20b.png 3\nq1 0 1%2520.png 0\nq%202 0 c 1\n"
    texts = "".join(f"{trec_id(query_id)}\t{text}\n" for query_id, text in judged.texts.items())
    found = read_judgements([qrels], write(tmp_path / "queries.tsv", texts))
    assert (found.texts, found.grades, found.classes) == (judged.texts, judged.grades, {})


def test_lists_are_joined_and_a_query_without_an_id_has_its_text(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "query,item_id,grade\nred shoe,a,2.0\nred shoe,a,2\n")
    other = write(tmp_path / "other.jsonl", '{"query": "red shoe", "item_id": 7, "grade": 0}\n')
    assert read_judgements([one, other]).grades == {"red shoe": {"a": 2, "7": 0}}


def test_every_bad_row_is_told_with_its_line_and_field(tmp_path: Path) -> None:
    table = write(
        tmp_path / "list.csv",
        "query_id,query,item_id,grade\nq1,red,a,4\nq1,,a,1\nq1,red,,1\nq1,red,b,?\nq1,red,c,1\nq1,red,c,2\nq1,blue,d,1\nq1,red,e,1,9\n",
    )
    with pytest.raises(DataError) as caught:
        read_judgements([table])
    assert [line.removeprefix(f"{table}, ") for line in str(caught.value).splitlines()] == [
        "line 2: field 'grade' must be 0, 1, 2 or 3, not '4'; correct or remove it",
        "line 3: field 'query' is missing or empty; the row has query_id, item_id, grade; "
        "texts of qrels are in --queries FILE",
        "line 4: field 'item_id' is missing or empty; the row has query_id, query, grade",
        "line 5: field 'grade' must be 0, 1, 2 or 3, not '?'; correct or remove it",
        "line 7: field 'grade' is 2, but 'c' had 1 for this query; remove one",
        "line 8: query_id 'q1' is of 'blue' here, of 'red' before; rename one",
        "line 9: more cells than the header has columns; quote a text that has ','",
    ]
    many = write(tmp_path / "many.csv", "query,item_id,grade\n" + "red,a,x\n" * 50)
    with pytest.raises(DataError, match=r"line 21: .*\n30 more rows cannot be used$"):
        read_judgements([many])


def test_rows_with_an_empty_grade_do_not_count(tmp_path: Path) -> None:
    table = write(tmp_path / "list.csv", "query,item_id,grade\nred,a,\nred,b,2\nblue,a, \n")
    lines = write(tmp_path / "list.jsonl", '{"query": "red", "item_id": "c", "grade": null}\n')
    judged = read_judgements([table, lines])
    assert (judged.texts, judged.grades) == ({"red": "red"}, {"red": {"b": 2}})
    with pytest.raises(DataError, match="line 2: field 'grade' is missing or empty; the row has query, item_id"):
        read_judgements([write(tmp_path / "other.csv", "query,item_id,rating\nred,a,\n")])


def test_bad_qrels_and_empty_lists_say_what_to_do(tmp_path: Path) -> None:
    queries = write(tmp_path / "queries.tsv", "q1\tred\nq2 blue\n")
    qrels = write(tmp_path / "qrels.txt", "q1 0 a 1\n\nq1 a 1\nq2 0 a 1\nq1 0 b -1\nq1 Q0 c 1 9.5 run\n")
    with pytest.raises(DataError) as caught:
        read_judgements([qrels], queries)
    hint = "texts of qrels are in --queries FILE"
    assert [line.partition(", ")[2] for line in str(caught.value).splitlines()] == [
        "line 3: field 'grade' is missing or empty; the row has query_id, query, item_id",
        f"line 4: field 'query' is missing or empty; the row has query_id, item_id, grade; {hint}",
        "line 5: field 'grade' must be 0, 1, 2 or 3, not '-1'; correct or remove it",
        "line 6: field 'grade' must be 0, 1, 2 or 3, not '1 9.5 run'; correct or remove it",
    ]
    with pytest.raises(DataError, match=hint):
        read_judgements([qrels])
    with pytest.raises(DataError, match="has no judgement"):
        read_judgements([write(tmp_path / "empty.csv", "query,item_id,grade\n")])


@needs("ir-measures")
@pytest.mark.parametrize("seed", range(4))
def test_measures_equal_those_of_ir_measures(seed: int) -> None:
    """On random lists: few or many judgements, queries without a relevant item, short results, unjudged ones."""
    tools = importlib.import_module("ir_measures")
    rng = np.random.default_rng(seed)
    judged, run, found = JudgedList(), list[object](), np.zeros((40, 10), np.int64)
    for query in range(40):
        items = rng.permutation(60)
        for item in items[: rng.integers(1, 50)]:
            judged.add({"query": f"q{query}", "item_id": f"i{item}", "grade": int(rng.integers(0, 1 + query % 4))}, "")
        for place, item in enumerate(rng.permutation(items[:50])[: rng.integers(0, 11)]):
            run.append(tools.ScoredDoc(f"q{query}", f"i{item}", 10.0 - place))
            found[query, place] = judged.grades[f"q{query}"].get(f"i{item}", 0)
    own = graded_measures(found, [np.array([*graded.values()]) for graded in judged.grades.values()])
    qrels = [
        tools.Qrel(query, item, grade) for query, graded in judged.grades.items() for item, grade in graded.items()
    ]
    measures = {"nDCG@10": tools.nDCG @ 10, "MRR@10": tools.RR @ 10, "recall@10": tools.R @ 10}
    theirs = {(each.query_id, str(each.measure)): each.value for each in tools.iter_calc(measures.values(), qrels, run)}
    for name, measure in measures.items():
        wanted = [100 * theirs.get((query_id, str(measure)), 0) for query_id in judged.grades]
        np.testing.assert_allclose(own[name], wanted, atol=1e-9, err_msg=name)
    assert (own["nDCG@10"] == 0).any()
    assert (own["nDCG@10"] > 0).any()
