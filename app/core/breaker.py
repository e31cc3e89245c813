"""A store that fails is left alone for a while, so that nobody waits for it again and again."""

import logging
import time

log = logging.getLogger(__name__)


class Breaker:
    """Open after `failures` in a row: then `allows()` is False for `pause_s`, and True once for a trial after that.

    Args:
        does: what is not done while it is open, for the log.
    """

    def __init__(self, failures: int = 3, pause_s: float = 5.0, *, does: str = "the cache") -> None:
        self._limit = failures
        self._pause = pause_s
        self._does = does
        self._failures = 0
        self._retry_at = 0.0

    @property
    def open(self) -> bool:
        """Whether the last word was that the store is out of order."""
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Whether to try the store now."""
        if not self.open:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._pause  # one trial, not a stampede
        return True

    def succeeded(self) -> None:
        """The store answered."""
        if self.open:
            log.info("Redis is back; %s in use again", self._does)
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """The store did not answer, or not in time."""
        self._failures += 1
        if self._failures == self._limit:
            log.warning("Redis fails (%s); going on without %s", str(error) or type(error).__name__, self._does)
        if self.open:
            self._retry_at = time.monotonic() + self._pause
