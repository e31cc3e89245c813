"""Limits on concurrent work, its duration and the size of bodies, and responses under
overload.
"""

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.guard import UNCOUNTED_BYTES, BodyLimit, Policy
from app.core.problems import Problem
from app.core.settings import Settings
from index_jobs.index import filters
from index_jobs.index.index_version import IndexVersion
from tests.support.images import png
from tests.support.service import WORDS, before_encoding, hold, opened, restore, until


async def test_search_past_its_deadline_is_refused_and_skipped(
    built_index: Path,
) -> None:
    async with opened(built_index, deadline_ms=300) as client:
        encoder = client.app.state.collections[None].current.encoder
        gate, seen = hold(encoder)
        first = asyncio.create_task(client.post("/search/text", json={"query": "q0"}))
        await until(lambda: bool(seen))
        others = (
            client.post("/search/text", json={"query": "q1"}),
            client.post("/v1/embeddings", json={"input": "q2"}),
        )
        late = await asyncio.gather(first, *others)
        assert [response.status_code for response in late] == [503] * 3
        assert all(response.headers["retry-after"] == "1" for response in late)
        gate.set()
        restore(encoder)
        assert (await client.post("/search/text", json=WORDS)).status_code == 200
        assert seen == ["q0"], "cancelled work is skipped"
        text = (await client.get("/metrics")).text
        assert 'dcar_refused_total{reason="late"} 3.0' in text
        assert 'dcar_pending{what="searches"} 0.0' in text


async def test_many_closed_loops_of_one_caller_are_refused_nothing(
    built_index: Path,
) -> None:
    """256 texts at a time, of a model that answers some 600 a second."""
    async with opened(built_index, cache_size=0) as client:
        before_encoding(
            client.app.state.collections[None].current.encoder,
            lambda texts: time.sleep(0.05),
        )

        async def ask(loop: int) -> list[int]:
            queries = [{"query": f"loop {loop}, query {number}"} for number in range(3)]
            return [
                (await client.post("/search/text", json=query)).status_code
                for query in queries
            ]

        statuses = await asyncio.gather(*map(ask, range(256)))
        assert set(chain.from_iterable(statuses)) == {200}


