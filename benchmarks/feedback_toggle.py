"""`dcar serve` that logs feedback at some times and not at others, and measures what that costs.

Two equal processes may differ by 5 % in speed, so `benchmarks/serve.py feedback` compares one process with itself. It
runs this module in place of `app.cli`, with the same arguments. FEEDBACK_COSTS names the file of the result.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import app.server
from app.cli import main

PHASE_S = 0.25
create_app = app.server.create_app


async def alternate(state: Any) -> None:
    """Turn the log off and on, and note the microseconds of processor time of a request in each phase.

    The log is written at the end of each phase, so that its time counts for this phase.
    """
    log, costs = state.feedback, list[tuple[float, float]]()

    def answered() -> float:
        return sum(
            sample.value
            for metric in state.metrics.requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_count")
        )

    async def phase(feedback: Any) -> float:
        state.feedback, before, began = feedback, answered(), time.process_time()
        await asyncio.sleep(PHASE_S)
        if feedback is not None:
            await log._flush()
        return (time.process_time() - began) / max(answered() - before, 1) * 1e6

    while True:
        costs.append((await phase(None), await phase(log)))
        Path(os.environ["FEEDBACK_COSTS"]).write_text(json.dumps(costs), encoding="utf-8")


def create_alternating(*args: Any, **options: Any) -> FastAPI:
    service = create_app(*args, **options)
    run = service.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with run(app) as state:
            task = asyncio.create_task(alternate(app.state))
            yield state
            task.cancel()

    service.router.lifespan_context = lifespan
    return service


if __name__ == "__main__":
    app.server.create_app = create_alternating
    main()
