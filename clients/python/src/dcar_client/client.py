"""`Client` and `AsyncClient`: the same methods, synchronous and asynchronous.

- Responses are the models of `dcar_client.models`; every error response is a
  `ServiceError`.
- An attempt has a deadline, and a response the limits of `dcar_client.limits`.
- 429 and 503 are retried after the time in `Retry-After`; connections that cannot be
  opened are retried too.
"""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from dcar_client import calls
from dcar_client.calls import (
    Call,
    ItemFields,
    NewEvent,
    NewItem,
    NewQuery,
    path_segment,
)
from dcar_client.errors import error_from
from dcar_client.limits import (
    aread_bounded,
    clean_errors,
    deadline,
    end_at_deadline,
    read_bounded,
)
from dcar_client.models import (
    Collection,
    EmbeddingsResponse,
    FeedbackResponse,
    HealthResponse,
    ItemResponse,
    ItemsResponse,
    JobResponse,
    ReadinessResponse,
    ReloadResponse,
    SearchOptions,
    SearchResponse,
    TaughtConcept,
)
from dcar_client.retries import CONNECT_WAIT_S, RETRIED_ERRORS, wait_after

T = TypeVar("T")


class Client:
    """Synchronous client of one service. Use it as a context manager, or call `close`.

    Args:
        url: address of the service, such as http://127.0.0.1:8000. A user and password
            in it are sent as basic authentication.
        key: an API key, or the admin key for `reload` and changes of items and
            collections.
        collection: the collection to search; None for the default one.
        timeout_s: seconds after which an attempt fails, connection and whole response
            included.
        retries: further attempts after 429, 503 or a connection that cannot be opened.
        max_wait_s: the longest wait between attempts; a longer `Retry-After` is an
            error.
        transport: an httpx transport, for proxies or tests.
        sleep: the function that waits between attempts.

    Raises:
        ValueError: `collection` is "." or "..".
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        collection: str | None = None,
        timeout_s: float = 15.0,
        retries: int = 2,
        max_wait_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._prefix = _prefix(collection)
        self._http = httpx.Client(
            **_address(url, key),
            timeout=timeout_s,
            transport=transport,
        )
        end_at_deadline(self._http)
        self._timeout_s = timeout_s
        self._retries = retries
        self._max_wait_s = max_wait_s
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search_text(
        self,
        query: str,
        **options: Unpack[SearchOptions],
    ) -> SearchResponse:
        """Find the images that a text describes."""
        return self._send(calls.search_text(self._prefix, query, options))

    def search_image(
        self,
        image: Path | str | bytes,
        query: str = "",
        **options: Unpack[SearchOptions],
    ) -> SearchResponse:
        """Find the images that resemble an image, given as a path or as bytes, and
        match the text `query`.
        """
        return self._send(calls.search_image(self._prefix, image, query, options))

    def search_batch(
        self,
        queries: Sequence[str | NewQuery],
        **options: Unpack[SearchOptions],
    ) -> list[SearchResponse]:
        """Run several searches by text or image in one request; responses are in the
        order of the queries.

        Args:
            queries: texts, or dicts of `query`, `image` and options that take
                precedence over the common `options`.
        """
        return self._send(calls.search_batch(self._prefix, queries, options))

    def embeddings(
        self,
        inputs: Sequence[str | bytes],
        *,
        model: str | None = None,
    ) -> EmbeddingsResponse:
        """Return the vectors of texts and image files by the model of a collection, the
        default one if None.
        """
        return self._send(calls.embeddings(inputs, model))

    def similar(self, item_id: str, *, k: int = 10, offset: int = 0) -> SearchResponse:
        """Find the items nearest to one of the gallery's items."""
        return self._send(calls.similar(self._prefix, item_id, k, offset))

    def items(
        self,
        *,
        filter: Mapping[str, Any] | None = None,
        k: int = 10,
        offset: int = 0,
        sort: str = "",
        group_by: str | None = None,
    ) -> ItemsResponse:
        """List items in index order or sorted, one of each group; `next_offset` is the
        start of the next page.
        """
        return self._send(calls.items(self._prefix, filter, k, offset, sort, group_by))

    def item(self, item_id: str) -> ItemResponse:
        """Return one item with all its metadata."""
        return self._send(calls.item(self._prefix, item_id))

    def image(self, item_id: str, *, size: int | None = None) -> bytes:
        """Return the image file of an item, or a thumbnail with a longer side of 192,
        384 or 1280 pixels.
        """
        return self._send(calls.image(self._prefix, item_id, size))

    def feedback(self, events: Sequence[NewEvent]) -> FeedbackResponse:
        """Report what was done with results, by the `query_id` of their response; the
        same event counts once.
        """
        return self._send(calls.feedback(events))

    def put_items(self, items: Sequence[NewItem]) -> JobResponse:
        """Add items, or replace those with the same ids, by a job; needs a key that may
        write.
        """
        return self._send(calls.put_items(self._prefix, items))

    def put_item(self, item: NewItem) -> JobResponse:
        """Add or replace one item, as `put_items` does."""
        return self._send(calls.put_item(self._prefix, item))

    def patch_items(
        self,
        fields: ItemFields,
        *,
        ids: Sequence[str] | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> JobResponse:
        """Merge fields into the items of some ids or of a filter, by a job; their
        images stay.
        """
        return self._send(calls.patch_items(self._prefix, fields, ids, filter))

    def patch_each(
        self,
        changes: Mapping[str, Mapping[str, Any]],
        *,
        by: str = "id",
    ) -> JobResponse:
        """Merge metadata into the items of each id, or of each value of another field,
        by a job.
        """
        return self._send(calls.patch_each(self._prefix, changes, by))

    def patch_item(self, item_id: str, fields: ItemFields) -> JobResponse:
        """Merge fields into one item, by a job; its image stays."""
        return self._send(calls.patch_item(self._prefix, item_id, fields))

    def delete_items(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
    ) -> JobResponse:
        """Remove the items of some ids or of a filter, by a job; needs a key that may
        write.
        """
        return self._send(calls.delete_items(self._prefix, ids, filter))

    def delete_item(self, item_id: str) -> JobResponse:
        """Remove one item, by a job."""
        return self._send(calls.delete_item(self._prefix, item_id))

    def jobs(self, *, limit: int = 20) -> list[JobResponse]:
        """Return the newest changes of items."""
        return self._send(calls.jobs(limit))

    def job(self, job_id: str) -> JobResponse:
        """Return the status of a job."""
        return self._send(calls.job(job_id))

    def wait_for_job(self, job_id: str, *, timeout_s: float = 600.0) -> JobResponse:
        """Return a job once it is done or failed. Raise TimeoutError if it is not in
        time.
        """
        waited_s = 0.0
        while (
            pause := calls.job_wait(status := self.job(job_id), waited_s, timeout_s)
        ) is not None:
            self._sleep(pause)
            waited_s += pause
        return status

    def teach(
        self,
        name: str,
        ids: Sequence[str],
        not_ids: Sequence[str] = (),
        kind: str = "",
    ) -> TaughtConcept:
        """Let `@name` stand for items like these in queries; needs a key that may
        write.
        """
        return self._send(calls.teach(self._prefix, name, ids, not_ids, kind))

    def concepts(self) -> list[TaughtConcept]:
        """List the taught names."""
        return self._send(calls.concepts(self._prefix))

    def concept(self, name: str) -> TaughtConcept:
        """Return a taught name with the ids that it was taught by."""
        return self._send(calls.concept(self._prefix, name))

    def forget(self, name: str) -> None:
        """Forget a taught name; needs a key that may write."""
        return self._send(calls.forget(self._prefix, name))

    def collections(self) -> list[Collection]:
        """List the served collections, the default one first."""
        return self._send(calls.collections())

    def put_collection(self, name: str, *, model: str | None = None) -> Collection:
        """Create a collection with the model of a served one, unless it exists; needs a
        key that may write.
        """
        return self._send(calls.put_collection(name, model))

    def delete_collection(self, name: str) -> None:
        """Drop a created collection with all of its items; needs a key that may
        write.
        """
        return self._send(calls.delete_collection(name))

    def health(self) -> HealthResponse:
        """Return whether the process is alive."""
        return self._send(calls.health())

    def readiness(self) -> ReadinessResponse:
        """Return whether searches are served, and from which index version."""
        return self._send(calls.readiness())

    def reload(self) -> ReloadResponse:
        """Load the published index version now; needs the admin key."""
        return self._send(calls.reload())

    def _send(self, call: Call[T]) -> T:
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            try:
                response = self._attempt(call)
            except RETRIED_ERRORS:
                if is_last:
                    raise
                self._sleep(CONNECT_WAIT_S)
                continue
            if response.is_success:
                return call.parse(response)
            wait = wait_after(response, self._max_wait_s)
            if wait is None or is_last:
                raise error_from(response)
            self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self, call: Call[T]) -> httpx.Response:
        deadline.set(time.monotonic() + self._timeout_s)
        with (
            clean_errors(self._http.headers),
            self._http.stream(call.method, call.path, **call.arguments) as response,
        ):
            read_bounded(response)
            return response


