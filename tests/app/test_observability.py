"""Metrics, request ids, logs, and a shutdown that drops no request."""

import json
import logging
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.images import png
from tests.support.responses import scrape
from tests.support.service import ServiceClient, before_encoding, opened, restore, serving_process

REQUEST_LOG = "app.http.envelope"


async def test_metrics_count_stages_cache_lookups_and_requests(reranking_index: Path) -> None:
    async with opened(reranking_index) as client:
        for k in (3, 4, 4):  # embedded, then with a cached embedding, then with cached results
            assert (await client.post("/search/text", json={"query": "red", "k": k})).status_code == 200
        assert (await client.post("/search/image", files={"file": png()})).status_code == 200
        for i in range(20):
            await client.get(f"/probing/{i}")
        found = await scrape(client)

        def stage(name: str) -> float:
            return found["dcar_stage_seconds_count", (("stage", name),)]

        assert {name: stage(name) for name in ("queue", "encode", "decode", "search")} == {
            "queue": 2, "encode": 2, "decode": 1, "search": 3,
        }  # fmt: skip
        assert found["dcar_batch_size_sum", ()] == 2
        assert found["dcar_batch_size_count", ()] == 2
        assert found["dcar_cache_lookups_total", (("outcome", "hit"),)] == 2
        assert found["dcar_index_version", (("collection", "reranking"),)] == 1
        assert found["dcar_index_items", (("collection", "reranking"),)] == 24
        assert found["dcar_index_degraded", (("collection", "reranking"),)] == 0
        assert found["dcar_errors_total", ()] == 0
        assert found["dcar_request_seconds_count", (("route", "/search/text"), ("status", "200"))] == 3
        assert found["dcar_request_seconds_count", (("route", "none"), ("status", "404"))] == 20
        assert not any("probing" in value for _, labels in found for _, value in labels)
        assert found["process_resident_memory_bytes", ()] > 1e6

        encoder = client.app.state.collections[None].live.encoder
        before_encoding(encoder, None)  # type: ignore[arg-type]
        assert (await client.post("/search/text", json={"query": "blue"})).status_code == 500
        assert (await scrape(client))["dcar_errors_total", ()] == 1
        restore(encoder)


async def test_a_well_formed_request_id_is_kept_and_logged(
    started: ServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, REQUEST_LOG)
    given = await started.post("/search/text", json={"query": "red"}, headers={"X-Request-ID": "shop-7/a"})
    assert given.headers["x-request-id"] == "shop-7/a"
    made = await started.post("/search/text", json={"query": "a secret wish"})
    refused = [await started.get("/items/nothing%0Aat%20all", headers={"X-Request-ID": "a b\tc"})]
    for malformed in ("", "x" * 129, "<script>"):
        refused.append(await started.get("/" + "%ff" * 20_000, headers={"X-Request-ID": malformed}))
    for response in (made, *refused):
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])

    lines = [record.getMessage() for record in caplog.records if record.name == REQUEST_LOG]
    assert len(lines) == 6, "successful probes are not logged"
    assert max(map(len, lines)) < 5000, "long paths are shortened"
    assert lines[0].startswith("POST /search/text 200 in ")
    assert lines[2].startswith("GET /items/nothing%0Aat%20all 404 in ")
    assert "secret wish" not in caplog.text


@pytest.mark.slow
def test_a_shutdown_finishes_requests_and_logs_json(built_index: Path) -> None:
    """After SIGTERM nobody can connect, and an upload is finished."""
    with serving_process(built_index, DCAR_LOG_FORMAT="json") as (process, client, log):

        def slowly() -> Any:
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n' + png()
            assert httpx.get(client.base_url.join("/healthz")).status_code == 200  # it has read the beginning
            process.send_signal(signal.SIGTERM)
            time.sleep(0.8)
            with pytest.raises(httpx.ConnectError):
                httpx.get(client.base_url.join("/readyz"))
            yield b"\r\n--b--\r\n"

        kind = {"Content-Type": "multipart/form-data; boundary=b", "X-Request-ID": "the-last"}
        assert client.post("/search/image", content=slowly(), headers=kind).status_code == 200
    assert process.returncode in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in log]
    assert all({"time", "level", "logger", "message", "request_id"} <= line.keys() for line in lines)
    last = next(line for line in lines if line["request_id"] == "the-last" and line["logger"] == REQUEST_LOG)
    assert (last["path"], last["status"], last["method"]) == ("/search/image", 200, "POST")
    assert last["ms"] > 500
