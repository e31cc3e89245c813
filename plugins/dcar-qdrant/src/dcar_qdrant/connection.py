"""Clients of Qdrant, and calls that end.

- Calls are repeated after a pause if the server is busy or the connection breaks, and
  end after a time limit.
- A server that does not respond is tried by one read at a time. Others fail at once, so
  no thread waits for it.
- A location is the URL of a server. A folder, or `:memory:`, is the client's local
  mode, which compares every vector. One process at a time can open a folder.
"""

import atexit
import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from dcar_core.util.errors import StoreUnavailableError

API_KEY = "QDRANT_API_KEY"
CALL_SECONDS = 30
READ_SECONDS = 4  # of one attempt, so that all end before a request of the service does
REST_SECONDS = 1  # between reads of a server that does not respond
PAUSE_SECONDS = 0.2  # before the second attempt; then twice as long each time
_ATTEMPTS = 4
_READ_ATTEMPTS = 2
_BUSY = frozenset({429, 500, 502, 503, 504})

T = TypeVar("T")


@lru_cache
def connect(location: str) -> QdrantClient:
    """Return the client of a location; threads share it."""
    arguments: dict[str, Any] = (
        {"location": location} if location == ":memory:" else {"path": location}
    )
    if "://" in location:
        key = os.environ.get(API_KEY, "").strip()  # files of secrets end with a newline
        # the client's error would show it
        if not (key.isascii() and key.isprintable()):
            raise StoreUnavailableError(
                f"Qdrant is unavailable: {API_KEY} has characters that no key has"
            )
        arguments = {
            "url": location,
            "api_key": key or None,
            "timeout": CALL_SECONDS,
            "check_compatibility": False,
        }
    client = call(
        lambda: QdrantClient(**arguments, force_disable_check_same_thread=True)
    )
    atexit.register(client.close)  # later, the local mode could not
    return client


def call(function: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
    """Call Qdrant. Raise StoreUnavailableError if it refuses, or does not respond in
    several attempts.
    """
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:
            if attempt + 1 == attempts or not _is_temporary(error):
                is_refused = getattr(error, "status_code", None) in (401, 403)
                reason = (
                    f"it refuses the key of {API_KEY}: " * is_refused
                    + " ".join(str(error).split())[:300]
                )
                raise StoreUnavailableError(
                    f"Qdrant is unavailable: {reason}"
                ) from error
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError


def _is_temporary(error: Exception) -> bool:
    is_busy = isinstance(error, UnexpectedResponse) and error.status_code in _BUSY
    return is_busy or isinstance(
        error, ResponseHandlingException | ResourceExhaustedResponse
    )


class Reads:
    """Reads from one server, for all threads."""

    def __init__(self) -> None:
        self._fault = ""
        self._retry_at = 0.0
        self._responded = 0.0

    def __call__(self, function: Callable[[], T]) -> T:
        """As `call`. While the server does not respond, one read at a time tries it,
        and others fail at once.
        """
        began = time.monotonic()
        if self._fault:
            if began < self._retry_at:
                raise StoreUnavailableError(self._fault)
            self._retry_at = began + _READ_ATTEMPTS * READ_SECONDS
        try:
            result = call(function, _READ_ATTEMPTS)
        except StoreUnavailableError as error:
            # it has responded
            if not isinstance(error.__cause__, ResponseHandlingException):
                self._fault = ""
            elif self._responded < began:  # to no read meanwhile
                self._fault = str(error)
                self._retry_at = time.monotonic() + REST_SECONDS
            raise
        self._responded = time.monotonic()
        self._fault = ""
        return result


@lru_cache
def reads(location: str) -> Reads:
    """Return the reads of a location, which its collections share."""
    return Reads()
