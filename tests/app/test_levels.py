"""Levels of results: by the calibrated cut-off, by words, and where nothing can be judged."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.api.schemas import SearchResponse
from app.search.plan import Plan
from app.search.query import Level, Query
from app.search.ranking.levels import find_levels
from app.search.ranking.rank import RankedRow
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.service import opened

PLAN = Plan(Query(query="weinende Katze"), is_judged=True)


def artifact(known: float = 1.0, **cutoff: float) -> Any:
    lexical = SimpleNamespace(known_share=lambda _: known)
    return SimpleNamespace(manifest=SimpleNamespace(cutoff=cutoff), lexical=lexical)


def rows(*scores: float | tuple[float, float]) -> list[RankedRow]:
    pairs = [each if isinstance(each, tuple) else (each, None) for each in scores]
    return [RankedRow(row, score, text_score=text) for row, (score, text) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("known", "scores", "expected"),
    [
        (1.0, [0.3, 0.2, 0.1999], ["likely", "likely", "unlikely"]),
        (1.0, [0.1], ["unlikely"]),
        (1.0, [(0.1, 0.6), (0.1, 0.59)], ["likely", "unlikely"]),
        (0.4, [0.3, 0.1], ["possible", "unlikely"]),  # words that no item has
        (0.4, [(0.3, 0.4), (0.3, 0.1)], ["likely", "possible"]),
        (0.4, [0.5, 0.3, 0.1], ["likely", "likely", "unlikely"]),  # a strong score outweighs unknown words
    ],
)
def test_levels_follow_from_cutoff_and_words(known: float, scores: list[Any], expected: list[Level]) -> None:
    ranked = rows(*scores)
    levels = find_levels(artifact(known, min_score=0.2, strong_score=0.4), PLAN, ranked)
    assert [levels.of(each) for each in ranked] == expected
    assert levels.none_fits(ranked) == ("likely" not in expected)


def test_without_a_cutoff_nothing_is_judged() -> None:
    ranked = rows(0.3, -0.1)
    other = Plan(Query(query="cat", without="tears"))
    for where, plan in ((artifact(), PLAN), (artifact(min_score=0.2, strong_score=0.4), other)):
        levels = find_levels(where, plan, ranked)
        assert [levels.of(each) for each in ranked] == ["possible", "possible"]
        assert (levels.cutoff, levels.none_fits(ranked)) == (None, False)


@pytest.mark.slow
async def test_responses_tell_levels_and_the_cutoff(tiny_data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    rebuild(tiny_data, tiny_checkpoint, index, workers=0, progress=False, validation=tiny_data)
    async with opened(index) as client:
        (collection,) = (await client.get("/collections")).json()["collections"]
        body = (await client.post("/search/text", json={"query": "a red circle", "k": 24})).json()
        SearchResponse.model_validate(body, strict=True)
        assert body["cutoff"] == collection["min_score"]
        for result in body["results"]:
            assert result["level"] == ("likely" if result["score"] >= body["cutoff"] else "unlikely")
        assert body["nothing_fits"] == all(result["level"] == "unlikely" for result in body["results"])
        page = (await client.post("/search/text", json={"query": "a red circle", "k": 4, "offset": 20})).json()
        assert [each["level"] for each in page["results"]] == [each["level"] for each in body["results"][20:]]
        assert page["nothing_fits"] == body["nothing_fits"]
        by_image = (await client.post("/search/image", files={"file": png()})).json()
        assert {each["level"] for each in by_image["results"]} == {"possible"}
        assert "cutoff" not in by_image
        assert not by_image["nothing_fits"]
        equal = {
            "query": "a blue circle",
            "without": "red",
            "weights": {"without": 0},
        }  # as the text alone
        assert "cutoff" not in (await client.post("/search/text", json=equal)).json()
        assert "cutoff" in (await client.post("/search/text", json={"query": "a blue circle"})).json()
