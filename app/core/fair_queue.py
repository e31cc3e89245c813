"""Turns among callers: of batches, threads, decoding processes and asynchronous work. For one event loop.

- The next turn is the caller's that has had the least time (or turns), and then the request's.
- A new caller begins with the least that another one has had, so nobody is passed over for ever.
- A caller or request without turns left is forgotten.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from app.core.logs import request_id
from app.core.rate_limit import current_caller


@dataclass(eq=False, slots=True)
class Turn:
    """A place in a queue. It is given up by cancelling its future."""

    item: Any
    future: asyncio.Future[Any]
    caller: str = field(default_factory=current_caller.get)
    request: str | None = field(default_factory=request_id.get)
    arrived: float = field(default_factory=monotonic)
    started: float = 0.0


class FairQueue:
    """A queue of the turns that wait, and of those that have begun."""

    def __init__(self) -> None:
        self._had: dict[tuple[str | None, ...], float] = {}  # by a caller, and by a caller's request
        self._left = Counter[tuple[str | None, ...]]()  # turns that have not ended
        self.waiting: list[Turn] = []
        self.running: list[Turn] = []

    def put(self, item: Any, future: asyncio.Future[Any]) -> Turn:
        """Queue an item of the current caller and request."""
        turn = Turn(item, future)
        for key in ((turn.caller,), (turn.caller, turn.request)):
            if not self._left[key]:
                peers = (had for other, had in self._had.items() if len(other) == len(key) and other[:-1] == key[:-1])
                self._had[key] = min(peers, default=0.0)
            self._left[key] += 1
        self.waiting.append(turn)
        return turn

    def take(self, may_start: Callable[[Turn], bool] = lambda _: True) -> Turn | None:
        """Begin the next turn of those that may start; None if there is none."""
        for gone in [turn for turn in self.waiting if turn.future.cancelled()]:
            self.waiting.remove(gone)
            self._leave(gone, 0.0)
        ready, had = filter(may_start, self.waiting), self._had
        turn = min(ready, key=lambda turn: (had[turn.caller,], had[turn.caller, turn.request]), default=None)
        if turn is not None:
            self.waiting.remove(turn)
            self.running.append(turn)
            turn.started = monotonic()
        return turn

    def end(self, turn: Turn, cost: float | None = None) -> None:
        """End a turn that has begun. cost: what it counts; the seconds since its beginning by default."""
        self.running.remove(turn)
        self._leave(turn, monotonic() - turn.started if cost is None else cost)

    def _leave(self, turn: Turn, cost: float) -> None:
        for key in ((turn.caller,), (turn.caller, turn.request)):
            self._had[key] += cost
            self._left[key] -= 1
            if not self._left[key]:
                del self._left[key], self._had[key]


class FairTurns(FairQueue):
    """Turns of asynchronous work.

    Args:
        slots: turns at a time.
        each: turns of one caller at a time.
        may_start: a further condition.
    """

    def __init__(self, slots: int, each: int, may_start: Callable[[Turn], bool] = lambda _: True) -> None:
        super().__init__()
        self._slots, self._each, self._condition = slots, each, may_start

    async def begin(self, item: Any = None) -> Turn:
        """Wait for a turn, which the caller has to end."""
        turn = self.put(item, asyncio.get_running_loop().create_future())
        self._start()
        try:
            await turn.future
        except asyncio.CancelledError:
            if not turn.future.cancelled():  # it has begun
                self.end(turn)
            raise
        return turn

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it."""
        turn = await self.begin()
        try:
            yield
        finally:
            self.end(turn)

    def end(self, turn: Turn, cost: float | None = None) -> None:
        super().end(turn, cost)
        self._start()

    def _start(self) -> None:
        while len(self.running) < self._slots and (turn := self.take(self._may_start)) is not None:
            turn.future.set_result(None)

    def _may_start(self, turn: Turn) -> bool:
        own = sum(other.caller == turn.caller for other in self.running)
        return own < self._each and self._condition(turn)
