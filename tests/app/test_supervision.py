"""Background tasks that fail are restarted, which readiness and metrics show; threads end with their work."""

from pathlib import Path

import pytest

from app.core.metrics import Metrics
from app.core.turns import supervise
from index_jobs.index.manifest import Current
from index_jobs.index.versions import current_version
from tests.support.responses import scrape
from tests.support.service import opened, until_ready
from tests.support.versions import point


@pytest.fixture(autouse=True)
def _restart_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.turns.RESTART_S", 0.01)


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
