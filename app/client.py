"""A typed client of the service, over httpx: `pip install 'dcar[client]'`.

    from app.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for result in client.search_text("crying cat", k=3).results:
            print(result.score, result.id, result.caption)

- Answers are the models of `app.api.schemas`; every error of the service is a `ServiceError` with its problem document.
- 429 and 503 are tried again after the time that the service names, a few times; nothing else is.
- What answers but is not the service, such as a proxy's page, is a `ServiceError` too.
- Nothing of the service itself is imported: no model, no index.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from app.api.schemas import (
    BatchResponse,
    Collection,
    CollectionsResponse,
    ItemResponse,
    ItemsResponse,
    ProblemResponse,
    ReadinessResponse,
    ReloadResponse,
    SearchResponse,
)
from dcar_core.util.errors import DcarError, MissingExtraError

try:
    import httpx
except ImportError:  # pragma: no cover - the tests have it
    raise MissingExtraError("the client", "client") from None

M = TypeVar("M", bound=BaseModel)

_AGAIN = frozenset({429, 503})
_LONGEST_PAUSE_S = 30.0


class SearchOptions(TypedDict, total=False):
    """What every search can be told; the service's documentation at /docs says what each means."""

    k: int
    offset: int
    filter: dict[str, Any]
    min_score: float | Literal["auto"]
    more_like: list[str]
    less_like: list[str]
    without: str
    weights: dict[str, float]
    fields: list[str]
    fold: float
    rerank: bool
    explain: bool


class ServiceError(DcarError):
    """The service answered with an error. status: of HTTP; problem: its document, None when it sent none."""

    def __init__(self, status: int, problem: ProblemResponse | None, request_id: str | None) -> None:
        detail = problem.detail if problem is not None else "no explanation"
        super().__init__(f"{status}: {detail}" + (f" (request {request_id})" if request_id else ""))
        self.status = status
        self.problem = problem
        self.request_id = request_id


class Client:
    """Speaks to one service.

    Args:
        url: where it is, such as http://127.0.0.1:8000.
        key: an API key, or the admin key for `reload`.
        collection: None for the service's default one.
        timeout_s: in each attempt, how long nothing may come.
        retries: further attempts after 429, 503 or a connection that cannot be made.
        sleep: how to wait between attempts.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        collection: str | None = None,
        timeout_s: float = 15.0,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)
        self._prefix = "" if collection is None else f"/collections/{_segment(collection)}"
        self._retries = retries
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def search_text(self, query: str, **options: Unpack[SearchOptions]) -> SearchResponse:
        """Find the pictures that a text describes."""
        return self._ask(SearchResponse, "POST", f"{self._prefix}/search/text", json={"query": query, **options})

    def search_batch(
        self, queries: Sequence[str | Mapping[str, Any]], **options: Unpack[SearchOptions]
    ) -> list[SearchResponse]:
        """Several searches by words in one request; answers are in their order.

        Args:
            queries: each its words, or `query` and whatever options it has that differ from the common ones.
        """
        each = ({"query": query} if isinstance(query, str) else query for query in queries)
        body = {"queries": [{**options, **query} for query in each]}
        return self._ask(BatchResponse, "POST", f"{self._prefix}/search/batch", json=body).answers

    def search_image(
        self, picture: Path | str | bytes, query: str = "", **options: Unpack[SearchOptions]
    ) -> SearchResponse:
        """Find the pictures that are like the one given, as a file or its bytes, and like the words beside it."""
        import json

        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        fields: dict[str, Any] = {"query": query} if query else {}
        for name, value in options.items():
            fields[name] = value if name == "without" else json.dumps(value)
        path = f"{self._prefix}/search/image"
        return self._ask(SearchResponse, "POST", path, files={"file": ("picture", data)}, data=fields)

    def similar(self, item_id: str, *, k: int = 10, offset: int = 0) -> SearchResponse:
        """Find the items nearest to one of the gallery's own."""
        return self._ask(SearchResponse, "GET", self._item(item_id, "/similar"), params={"k": k, "offset": offset})

    def item(self, item_id: str) -> ItemResponse:
        """Everything that is known about an item."""
        return self._ask(ItemResponse, "GET", self._item(item_id))

    def items(self, *, filter: dict[str, Any] | None = None, k: int = 10, offset: int = 0) -> ItemsResponse:
        """What is in the gallery, in the order of the index; `next_offset` is where it goes on."""
        import json

        chosen = {} if filter is None else {"filter": json.dumps(filter)}
        return self._ask(ItemsResponse, "GET", f"{self._prefix}/items", params={"k": k, "offset": offset, **chosen})

    def image(self, item_id: str) -> bytes:
        """The picture of an item."""
        answer = self._send("GET", self._item(item_id, "/image"))
        if not answer.headers.get("content-type", "").startswith(("image/", "application/octet-stream")):
            raise _error(answer)
        return answer.content

    def collections(self) -> list[Collection]:
        """The domains that are served."""
        return self._ask(CollectionsResponse, "GET", "/collections").collections

    def ready(self) -> ReadinessResponse:
        """Whether searches are answered, by which version."""
        return self._ask(ReadinessResponse, "GET", "/readyz")

    def reload(self) -> ReloadResponse:
        """Serve what is published now; needs the admin key."""
        return self._ask(ReloadResponse, "POST", "/admin/reload")

    def _item(self, item_id: str, what: str = "") -> str:
        return f"{self._prefix}/items/{_segment(item_id)}{what}"

    def _ask(self, model: type[M], method: str, path: str, **given: Any) -> M:
        answer = self._send(method, path, **given)
        try:
            return model.model_validate_json(answer.content)
        except ValidationError:
            raise _error(answer) from None

    def _send(self, method: str, path: str, **given: Any) -> httpx.Response:
        left = self._retries
        while True:
            try:
                answer = self._http.request(method, path, **given)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if left == 0:
                    raise
                pause = 0.5
            else:
                if answer.is_success:
                    return answer
                if answer.status_code not in _AGAIN or left == 0:
                    raise _error(answer)
                pause = _pause(answer)
            left -= 1
            self._sleep(min(pause, _LONGEST_PAUSE_S))


def _segment(name: str) -> str:
    """A name as one part of a URL's path.

    Raises:
        ValueError: no part of a path can be it, since "." and ".." mean others.
    """
    if name in {".", ".."}:
        raise ValueError(f"{name!r} is no name of an item or a collection")
    return quote(name, safe="")


def _pause(answer: httpx.Response) -> float:
    try:
        seconds = float(answer.headers.get("retry-after", "1"))
    except ValueError:
        return 1.0
    return seconds if seconds >= 0 else 1.0  # nor is NaN a time


def _error(answer: httpx.Response) -> ServiceError:
    try:
        problem = ProblemResponse.model_validate_json(answer.content)
    except ValidationError:
        problem = None
    return ServiceError(answer.status_code, problem, answer.headers.get("x-request-id"))