class AsyncClient:
    """Asynchronous client of one service. Use it as an async context manager, or await
    `close`.

    Arguments are those of `Client`; `transport` and `sleep` are asynchronous.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        collection: str | None = None,
        timeout_s: float = 15.0,
        retries: int = 2,
        max_wait_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._prefix = _prefix(collection)
        self._http = httpx.AsyncClient(
            **_address(url, key),
            timeout=timeout_s,
            transport=transport,
        )
        self._timeout_s = timeout_s
        self._retries = retries
        self._max_wait_s = max_wait_s
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def search_text(
        self,
        query: str,
        **options: Unpack[SearchOptions],
    ) -> SearchResponse:
        """Find the images that a text describes."""
        return await self._send(calls.search_text(self._prefix, query, options))

    async def search_image(
        self,
        image: Path | str | bytes,
        query: str = "",
        **options: Unpack[SearchOptions],
    ) -> SearchResponse:
        """Find the images that resemble an image, given as a path or as bytes, and
        match the text `query`.
        """
        return await self._send(calls.search_image(self._prefix, image, query, options))

    async def search_batch(
        self,
        queries: Sequence[str | NewQuery],
        **options: Unpack[SearchOptions],
    ) -> list[SearchResponse]:
        """Run several searches by text or image in one request; responses are in the
        order of the queries.

        Args:
            queries: texts, or dicts of `query`, `image` and options that take
                precedence over the common `options`.
        """
        return await self._send(calls.search_batch(self._prefix, queries, options))

    async def embeddings(
        self,
        inputs: Sequence[str | bytes],
        *,
        model: str | None = None,
    ) -> EmbeddingsResponse:
        """Return the vectors of texts and image files by the model of a collection, the
        default one if None.
        """
        return await self._send(calls.embeddings(inputs, model))

    async def similar(
        self,
        item_id: str,
        *,
        k: int = 10,
        offset: int = 0,
    ) -> SearchResponse:
        """Find the items nearest to one of the gallery's items."""
        return await self._send(calls.similar(self._prefix, item_id, k, offset))

    async def items(
        self,
        *,
        filter: Mapping[str, Any] | None = None,
        k: int = 10,
        offset: int = 0,
        sort: str = "",
        group_by: str | None = None,
    ) -> ItemsResponse:
        """List items in index order or sorted, one of each group; `next_offset` is the
        start of the next page.
        """
        return await self._send(
            calls.items(self._prefix, filter, k, offset, sort, group_by)
        )

    async def item(self, item_id: str) -> ItemResponse:
        """Return one item with all its metadata."""
        return await self._send(calls.item(self._prefix, item_id))

    async def image(self, item_id: str, *, size: int | None = None) -> bytes:
        """Return the image file of an item, or a thumbnail with a longer side of 192,
        384 or 1280 pixels.
        """
        return await self._send(calls.image(self._prefix, item_id, size))

    async def feedback(self, events: Sequence[NewEvent]) -> FeedbackResponse:
        """Report what was done with results, by the `query_id` of their response; the
        same event counts once.
        """
        return await self._send(calls.feedback(events))

    async def put_items(self, items: Sequence[NewItem]) -> JobResponse:
        """Add items, or replace those with the same ids, by a job; needs a key that may
        write.
        """
        return await self._send(calls.put_items(self._prefix, items))

    async def put_item(self, item: NewItem) -> JobResponse:
        """Add or replace one item, as `put_items` does."""
        return await self._send(calls.put_item(self._prefix, item))

    async def patch_items(
        self,
        fields: ItemFields,
        *,
        ids: Sequence[str] | None = None,
        filter: Mapping[str, Any] | None = None,
    ) -> JobResponse:
        """Merge fields into the items of some ids or of a filter, by a job; their
        images stay.
        """
        return await self._send(calls.patch_items(self._prefix, fields, ids, filter))

    async def patch_each(
        self,
        changes: Mapping[str, Mapping[str, Any]],
        *,
        by: str = "id",
    ) -> JobResponse:
        """Merge metadata into the items of each id, or of each value of another field,
        by a job.
        """
        return await self._send(calls.patch_each(self._prefix, changes, by))

    async def patch_item(self, item_id: str, fields: ItemFields) -> JobResponse:
        """Merge fields into one item, by a job; its image stays."""
        return await self._send(calls.patch_item(self._prefix, item_id, fields))

    async def delete_items(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
    ) -> JobResponse:
        """Remove the items of some ids or of a filter, by a job; needs a key that may
        write.
        """
        return await self._send(calls.delete_items(self._prefix, ids, filter))

    async def delete_item(self, item_id: str) -> JobResponse:
        """Remove one item, by a job."""
        return await self._send(calls.delete_item(self._prefix, item_id))

    async def jobs(self, *, limit: int = 20) -> list[JobResponse]:
        """Return the newest changes of items."""
        return await self._send(calls.jobs(limit))

    async def job(self, job_id: str) -> JobResponse:
        """Return the status of a job."""
        return await self._send(calls.job(job_id))

    async def wait_for_job(
        self,
        job_id: str,
        *,
        timeout_s: float = 600.0,
    ) -> JobResponse:
        """Return a job once it is done or failed. Raise TimeoutError if it is not in
        time.
        """
        waited_s = 0.0
        while (
            pause := calls.job_wait(
                status := await self.job(job_id),
                waited_s,
                timeout_s,
            )
        ) is not None:
            await self._sleep(pause)
            waited_s += pause
        return status

    async def teach(
        self,
        name: str,
        ids: Sequence[str],
        not_ids: Sequence[str] = (),
        kind: str = "",
    ) -> TaughtConcept:
        """Let `@name` stand for items like these in queries; needs a key that may
        write.
        """
        return await self._send(calls.teach(self._prefix, name, ids, not_ids, kind))

    async def concepts(self) -> list[TaughtConcept]:
        """List the taught names."""
        return await self._send(calls.concepts(self._prefix))

    async def concept(self, name: str) -> TaughtConcept:
        """Return a taught name with the ids that it was taught by."""
        return await self._send(calls.concept(self._prefix, name))

    async def forget(self, name: str) -> None:
        """Forget a taught name; needs a key that may write."""
        return await self._send(calls.forget(self._prefix, name))

    async def collections(self) -> list[Collection]:
        """List the served collections, the default one first."""
        return await self._send(calls.collections())

    async def put_collection(
        self,
        name: str,
        *,
        model: str | None = None,
    ) -> Collection:
        """Create a collection with the model of a served one, unless it exists; needs a
        key that may write.
        """
        return await self._send(calls.put_collection(name, model))

    async def delete_collection(self, name: str) -> None:
        """Drop a created collection with all of its items; needs a key that may
        write.
        """
        return await self._send(calls.delete_collection(name))

    async def health(self) -> HealthResponse:
        """Return whether the process is alive."""
        return await self._send(calls.health())

    async def readiness(self) -> ReadinessResponse:
        """Return whether searches are served, and from which index version."""
        return await self._send(calls.readiness())

    async def reload(self) -> ReloadResponse:
        """Load the published index version now; needs the admin key."""
        return await self._send(calls.reload())

    async def _send(self, call: Call[T]) -> T:
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            try:
                response = await self._attempt(call)
            except RETRIED_ERRORS:
                if is_last:
                    raise
                await self._sleep(CONNECT_WAIT_S)
                continue
            if response.is_success:
                return call.parse(response)
            wait = wait_after(response, self._max_wait_s)
            if wait is None or is_last:
                raise error_from(response)
            await self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self, call: Call[T]) -> httpx.Response:
        try:
            with clean_errors(self._http.headers):
                async with (
                    asyncio.timeout(self._timeout_s),
                    self._http.stream(
                        call.method,
                        call.path,
                        **call.arguments,
                    ) as response,
                ):
                    await aread_bounded(response)
                    return response
        except TimeoutError:
            raise httpx.ReadTimeout(
                "the attempt takes longer than the timeout"
            ) from None


def _prefix(collection: str | None) -> str:
    return "" if collection is None else f"/collections/{path_segment(collection)}"


def _address(url: str, key: str | None) -> dict[str, Any]:
    """Return arguments of httpx's clients: an address without credentials, which logs
    may contain, and these apart.
    """
    address = httpx.URL(url)
    headers = {"Accept-Encoding": "gzip"}
    if address.userinfo:
        user = f"{address.username}:{address.password}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(user).decode()}"
    elif key:
        headers["Authorization"] = f"Bearer {key}"
    return {"base_url": address.copy_with(userinfo=b""), "headers": headers}
