"""Live comparison: interleaving, the test that may be read at any time, and searches of clients in the share."""

from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import pytest

from app.core.settings import load_settings
from app.feedback import store
from app.feedback.compare import CANDIDATE, NEITHER, SERVED, Tally, interleave, interval
from dcar_core.util.errors import DcarError
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.responses import scrape
from tests.support.service import ADMIN_ONLY, bearer, opened, until

WORDS = "red circle"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a candidate on a busy machine take its time."""
    monkeypatch.setattr("app.feedback.compare._WAIT_S", 60.0)


def test_teams_take_turns_and_show_no_result_twice() -> None:
    for seed in range(50):
        coins = Random(seed)
        served, candidate = (coins.sample("abcdefghijkl", 8) for _ in range(2))
        shown = interleave(served, candidate, 8, coins)
        ids = [(candidate if team == CANDIDATE else served)[place] for team, place in shown]
        assert len(ids) == len({*ids}) == 8
        drafted = [team for team, _ in shown if team != NEITHER]
        for number in range(0, len(drafted) - 1, 2):
            assert {*drafted[number : number + 2]} == {SERVED, CANDIDATE}
        for team, ranking in ((SERVED, served), (CANDIDATE, candidate)):
            places = [place for each, place in shown if each == team]
            assert places == sorted(places), "each team adds its best result first"
            assert {*ranking[: places[-1]]} <= {*ids}
    assert interleave("abc", "abd", 3, Random(0))[:2] == [(NEITHER, 0), (NEITHER, 1)]
    assert interleave("abc", "", 5, Random(0)) == [(SERVED, 0), (SERVED, 1), (SERVED, 2)]
    assert interleave("", "", 5, Random(0)) == []
    assert interleave("abc", "abcde", 5, Random(0)) == [
        *((NEITHER, place) for place in range(3)), (CANDIDATE, 3), (CANDIDATE, 4),
    ]  # fmt: skip


def vote(rng: np.random.Generator, coins: Random, served: Any, candidate: Any, good: np.ndarray) -> str:
    """The team of the first click of a user who looks from the first result on, less and less; "" without a click."""
    for position, (team, place) in enumerate(interleave(served, candidate, 10, coins), 1):
        item = (candidate if team == CANDIDATE else served)[place]
        if rng.random() < good[item] / position**0.5:
            return team
    return ""


def winner(seed: int, skill: float, voters: int) -> tuple[str, int]:
    """Read the test after each vote; return its first winner, and when it won. skill: of the candidate."""
    rng, coins, counts = np.random.default_rng(seed), Random(seed), {SERVED: 0, CANDIDATE: 0}
    for number in range(1, voters + 1):
        good = rng.random(20) ** 3
        rankings = [np.argsort(-(good + rng.normal(0, 0.3 / way, 20))).tolist() for way in (1.0, skill)]
        team = vote(rng, coins, rankings[0], rankings[1], good)
        if team in counts:
            counts[team] += 1
            low, high = interval(counts[CANDIDATE], counts[SERVED])
            if low > 0.5 or high < 0.5:
                return (CANDIDATE if low > 0.5 else SERVED), number
    return "", voters


@pytest.mark.slow
def test_equal_rankings_rarely_have_a_winner_however_often_one_looks() -> None:
    winners = [winner(seed, 1.0, 120)[0] for seed in range(400)]
    assert sum(map(bool, winners)) <= 20, "5 %"


@pytest.mark.slow
def test_a_better_candidate_is_found() -> None:
    found = [winner(seed, 3.0, 1500) for seed in range(20)]
    assert {team for team, _ in found} == {CANDIDATE}
    assert np.median([number for _, number in found]) < 600


def test_the_interval_holds_the_truth_at_all_times() -> None:
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(0, 1000)[1] < 0.05
    for wins, losses in ((30, 70), (500, 500), (0, 9), (9, 0)):
        low, high = interval(wins, losses)
        assert low < (wins + 0.1) / (wins + losses + 0.2) < high
        assert interval(losses, wins) == pytest.approx((1 - high, 1 - low), abs=1e-6)
    missed = 0
    for seed in range(200):
        wins, rng = 0, np.random.default_rng(seed)
        for votes in range(1, 300):
            wins += rng.random() < 0.7
            if votes % 10 == 0:
                low, high = interval(wins, votes - wins)
                if not low <= 0.7 <= high:
                    missed += 1
                    break
    assert missed <= 10, "5 %"


def test_a_client_decides_no_comparison() -> None:
    tally = Tally(votes={f"one.{number}": CANDIDATE for number in range(1000)})
    assert (tally.summary()["wins"], tally.summary()["losses"]) == (100, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [("candidate", "candidate:0.2"), ("other:0", "share"), ("other:1.5", "share"), ("@0:0.5", "version"),
     ("other:0.2:both", "shadow"), ("none:0.2", "DCAR_COLLECTIONS")],
)  # fmt: skip
def test_a_wrong_comparison_ends_the_start(given: str, message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"index": tmp_path, "collections": {"other": tmp_path}}
    with pytest.raises(DcarError, match=f"DCAR_COMPARE.*{message}"):
        load_settings(compare=given, feedback=True, **options)
    with pytest.raises(DcarError, match="needs DCAR_FEEDBACK"):
        load_settings(compare="other:0.2", **options)
    assert load_settings(compare="@3:0.25:shadow", feedback=True, **options).compare == ("@3", 0.25, True)


@pytest.fixture(scope="session")
def candidate(gallery: Path, other_checkpoint: Path) -> Path:
    """An index of the same images by another model."""
    out = gallery.parent / "candidate"
    rebuild(gallery, other_checkpoint, out, workers=0, progress=False)
    return out


async def results(client: httpx.AsyncClient, who: str = "", **options: Any) -> dict[str, Any]:
    headers = {"X-Client-ID": who} if who else {}
    response = await client.post("/search/text", json={"query": WORDS, "k": 8, **options}, headers=headers)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return {name: value for name, value in body.items() if name not in ("took_ms", "cached", "query_id")}


def ids(body: dict[str, Any]) -> list[str]:
    return [result["id"] for result in body["results"]]


async def test_clients_of_the_share_see_both_rankings_and_others_what_they_saw_before(
    built_index: Path, candidate: Path, tmp_path: Path
) -> None:
    async with opened(built_index, collections={"candidate": candidate}) as client:
        plain, first = await results(client), await results(client, k=24)
        other = (await client.post("/collections/candidate/search/text", json={"query": WORDS, "k": 8})).json()
    given: dict[str, Any] = {"collections": {"candidate": candidate}, "feedback": tmp_path, "feedback_texts": True}
    async with opened(built_index, compare="candidate:0.5", **given) as client:
        seen = {str(number): await results(client, str(number)) for number in range(40)}
        inside = {who: body for who, body in seen.items() if body != plain}
        assert 8 <= len(inside) <= 32
        assert [await results(client, who) for who in seen] == [*seen.values()], "the same page again"
        assert len({tuple(ids(body)) for body in inside.values()}) > 1, "coins differ by client"
        for who, body in inside.items():
            assert {*ids(body)} <= {*ids(plain)} | {*ids(other)}
            assert "team" not in str(body).lower()
            following = await results(client, who, k=24, offset=body["next_offset"])
            assert {*ids(body), *ids(following)} == {*ids(first)}, "no result is lost between pages"
        who = next(iter(inside))
        for options in ({"offset": 8}, {"group_by": "color"}, {"sort": "color", "hybrid": True}, {"fold": 0.9}):
            assert await results(client, who, **options) == await results(client, **options), options
        image = await client.post("/search/image", files={"file": ("a.png", png("red"))}, headers={"X-Client-ID": who})
        assert image.status_code == 200
    rows = [row["query_attributes"] for row in store.read_log(tmp_path)[0].to_pylist()]
    compared = [row for row in rows if row["candidate"]]
    assert {row["candidate"] for row in compared} == {"candidate@1"}
    assert {len(row["teams"]) for row in compared} == {8, 10}
    assert {*"".join(row["teams"] for row in compared)} <= {SERVED, CANDIDATE, NEITHER}


async def test_a_version_in_the_shadow_is_measured_and_not_shown(
    index: Path, gallery: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    rebuild(gallery, other_checkpoint, index, workers=0, progress=False, force=True)
    async with opened(index) as client:
        plain = await results(client)
    async with opened(index, compare="@1:1:shadow", feedback=tmp_path, feedback_texts=True, **ADMIN_ONLY) as client:
        await until(lambda: client.app.state.collections.candidate is not None)
        assert ids(await results(client)) == ids(plain)
        await client.app.state.feedback._flush()
        found = (await client.get("/ui/insights/data", headers=bearer(ADMIN_ONLY["admin_key"]))).json()
        (compared,) = found["comparisons"]
        assert (compared["served"], compared["candidate"], compared["wins"]) == (2, "index@1", 0)
        assert 0 < compared["overlap"] < 1
        (differing,) = compared["differing"]
        assert (differing["query"], differing["served"]) == (WORDS, ids(plain))
        common = {*differing["candidate"]} & {*ids(plain)}
        assert (len(differing["candidate"]), len(common)) == (8, round(8 * compared["overlap"]))


async def test_first_clicks_are_votes_on_the_page_and_in_the_metrics(
    built_index: Path, candidate: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"collections": {"candidate": candidate}, "feedback": tmp_path, **ADMIN_ONLY}
    async with opened(built_index, compare="candidate:1", **given) as client:
        other = (await client.post("/collections/candidate/search/text", json={"query": WORDS, "k": 8})).json()
        events: list[dict[str, Any]] = []
        for number in range(60):
            headers = {"X-Client-ID": str(number)}
            response = await client.post("/search/text", json={"query": WORDS, "k": 8}, headers=headers)
            shown = [result["id"] for result in response.json()["results"]]
            best = next(each for each in ids(other) if each in shown)
            query_id, who = response.json()["query_id"], f"c{number}"
            clicks = {"query_id": query_id, "client_id": who, "action_name": "click"}
            events += [clicks | {"object_id": item} for item in dict.fromkeys((best, shown[-1]))]
        assert (await client.post("/feedback", json={"events": events})).json()["accepted"] == len(events)
        found = (await client.get("/ui/insights/data", headers=bearer(ADMIN_ONLY["admin_key"]))).json()
        (compared,) = found["comparisons"]
        assert compared["searches"] == compared["wins"] + compared["losses"] + compared["ties"] == 60
        assert compared["wins"] > compared["losses"]
        assert (compared["winner"] == "candidate") == (compared["low"] > 0.5)
        metrics = await scrape(client)
        assert metrics["dcar_compare_votes", (("outcome", "wins"),)] == compared["wins"]
        assert metrics["dcar_compare_win_share", (("bound", "low"),)] == pytest.approx(compared["low"])
        assert metrics["dcar_compared_total", (("outcome", "interleaved"),)] == 60


async def test_a_candidate_that_fails_or_has_other_images_costs_no_result(
    built_index: Path, products: Path, gallery: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    rebuild(gallery / "circle", other_checkpoint, tmp_path / "circles", workers=0, progress=False)
    options: dict[str, Any] = {"filter": {"color": ["red", "blue"]}}
    given: dict[str, Any] = {"collections": {"circles": tmp_path / "circles", "products": products}}
    async with opened(built_index, **given) as client:
        plain, filtered = ids(await results(client)), ids(await results(client, **options))
    async with opened(built_index, compare="circles:1", feedback=tmp_path / "log", **given) as client:
        assert ids(await results(client)) == plain
        assert ids(await results(client, **options)) == filtered
        metrics = await scrape(client)
        assert metrics["dcar_compared_total", (("outcome", "failed"),)] == 1
    async with opened(built_index, compare="products:1", feedback=tmp_path / "log", **given) as client:
        assert ids(await results(client)) == plain
        assert ("dcar_compared_total", (("outcome", "interleaved"),)) not in await scrape(client), "grouped"
