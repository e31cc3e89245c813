"""Errors of the search engine.

- Each error carries its facts as attributes; `str(error)` is one sentence for the
  caller.
- The engine knows nothing of HTTP: `app.api.responses` maps each class to a response.
"""

import re
from pathlib import Path

from dcar_core.util.errors import DcarError, ImageError

# of an absolute path, but not of a URL
_DIRECTORIES = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)*")
_MAX_SHOWN = 200  # characters of a name that a caller sent


class SearchError(DcarError):
    """Base class of the engine's errors."""


class InvalidQueryError(SearchError):
    """One field of a query has an unusable value."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class BatchQueryError(SearchError):
    """One query of a batch, counted from 0, failed because of `cause`."""

    def __init__(self, number: int, cause: SearchError | ImageError) -> None:
        super().__init__(f"query {number}: {cause}")
        self.number = number
        self.cause = cause


class ItemNotFoundError(SearchError):
    """The index has no item of this id. field: the field of the query that names it, or
    "id" of a request for it.
    """

    def __init__(self, item_id: str, field: str) -> None:
        self.shown_id = repr(item_id[:_MAX_SHOWN])
        super().__init__(f"There is no item {self.shown_id} in the index.")
        self.field = field


class CollectionNotFoundError(SearchError):
    """No collection of this name is served. field: the field of the request that names
    it.
    """

    def __init__(self, name: str, field: str) -> None:
        super().__init__(f"There is no collection {name[:_MAX_SHOWN]!r}.")
        self.field = field


class ImageUnavailableError(SearchError):
    """The gallery no longer has the image of an item."""

    def __init__(self) -> None:
        super().__init__("The image of this item is no longer in the gallery.")


class UnsupportedQueryError(SearchError):
    """The served index or model does not support this kind of query, because of `field`
    if it is given.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnavailableError(SearchError):
    """The service is busy, not ready or shutting down; a retry may succeed after
    `retry_after_s`.
    """

    def __init__(self, message: str, retry_after_s: float = 2) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def without_directories(message: str, index: Path) -> str:
    """Shorten absolute paths in a message to their last part."""
    for directory in (index.absolute(), index.resolve()):
        message = message.replace(str(directory), index.resolve().name)
    return _DIRECTORIES.sub("", message)
