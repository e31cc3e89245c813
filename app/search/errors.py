"""Errors of the search engine.

- Each error carries its facts as attributes; `str(error)` is one sentence for the caller.
- The engine knows nothing of HTTP: `app.api.error_handlers` maps each class to a response.
"""

from collections.abc import Sequence

from dcar_core.util.errors import DcarError

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
    """One query of a batch failed; `cause` says why.

    Attributes:
        number: position of the query in the batch, from 0.
    """

    def __init__(self, number: int, cause: SearchError) -> None:
        super().__init__(f"query {number}: {cause}")
        self.number = number
        self.cause = cause


class ItemNotFoundError(SearchError):
    """The index has no item of this id.

    Attributes:
        field: the field of the query that names the item, or "id" when the item itself was requested.
    """

    def __init__(self, item_id: str, field: str = "id") -> None:
        self.shown_id = repr(item_id[:_MAX_SHOWN])
        super().__init__(f"There is no item {self.shown_id} in the index.")
        self.item_id = item_id
        self.field = field


class CollectionNotFoundError(SearchError):
    """No collection of this name is served."""

    def __init__(self, name: str, available: Sequence[str]) -> None:
        shown = repr(name[:_MAX_SHOWN])
        super().__init__(f"There is no collection {shown}; available: {', '.join(available)}.")
        self.name = name
        self.available = tuple(available)


class ImageUnavailableError(SearchError):
    """The gallery no longer has the image of an item."""

    def __init__(self) -> None:
        super().__init__("The image of this item is no longer in the gallery.")


class UnsupportedQueryError(SearchError):
    """The served index or model does not support this kind of query.

    Attributes:
        field: the field of the query that asks for it, if there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class MissingVectorsError(UnsupportedQueryError):
    """The index does not keep the vectors of its items."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"This query needs the vectors of items, and the index does not keep them: {reason}")


class NotCalibratedError(UnsupportedQueryError):
    """The index has no calibrated score cut-off."""

    def __init__(self) -> None:
        message = "This index was built without --validation and has no calibrated cut-off; give min_score as a number."
        super().__init__(message, field="min_score")


class MissingTokenWeightsError(UnsupportedQueryError):
    """The model was trained without token weights."""

    def __init__(self) -> None:
        super().__init__("This model was trained without token weights, so it cannot re-rank; leave `rerank` out.")


class MissingImagesError(UnsupportedQueryError):
    """The gallery no longer has the image of any result."""

    def __init__(self) -> None:
        super().__init__("This query needs the images of its results, and none of them is in the gallery any more.")


class UnavailableError(SearchError):
    """The service is temporarily unavailable.

    Attributes:
        retry_after_s: seconds after which a retry may succeed.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReadyError(UnavailableError):
    """No index is loaded yet, or the service is shutting down."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, retry_after_s=2)


class OverloadedError(UnavailableError):
    """The queue is full."""

    def __init__(self, retry_after_s: float = 1) -> None:
        super().__init__("The service is busy.", retry_after_s)


class DeadlineError(UnavailableError):
    """The search did not finish before its deadline."""

    def __init__(self) -> None:
        super().__init__("The search took too long and was cancelled.", retry_after_s=1)


class ModelUnavailableError(UnavailableError):
    """Re-ranking and explanations need the full model, which cannot be loaded."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"This query needs the full model, which cannot be loaded: {reason}", retry_after_s=30)