async def test_searches_beyond_max_pending_are_refused_and_their_uploads_not_read(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(built_index, max_pending=2) as client:
        gate, seen = hold(client.app.state.collections[None].current.encoder)
        tasks = [
            asyncio.create_task(client.post("/search/text", json={"query": f"q{i}"}))
            for i in range(10)
        ]
        await until(lambda: bool(seen) and sum(task.done() for task in tasks) == 8)
        with monkeypatch.context() as patch:
            patch.setattr("app.api.requests.read_image_query", None)
            refused = [await client.post("/search/image", files={"file": png()})]
        refused.append(await client.post("/v1/embeddings", json={"input": "red"}))
        gate.set()
        responses = await asyncio.gather(*tasks)
        assert (
            sorted(response.status_code for response in responses)
            == [200] * 2 + [503] * 8
        )
        refused += [response for response in responses if response.status_code == 503]
        assert {
            (response.status_code, response.headers["retry-after"])
            for response in refused
        } == {(503, "1")}
        assert (await client.post("/search/image", files={"file": png()})).is_success
        # each search of a batch counts
        for count, status in (
            (2, 200),
            (3, 503),
            (2, 200),
        ):
            batch = {"queries": [{"query": f"q{i}"} for i in range(count)]}
            assert (
                await client.post("/search/batch", json=batch)
            ).status_code == status


LIMIT = 2**20 + 2 * UNCOUNTED_BYTES
LARGE: list[tuple[dict[str, Any], int, str]] = [
    (
        {"image": base64.b64encode(bytes(2**20)).decode()},
        422,
        "queries.0: image: not an image",
    ),
    ({"query": "x", "filter": {"a": "x" * 2**20}}, 422, "filter: takes at most 64 KiB"),
    (
        {"query": "x", "filter": {"a": ["x" * 1000] * 1000}},
        422,
        "filter: takes at most 64 KiB",
    ),
    (
        {
            "query": "x",
            "filter": json.loads("[" * 190 + '"",' * 40_000 + '""' + "]" * 190),
        },
        422,
        "queries.0.filter",
    ),
    ({"query": "x", "filter": {"a": [0] * 60_000}}, 413, "at most 50,000 values"),
    (
        {"query": "x", "filter": {f"{key:030}": 1 for key in range(60_000)}},
        413,
        "at most 50,000 values",
    ),
]


async def test_a_large_body_holds_images_and_little_else(built_index: Path) -> None:
    async with opened(built_index) as client:
        for query, status, says in LARGE:
            response = await client.post("/search/batch", json={"queries": [query]})
            assert (response.status_code, says in response.json()["detail"]) == (
                status,
                True,
            ), response.text


async def test_caches_of_a_version_are_bounded_in_bytes(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.search.served_version.MAX_MASK_BYTES", 2 * 24)
    monkeypatch.setattr("app.search.results.MAX_PAGE_BYTES", 100)
    async with opened(built_index) as client:
        served = client.app.state.collections[None].current
        for number in range(20):
            filter = {"caption": {"not": [f"{number}" + "\U0001f600" * 10_000]}}
            body = {"query": "red", "filter": filter, "facets": ["category", "caption"]}
            response = await client.post("/search/text", json=body)
            assert response.is_success
        response = await client.post("/search/text", json=WORDS)
        assert response.is_success
        assert len(served.masks) == 2
        assert len(served.pages) == 0
        assert sum(map(len, served.masks)) < 10_000


async def test_large_image_is_read_in_a_thread_within_the_budget_of_long_responses(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set[str]()
    data = b"\xff\xd8\xff" + bytes(300_000)

    def read(*_: object) -> bytes:
        threads.add(threading.current_thread().name.rpartition("_")[0])
        return data

    monkeypatch.setattr(IndexVersion, "image_bytes", read)
    async with opened(built_index) as client:
        path = "/items/circle%2Fred.png/image"
        response = await client.get(path)
        assert response.content == data
        assert response.headers["content-type"] == "image/jpeg"
        client.app.state.bodies.held += 2**30
        assert (await client.get(path)).status_code == 503
        client.app.state.bodies.held -= 2**30
    assert threads == {"dcar-image"}


@pytest.mark.slow
async def test_slow_gallery_does_not_delay_searches(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(*_: object) -> bytes:
        assert gate.wait(20)
        return png()

    monkeypatch.setattr(IndexVersion, "image_bytes", slow)
    async with opened(built_index, deadline_ms=1500, max_pending=20) as client:
        images = [
            asyncio.create_task(client.get("/items/circle%2Fred.png/image"))
            for _ in range(30)
        ]
        try:
            await asyncio.sleep(0.1)
            body = {"query": "red", "k": 3, "filter": {"category": "circle"}}
            began = time.monotonic()
            assert (await client.post("/search/text", json=body)).status_code == 200
            assert (await client.get("/items/circle%2Fred.png")).status_code == 200
            assert time.monotonic() - began < 1
            responses = await asyncio.gather(*images)
            assert {response.status_code for response in responses} == {503}
            assert all("retry-after" in response.headers for response in responses)
        finally:
            gate.set()


async def test_filters_delay_no_other_search_and_those_of_a_batch_give_way(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    order = list[str]()
    match_rows = filters.match_rows

    def match(opened: Any, filter: Any) -> Any:
        order.append(filter["caption"]["contains"])
        assert order[-1] == "single" or gate.wait(60)
        return match_rows(opened, filter)

    def of_caption(word: str, **more: Any) -> dict[str, Any]:
        return {"query": "red", "filter": {"caption": {"contains": word}, **more}}

    async with opened(built_index) as client:
        cached = {"query": "red", "filter": {"color": "red"}}
        response = await client.post("/search/text", json=cached)
        assert response.is_success
        monkeypatch.setattr(filters, "match_rows", match)
        queries = [
            of_caption("batch", color={"not": f"{number}"}) for number in range(8)
        ]
        batch = asyncio.create_task(
            client.post("/search/batch", json={"queries": queries})
        )
        await until(lambda: bool(order))
        await asyncio.sleep(0.2)  # all queries of the batch have been encoded
        other = asyncio.create_task(
            client.post("/search/text", json=of_caption("single"))
        )
        for query in (WORDS, cached):
            assert (
                await asyncio.wait_for(client.post("/search/text", json=query), 30)
            ).is_success
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in (batch, other))
        gate.set()
        assert [(await each).status_code for each in (other, batch)] == [200, 200]
        assert order.index("single") <= 2, "at most two queries of the batch came first"
        assert order.count("batch") == 8


class Served:
    """An application that reads bodies, and works for a while, behind the limits on
    them. refusals: their reasons.
    """

    def __init__(
        self,
        *,
        in_flight: int = 2**30,
        upload_s: float = 30,
        works_s: float = 0,
    ) -> None:
        self.refusals = list[str | None]()
        self.works_s = works_s
        self.limit = BodyLimit(
            Settings(
                index=Path(),
                max_in_flight_bytes=in_flight,
                upload_timeout_s=upload_s,
            )
        )

    async def work(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await asyncio.sleep(self.works_s)
        await Response()(scope, receive, send)

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.limit.run(
                self.work,
                Policy("read", body=lambda _: LIMIT),
                scope,
                receive,
                send,
            )
        except Problem as problem:
            self.refusals.append(problem.refused)
            await problem.response(scope)(scope, receive, send)

    async def __call__(
        self,
        *parts: bytes,
        headers: dict[str, str] | None = None,
        hangs: asyncio.Event | None = None,
    ) -> httpx.Response:
        """Send a body in parts. hangs: the end of the body comes when it is set."""

        async def content() -> AsyncIterator[bytes]:
            for part in parts:
                yield part
            if hangs is not None:
                await hangs.wait()

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.run), base_url="http://any"
        ) as client:
            return await client.post("/", content=content(), headers=headers)


@pytest.mark.parametrize(
    "is_announced",
    [True, False],
    ids=["announced", "in chunks"],
)
async def test_a_body_is_refused_at_the_first_byte_over_its_limit(
    is_announced: bool,
) -> None:
    """An announced one unread."""
    for over in (0, 1):
        served = Served()
        headers = {"Content-Length": str(LIMIT + over)} if is_announced else None
        parts = [b"x"] if is_announced else [bytes(LIMIT - 5), bytes(5 + over)]
        answer = await served(*parts, headers=headers)
        assert (answer.status_code, served.refusals.count("body_size")) == (
            (413, 1) if over else (200, 0)
        )
    assert answer.json()["errors"] == [
        {"field": "body", "message": "at most 1,152 KiB"}
    ]


async def test_a_body_beyond_the_budget_is_refused() -> None:
    """The first UNCOUNTED_BYTES of each are free, and a single body always has room."""
    served = Served(in_flight=2**20)
    done = asyncio.Event()

    async def begin(size: int) -> asyncio.Task[httpx.Response]:
        task = asyncio.create_task(served(bytes(size), hangs=done))
        await asyncio.sleep(0.01)
        return task

    first = await begin(LIMIT)
    free = [await begin(UNCOUNTED_BYTES) for _ in range(10)]
    assert served.refusals.count("uploads") == 0
    refused = await (await begin(LIMIT - 1))
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert (
        refused.json()["detail"]
        == "Too many large requests are in progress. Try again in 1 s."
    )
    assert served.refusals.count("uploads") == 1
    done.set()
    assert [(await each).status_code for each in (first, *free)] == 11 * [200]
    assert (await served(bytes(LIMIT))).is_success


async def test_an_unfinished_body_is_refused_in_time_and_a_finished_one_is_not() -> (
    None
):
    served = Served(upload_s=0.1, works_s=0.2)
    assert (await served(b"x")).is_success
    refused = await served(b"x", hangs=asyncio.Event())
    assert refused.status_code == 408
    assert served.refusals.count("slow_body") == 1
    assert refused.json()["detail"] == "The body did not arrive within 0.1 seconds."
