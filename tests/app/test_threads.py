"""Threads for rare work end with it, so few threads compute."""

import threading
from pathlib import Path

import pytest

from app.core.threads import run_in_new_thread
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


async def test_threads_that_loaded_a_model_end(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stays keeps OpenMP workers, which slow the model's thread."""
    load, make, loaders = load_snapshot, pair_weights.PairWeights, list[threading.Thread]()

    def loading(*given: object) -> object:
        loaders.append(threading.current_thread())
        return load(*given)  # type: ignore[arg-type]

    def making(*given: object) -> object:
        loaders.append(threading.current_thread())
        return make(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("app.search.collections.load_snapshot", loading)
    monkeypatch.setattr(pair_weights, "PairWeights", making)
    async with opened(built_index, poll_s=0) as client:
        response = await client.post("/search/text", json={"query": "a red square", "rerank": True})
        assert response.status_code == 200
        assert len(loaders) == 2
        for thread in loaders:
            thread.join(10)
            assert not thread.is_alive()
