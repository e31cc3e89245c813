"""Circuit breaker: a failing store is not used for a while, so callers do not wait for it again and again."""

import logging
import time

logger = logging.getLogger(__name__)


class CircuitBreaker:
    """Open after `failures` in a row; then `allows()` returns False for `pause_s`, and then True for one trial.

    Args:
        failures: in a row, until it opens.
        pause_s: seconds between two trials.
        purpose: named in the log as unavailable while it is open.
    """

    def __init__(self, failures: int = 3, pause_s: float = 5.0, *, purpose: str = "the cache") -> None:
        self._limit = failures
        self._pause = pause_s
        self._purpose = purpose
        self._failures = 0
        self._retry_at = 0.0

    @property
    def is_open(self) -> bool:
        """True from the last of `failures` in a row until the next success."""
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Return True if the store may be used now."""
        if not self.is_open:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._pause  # one trial, not a stampede
        return True

    def succeeded(self) -> None:
        """Record a success."""
        if self.is_open:
            logger.info("Redis responds again; %s resumed", self._purpose)
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Record a failure, or a response that came too late."""
        self._failures += 1
        if self._failures == self._limit:
            logger.warning(
                "Redis failed (%s); continuing without %s", str(error) or type(error).__name__, self._purpose
            )
        if self.is_open:
            self._retry_at = time.monotonic() + self._pause
