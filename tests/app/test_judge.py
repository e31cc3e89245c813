"""`dcar judge`: versions of an index measured by a judged list, and what is not
judged.
"""

import csv
import re
import shutil
from pathlib import Path

import pytest

from app.feedback import judge
from app.search import Index
from dcar_core.data.judgements import JudgedList
from dcar_core.util.errors import DataError
from index_jobs.rebuild import rebuild
from tests.support.commands import dcar
from tests.support.parts import needs
from tests.support.service import ALICE, KEYS, ODD_ID, serving

ROWS = [
    ("q1", "a red circle", "circle/red.png", 3),
    ("q1", "a red circle", "circle/blue.png", 1),
    ("q1", "a red circle", "sold", 2),
    ("q2", "a black cross", ODD_ID, 3),
    ("q 3", "azure", "square/blue.png", 2),
    ("q 3", "azure", "circle/blue.png", 2),
    ("q 3", "azure", "cross/red.png", 0),
]


JUDGE = {"DCAR_JUDGE_KEY": ALICE}


def write(path: Path, rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("query_id", "query", "item_id", "grade"), *rows])
    return path


@pytest.fixture(scope="module")
def judged() -> JudgedList:
    found = JudgedList()
    for row in ROWS:
        found.add(
            dict(zip(("query_id", "query", "item_id", "grade"), row, strict=True)), ""
        )
    return found


