"""Turns among callers: of threads, decoding processes, batches, and asynchronous work.

- The next turn is the caller's that has had the least time (or turns), and then the request's.
- A new caller begins with the least that another one has had, so nobody is passed over for ever.
- A caller or request without turns left is forgotten.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from app.core.logs import request_id
from app.core.rate_limit import current_caller


@dataclass(eq=False, slots=True)
class _Share:
    """What a caller, or a request, has had. left: its turns that have not ended. parts: the requests of a caller."""

    had: float = 0.0
    left: int = 0
    parts: dict[str | None, "_Share"] = field(default_factory=dict)

    def add(self, name: str | None) -> "_Share":
        if name not in self.parts:
            self.parts[name] = _Share(min((other.had for other in self.parts.values()), default=0.0))
        self.parts[name].left += 1
        return self.parts[name]

    def end(self, name: str | None, cost: float) -> None:
        part = self.parts[name]
        part.had, part.left = part.had + cost, part.left - 1
        if not part.left:
            del self.parts[name]


@dataclass(eq=False, slots=True)
class Turn:
    """A place in a queue. It is given up by cancelling its future."""

    item: Any
    future: Any  # of asyncio or concurrent.futures
    caller: str = field(default_factory=current_caller.get)
    request: str | None = field(default_factory=request_id.get)
    started: float = 0.0


class FairQueue:
    """A queue that any thread may use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all = _Share()
        self.waiting: list[Turn] = []
        self.running: list[Turn] = []

    def put(self, item: Any, future: Any) -> Turn:
        """Queue an item of the current caller and request."""
        turn = Turn(item, future)
        with self._lock:
            self._all.add(turn.caller).add(turn.request)
            self.waiting.append(turn)
        return turn

    def take(self, may_start: Callable[[Turn], bool] = lambda _: True) -> Turn | None:
        """Begin the next turn of those that may start; None if there is none."""
        with self._lock:
            for turn in [turn for turn in self.waiting if turn.future.cancelled()]:
                self.waiting.remove(turn)
                self._leave(turn, 0.0)
            ready = [*filter(may_start, self.waiting)]
            if not ready:
                return None
            caller = min(ready, key=lambda turn: self._all.parts[turn.caller].had).caller
            requests = self._all.parts[caller].parts
            turn = min((turn for turn in ready if turn.caller == caller), key=lambda turn: requests[turn.request].had)
            self.waiting.remove(turn)
            self.running.append(turn)
            turn.started = monotonic()
            return turn

    def end(self, turn: Turn, cost: float | None = None) -> None:
        """End a turn that has begun. cost: what it counts; the seconds since its beginning by default."""
        with self._lock:
            self.running.remove(turn)
            self._leave(turn, monotonic() - turn.started if cost is None else cost)

    def _leave(self, turn: Turn, cost: float) -> None:
        self._all.parts[turn.caller].end(turn.request, cost)
        self._all.end(turn.caller, cost)


class FairTurns(FairQueue):
    """Turns of asynchronous work in one event loop.

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
