"""Searches by words without FastAPI's routing: answers and errors as with it; answers remembered for a version."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_harness import opened

from app.core.metrics import CONTENT_TYPE
from app.search.answer_cache import Answers
from index_jobs.rebuild import rebuild
from index_jobs.store.publish import rollback

KEY = {"admin_key": "an admin's key"}
JSON = {"content-type": "application/json"}
BODIES: list[tuple[bytes, dict[str, str]]] = [
    (b'{"query": "a red square"}', JSON),
    (b'{"query": "  a RED\\u0301 square ", "k": 3, "offset": 2}', JSON),
    (b'{"query": "a red square", "k": 24, "fold": 0.99, "min_score": -1}', JSON),
    (b'{"query": "a red square", "filter": {"category": ["red"]}, "explain": true, "k": 2}', JSON),
    (b'{"query": "a red square", "rerank": true, "k": 2}', {"content-type": "application/json; charset=utf-8"}),
    (b'{"more_like": ["circle/red.png"], "k": 2}', JSON),
    (b'{"query": ""}', JSON),
    (b'{"query": "x", "k": 0}', JSON),
    (b'{"query": "x", "k": 100000}', JSON),
    (b'{"query": "x", "filter": {"nothing": 1}}', JSON),
    (b'{"query": "x", "more_like": ["nobody"]}', JSON),
    (b'{"query": "x", "min_score": "auto"}', JSON),
    (b'{"query": ', JSON),
    (b"", JSON),
    (b"\xff\xfe", JSON),
    (b'{"query": "x"}', JSON),
    (b'{"query": "x"}', {}),
    (b'{"query": "x"}', {"content-type": "text/plain"}),
]
PATHS = ["/search/text", "/collections/other/search/text", "/collections/nobody/search/text"]


def essence(answer: httpx.Response) -> tuple[int, dict[str, Any], dict[str, str]]:
    """All of an answer but what may differ: its id, its time, and whether its query was known."""
    body = {name: value for name, value in answer.json().items() if name not in ("took_ms", "cached")}
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "content-length")}
    return answer.status_code, body, headers


def test_answers_and_errors_are_those_of_the_routes(built_index: Path) -> None:
    async def main() -> None:
        given: dict[str, Any] = {"collections": {"other": built_index}, "poll_s": 0}
        async with opened(built_index, express=False, **given) as slow, opened(built_index, **given) as fast:
            for path in PATHS:
                for body, headers in BODIES:
                    wanted = essence(await slow.post(path, content=body, headers=headers))
                    for _ in range(2):  # computed, then remembered
                        found = essence(await fast.post(path, content=body, headers=headers))
                        assert found == wanted, (path, body)
            for method in ("GET", "PUT", "HEAD"):
                wanted, found = await slow.request(method, PATHS[0]), await fast.request(method, PATHS[0])
                assert (found.status_code, found.headers["allow"]) == (wanted.status_code, wanted.headers["allow"])
            for client in (slow, fast):
                metrics = (await client.get("/metrics", headers={"accept": CONTENT_TYPE})).text
                for path in ("/search/text", "/collections/{collection}/search/text"):
                    assert f'dcar_request_seconds_count{{route="{path}",status="200"}}' in metrics

    asyncio.run(main())


def test_a_remembered_answer_says_so_and_tells_its_own_time(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index) as client:
            question = {"query": "a red square", "k": 24}
            first, second = [await client.post("/search/text", json=question) for _ in range(2)]
            assert list(first.json()) == list(second.json()) == ["index_version", "took_ms", "cached", "results"]
            assert (first.json()["cached"], second.json()["cached"]) == (False, True)
            assert second.json()["took_ms"] < first.json()["took_ms"]
            metrics = (await client.get("/metrics")).text
            for outcome in ("hit", "miss"):
                assert f'dcar_cache_lookups_total{{level="answers",outcome="{outcome}"}} 1.0' in metrics

    asyncio.run(main())


def test_an_answer_is_remembered_for_its_own_address(built_index: Path) -> None:
    """A collection has two where it is the default one, and the results' addresses begin with them."""

    async def main() -> None:
        async with opened(built_index) as client:
            for where in ("", f"/collections/{built_index.name}") * 2:
                answer = await client.post(f"{where}/search/text", json={"query": "a red square"})
                assert answer.json()["results"][0]["image_url"].startswith(f"{where}/items/")

    asyncio.run(main())


def test_no_answer_outlives_its_version(
    gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    for checkpoint in (tiny_checkpoint, other_checkpoint):
        rebuild(gallery, checkpoint, index, workers=0, progress=False, force=True)

    async def main() -> None:
        async with opened(index, poll_s=0, **KEY) as client:

            async def ask() -> dict[str, Any]:
                answer: dict[str, Any] = (await client.post("/search/text", json={"query": "a red square"})).json()
                return answer

            new = [await ask(), await ask()][1]
            await asyncio.to_thread(rollback, index, 1)
            bearer = {"authorization": "Bearer " + KEY["admin_key"]}
            assert (await client.post("/admin/reload", headers=bearer)).is_success
            old = await ask()
            assert (new["index_version"], old["index_version"]) == (2, 1)
            assert (new["cached"], old["cached"]) == (True, False)
            assert new["results"] != old["results"]

    asyncio.run(main())


@pytest.mark.parametrize("setting", [{"cache_size": 0}, {"answer_cache_bytes": 0}])
def test_answers_need_not_be_remembered(built_index: Path, setting: dict[str, int]) -> None:
    async def main() -> None:
        async with opened(built_index, **setting) as client:
            for _ in range(2):
                assert (await client.post("/search/text", json={"query": "a red square"})).is_success
            assert 'level="answers"' not in (await client.get("/metrics")).text

    asyncio.run(main())


def test_the_least_recently_used_answers_are_dropped() -> None:
    one = {"index_version": 3, "took_ms": 5.0, "cached": False, "results": ["x" * 100]}
    answers = Answers(size=300)
    for key in ("a", "a", "b"):  # two that asked at the same time have both an answer to put
        answers.put((key, None), one)
    assert json.loads(answers.get(("a", None), 3, 0.125) or b"") == one | {"cached": True, "took_ms": 0.12}
    answers.put(("c", None), one)
    assert answers.get(("b", None), 3, 0.0) is None
    assert answers.get(("a", None), 3, 0.0) is not None
    answers.put(("large", None), {"results": "x" * 1000})
    answers.put(("d" * 1000, None), one)
    assert len(answers) == 2
