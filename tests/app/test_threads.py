"""Threads for rare work end with it, so few threads compute."""

import asyncio
import itertools
import threading
from pathlib import Path

import pytest

from app.core.threads import SharedCall, run_in_new_thread
from app.search.snapshots import load_snapshot
from dcar_core.serving import pair_weights
from tests.support.service import opened


async def test_a_new_thread_ends_with_its_call() -> None:
    thread = await run_in_new_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        await run_in_new_thread(divmod, 1, 0)


async def test_a_shared_call_runs_once_for_all_and_again_when_its_result_is_old() -> None:
    numbers = itertools.count(1)
    call = SharedCall(lambda: next(numbers), 0)
    assert await asyncio.gather(*(call.result() for _ in range(20))) == [1] * 20
    assert await call.result() == 1
    call.fresh_s = 0
    assert await call.result() == 2


async def test_a_shared_call_that_hangs_has_its_last_result_for_a_while() -> None:
    gate = threading.Event()
    gate.set()
    call = SharedCall(lambda: gate.wait(10), False)
    call.fresh_s = 0
    assert await call.result()
    gate.clear()
    call.wait_s = 0.02
    assert await call.result()
    call.known_s = 0
    assert not await call.result()
    gate.set()
    call.wait_s = 60
    assert await call.result()


async def test_a_shared_call_that_fails_raises_its_error_and_runs_again() -> None:
    divisors = [0, 1]
    call = SharedCall(lambda: 1 // divisors.pop(0), -1)
    call.fresh_s = 0
    with pytest.raises(ZeroDivisionError):
        await call.result()
    assert await call.result() == 1


async def test_threads_that_loaded_a_model_end(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stays keeps OpenMP workers, which slow the model's thread."""
    load, make, loaders = load_snapshot, pair_weights.PairWeights, list[threading.Thread]()

    def loading(*given: object) -> object:
        loaders.append(threading.current_thread())
        return load(*given)  # type: ignore[arg-type]

    def making(*given: object) -> object:
        loaders.append(threading.current_thread())
        return make(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("app.service.collections.load_snapshot", loading)
    monkeypatch.setattr(pair_weights, "PairWeights", making)
    async with opened(built_index, poll_s=0) as client:
        response = await client.post("/search/text", json={"query": "a red square", "rerank": True})
        assert response.status_code == 200
        assert len(loaders) == 2
        for thread in loaders:
            thread.join(10)
            assert not thread.is_alive()
