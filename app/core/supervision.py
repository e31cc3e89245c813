"""Supervision of background tasks: one that fails is logged, counted and restarted.

A panic of a library in Rust is no Exception, so everything is caught but what ends a task or the process.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.core.metrics import Metrics

logger = logging.getLogger(__name__)

RESTART_S = 1.0
ENDS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


async def supervise(
    name: str,
    run: Callable[[], Awaitable[None]],
    metrics: Metrics,
    *,
    on_failure: Callable[[BaseException], None] | None = None,
) -> None:
    """Run a background loop until it returns. Restart it after `RESTART_S` whenever it raises; `name` is logged."""
    while True:
        try:
            await run()
        except ENDS:
            raise
        except BaseException as error:
            logger.exception("the %s failed; restarting it in %g s", name, RESTART_S)
            metrics.task_failures.labels(name).inc()
            if on_failure is not None:
                on_failure(error)
            await asyncio.sleep(RESTART_S)
        else:
            return


async def stop(task: asyncio.Task[None] | None) -> None:
    """Cancel a background task, if there is one, and wait for its end."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
