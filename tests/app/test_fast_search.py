"""Searches by words without FastAPI's routing: answers and errors as with it."""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from app.core.metrics import CONTENT_TYPE
from tests.support.service import opened

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
                    for _ in range(2):  # computed, then cached
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
