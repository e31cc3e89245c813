"""`dcar serve` that logs feedback at some times and not at others, and measures what that costs.

Two equal processes may differ by 5 % in speed, so `benchmarks/serve.py feedback` compares one process with itself. It
runs this module in place of `app.cli`, with the same arguments. FEEDBACK_COSTS names the file of the result.
"""

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import app.server
from app.cli import main

PHASE_S = 0.1
create_app = app.server.create_app


async def alternate(state: Any) -> None:
    """Turn the log off and on, and note the microseconds of processor time of a request in each phase.

    What the thread that writes the log takes is divided by the requests that were logged, whenever it writes.
    """
    log, costs, logged = state.feedback, list[tuple[float, float]](), 0.0
    writer = time.pthread_getcpuclockid(await log._writing.run(threading.get_ident))  # to read it does not wake it

    def answered() -> float:
        samples = (sample for metric in state.metrics.requests.collect() for sample in metric.samples)
        return sum(sample.value for sample in samples if sample.name.endswith("_count"))

    async def phase(feedback: Any) -> tuple[float, float, float]:
        """Return the requests, their seconds without those of writing, and the seconds of writing so far."""
        state.feedback, before, writing = feedback, answered(), time.clock_gettime(writer)
        began = time.process_time()
        await asyncio.sleep(PHASE_S)
        took, written = time.process_time() - began, time.clock_gettime(writer)
        return max(answered() - before, 1), took - (written - writing), written

    while True:
        (count, off, _), (count_on, on, written) = await phase(None), await phase(log)
        logged += count_on
        costs.append((off / count * 1e6, (on / count_on + written / logged) * 1e6))
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