@pytest.fixture(scope="module")
def versions(
    built_index: Path,
    gallery: Path,
    other_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An index whose second version is of another model."""
    index = Path(
        shutil.copytree(built_index, tmp_path_factory.mktemp("judged") / "index")
    )
    rebuild(gallery, other_checkpoint, index, workers=0, progress=False, margin=1)
    return index


def test_batches_of_texts_search_as_one_text_does(built_index: Path) -> None:
    index = Index.open(built_index, device="cpu")
    texts = [
        "a red circle",
        "red",
        "a  red circle",
        *(f"a blue square, number {number}" for number in range(62)),
    ]
    for options in ({"k": 3}, {"k": 2, "without": "red", "hybrid": 0.5}):
        for text, found in zip(texts, index.search_each(texts, **options), strict=True):
            alone = index.search(text, **options)
            pairs = [*zip(found["results"], alone["results"], strict=True)]
            assert all(one["id"] == other["id"] for one, other in pairs)
            assert [one["score"] for one, _ in pairs] == pytest.approx(
                [other["score"] for _, other in pairs], abs=1e-5
            )


def test_versions_are_measured_and_compared(versions: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "list.csv", [*ROWS])
    tables = {}
    run = tmp_path / "run.csv"
    for number in (1, 2):
        done = dcar("judge", table, "--index", versions, "--version", number)
        assert done.returncode == 0, done.stderr
        (measured,) = re.findall(
            rf"\| {versions} version {number} \| (.*) \|", done.stdout
        )
        tables[number] = [float(cell.split(" ")[0]) for cell in measured.split(" | ")]
        end = (
            f"{versions} version {number} has {tables[number][0]:.1f} points of nDCG@10"
            " over 3 queries."
        )
        assert done.stdout.splitlines()[-1] == end
    done = dcar("judge", table, "--index", versions, "--against", 1, "--run", run)
    assert done.returncode == 0, done.stderr
    (measured,) = re.findall(r"\| difference \| (.*) \|", done.stdout)
    differences = [float(cell.split(" ")[0]) for cell in measured.split(" | ")]
    assert differences == pytest.approx(
        [two - one for one, two in zip(tables[1], tables[2], strict=True)], abs=0.11
    )
    with run.open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 60
    grades = {(query_id, item): str(grade) for query_id, _, item, grade in ROWS}
    assert [row["grade"] for row in rows] == [
        grades.get((row["query_id"], row["item_id"]), "") for row in rows
    ]
    empty = sum(row["index"].endswith("2") and not row["grade"] for row in rows)
    assert f"version 2: {empty} of 30 results not judged, counted as 0" in done.stdout


def of(judged: JudgedList, **found: list[str]) -> judge.Run:
    return judge.Run("name", judged, found)


def conclusion(*runs: judge.Run) -> str:
    return judge.describe(runs, judge.compare(runs)).splitlines()[-1]


def test_a_sure_and_an_unsure_difference_are_told_in_words() -> None:
    judged = JudgedList()
    for number in range(30):
        judged.add({"query": f"q{number}", "item_id": "right", "grade": 3}, "")
    best = of(judged, **{query: ["right", "other"] for query in judged.texts})
    worse = of(judged, **{query: ["other", "right"] for query in judged.texts})
    mixed = of(
        judged,
        **{
            query: ["other", "right"] if query == "q3" else ["right"]
            for query in judged.texts
        },
    )
    sentence = (
        "Take name: it is better than name, by +36.9 points of nDCG@10 over 30 queries"
        " (95 % interval "
    )
    assert (
        conclusion(best, worse)
        == conclusion(worse, best)
        == f"{sentence}+36.9 to +36.9)."
    )
    unsure = conclusion(mixed, best)
    assert unsure.startswith(
        "Neither is certainly better: name is above name by +1.2 points of nDCG@10 over"
        " 30 queries "
    )
    assert unsure.endswith(" (95 % interval +0.0 to +3.7).")


@needs("time")
def test_a_new_index_is_compared_with_a_running_service_by_its_captions(
    built_index: Path, versions: Path
) -> None:
    """As after an upgrade: the service's release and format do not matter."""
    with serving(versions, **KEYS, rate_limit="20/second") as (_, port):
        url = f"http://127.0.0.1:{port}"
        told = {
            (number, index): dcar(
                "judge",
                "--index",
                versions,
                "--version",
                number,
                "--against",
                index,
                "--margin",
                0,
                environment=JUDGE,
            )
            for number in (1, 2)
            for index in (url, versions)
        }
        refused = dcar("judge", "--index", built_index, "--against", url)
    gone = dcar("judge", "--index", built_index, "--against", url)
    assert told[2, url].returncode == 0, told[2, url].stderr
    assert "the first 10 results of a query have 10.0 in common" in told[2, url].stdout
    worse = told[1, url]
    assert worse.stdout.replace(url, str(versions)) == told[1, versions].stdout
    assert worse.returncode == told[1, versions].returncode == 6
    assert (
        f"version 1 ranks worse than {url} version 2: nDCG@10 changed by -"
        in worse.stderr
    )
    for done, message in (
        (refused, "/search/text: status 401: "),
        (gone, "does not answer a search: "),
    ):
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr


def test_lists_and_versions_that_do_not_fit_are_told(
    versions: Path, tmp_path: Path
) -> None:
    index = Index.open(versions, device="cpu")
    judged = JudgedList()
    judged.add({"query": "red", "item_id": "elsewhere", "grade": 1}, "")
    with pytest.raises(
        DataError,
        match=r"no item of the list is in this index: elsewhere; item_id is that",
    ):
        judge.Run.of(index, "this index", judged)
    judged.add({"query": "\u200b", "item_id": "circle/red.png", "grade": 1}, "")
    with pytest.raises(DataError, match="has no words that can be searched; correct"):
        judge.Run.of(index, "this index", judged)
    empty = write(tmp_path / "empty.csv", [("q1", "red", "circle/red.png", "")])
    table = write(tmp_path / "list.csv", [*ROWS])
    for given, status, message in (
        ((empty,), 3, "empty.csv has no judgement: give rows"),
        ((table, "--version", 9), 1, "has no version 9; it has 1, 2"),
        ((table, "--against", tmp_path), 1, "holds no published index"),
        ((table, "--run", table / "run.txt"), 1, "list.csv is not a directory"),
    ):
        done = dcar("judge", *given, "--index", versions)
        assert (done.returncode, message in done.stderr) == (status, True), done.stderr
