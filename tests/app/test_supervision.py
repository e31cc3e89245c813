"""Background tasks that fail are restarted, which readiness and metrics show; threads end with their work."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from app.core.metrics import Metrics
from app.core.supervision import stop, supervise
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.manifest import Current
from index_jobs.index.versions import current_version
from tests.support.responses import scrape
from tests.support.service import opened, until_ready
from tests.support.versions import point


@pytest.fixture(autouse=True)
def _restart_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.supervision.RESTART_S", 0.01)


async def test_a_failing_task_is_counted_and_restarted_until_it_returns() -> None:
    metrics, errors, runs = Metrics(), list[BaseException](), 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise (ValueError if runs == 1 else BaseException)(runs)  # a panic in Rust is no Exception

    await supervise("test task", run, metrics, on_failure=errors.append)
    assert [str(error) for error in errors] == ["1", "2"]
    assert metrics.registry.get_sample_value("dcar_task_failures_total", {"task": "test task"}) == 2


async def test_a_cancelled_task_is_not_restarted() -> None:
    task = asyncio.create_task(supervise("test task", lambda: asyncio.sleep(60), Metrics()))
    await asyncio.sleep(0)
    await stop(task)
    assert task.cancelled()
    await stop(None)


async def test_a_failure_of_the_poller_degrades_readiness_until_it_works_again(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(index, poll_s=0.02) as client:

        def fail(_: Path) -> int:
            raise RecursionError("from /a/place/in/the/file/system")

        monkeypatch.setattr("app.service.collections.current_version", fail)
        reason = (await until_ready(client, status="degraded"))["reason"]
        assert "check for new versions failed: RecursionError" in reason
        assert "/a/place" not in reason
        metrics = await scrape(client)
        assert metrics["dcar_task_failures_total", (("task", "version poller"),)] >= 1
        assert metrics["dcar_index_degraded", (("collection", "index"),)] == 1
        monkeypatch.setattr("app.service.collections.current_version", current_version)
        await until_ready(client, status="ready")


async def test_a_version_that_does_not_exist_degrades_readiness_without_a_path(index: Path) -> None:
    async with opened(index, poll_s=0.02) as client:
        for version in (b"7" * 5000, Current(7, "0" * 64).to_bytes()):
            (index / "CURRENT").write_bytes(version)
            ready = await until_ready(client, status="degraded")
            assert str(index.parent) not in str(ready)
            point(index, 1)
            await until_ready(client, status="ready")
        assert ready["reason"].startswith("index has no version 7")


async def test_a_gallery_that_is_gone_degrades_readiness(built_index: Path, gallery: Path, tmp_path: Path) -> None:
    async with opened(built_index, poll_s=0.02) as client:
        await until_ready(client, status="ready")
        gallery.rename(tmp_path / "unmounted")
        ready = (await client.get("/readyz")).json()
        assert ready["status"] == "degraded"
        assert "sampled images are not in the gallery" in ready["reason"]
        assert str(tmp_path) not in ready["reason"]
        (tmp_path / "unmounted").rename(gallery)
        await until_ready(client, status="ready")


async def test_a_hung_gallery_degrades_readiness_and_holds_up_nothing_else(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, looks = threading.Event(), list[threading.Thread]()

    def hang(_: IndexVersion) -> None:
        looks.append(threading.current_thread())
        assert gate.wait(20)

    monkeypatch.setattr(IndexVersion, "find_gallery_fault", hang)
    monkeypatch.setattr("app.service.collections.LOOK_S", 0.05)
    async with opened(built_index, poll_s=0) as client:
        probes = await asyncio.gather(*(client.get("/readyz") for _ in range(os.cpu_count() or 1) for _ in range(8)))
        assert {(each.json()["status"], each.json()["reason"]) for each in probes} == {
            ("degraded", "the gallery does not respond")
        }
        batch = client.post("/search/batch", json={"queries": [{"query": "red"}]})
        assert (await asyncio.wait_for(batch, 10)).status_code == 200
        assert len(looks) == 1
        assert looks[0].name.startswith("dcar-"), "the process can end without it"
        gate.set()
        await until_ready(client, status="ready")
