"""Limits on compute threads."""

import asyncio
import threading
from pathlib import Path

import pytest

from app.core.threads import run_in_new_thread
from app.search.snapshots import load_snapshot
from dcar_core.serving import pair_weights
from tests.support.service import opened


def test_a_thread_of_its_own_ends_with_what_it_did() -> None:
    async def main() -> None:
        thread = await run_in_new_thread(threading.current_thread)
        assert thread is not threading.current_thread()
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(ZeroDivisionError):
            await run_in_new_thread(divmod, 1, 0)

    asyncio.run(main())


def test_threads_that_load_a_model_end(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stays keeps OpenMP's workers, and those of the model's thread go to sleep between any two steps."""
    load, make, loaders = load_snapshot, pair_weights.PairWeights, list[threading.Thread]()

    def loading(*given: object) -> object:
        loaders.append(threading.current_thread())
        return load(*given)  # type: ignore[arg-type]

    def making(*given: object) -> object:
        loaders.append(threading.current_thread())
        return make(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("app.search.collections.load_snapshot", loading)
    monkeypatch.setattr(pair_weights, "PairWeights", making)

    async def main() -> None:
        async with opened(built_index, poll_s=0) as client:
            answer = await client.post("/search/text", json={"query": "a red square", "rerank": True})
            assert answer.status_code == 200
            assert len(loaders) == 2
            for thread in loaders:
                thread.join(10)
                assert not thread.is_alive()

    asyncio.run(main())
