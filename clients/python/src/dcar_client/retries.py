"""When to send a request again, and after how many seconds."""

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

RETRIED_STATUSES = frozenset({429, 503})
# nothing was sent, so sending again is safe
RETRIED_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout)
CONNECT_WAIT_S = 0.5
DEFAULT_WAIT_S = 1.0


def wait_after(response: httpx.Response, max_wait_s: float) -> float | None:
    """Return the seconds to wait before the next attempt; None if the response is
    final.

    A response is final unless its status is 429 or 503. A `Retry-After` beyond
    `max_wait_s` is final too: an earlier attempt would be refused again.
    """
    if response.status_code not in RETRIED_STATUSES:
        return None
    seconds = _retry_after(response.headers.get("retry-after", ""))
    return seconds if seconds <= max_wait_s else None


def _retry_after(value: str) -> float:
    """Parse `Retry-After`, which is a number of seconds or an HTTP date;
    `DEFAULT_WAIT_S` if it is neither.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return DEFAULT_WAIT_S
        return max(0.0, seconds)
    return DEFAULT_WAIT_S if math.isnan(seconds) or seconds < 0 else seconds
