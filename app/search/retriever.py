"""From a query to ranked items.

    words, picture, items  -> vectors (`embedding`) -> their weighted sum -> rows (`finding`) -> re-ranking and
    explanations where asked for (`pairing`) -> items

- A search that takes less time than handing it to a thread is made at once; all others have threads.
- Each search takes one `Snapshot` and ends on it, whatever is published meanwhile.
- More than `max_pending` searches at a time are refused at once, so a queue cannot grow without end; so is one that the
  batcher could not take up soon. Each search has a deadline, and what is not wanted any more is not computed.
- Items' pictures have the same limits and threads of their own: a gallery may be a slow disk or another machine, and no
  search waits behind it.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from app.core.metrics import Metrics, Waiting
from app.core.problems import Late, Overloaded, Problem, field_problem
from app.core.settings import Settings
from app.core.threads import compute
from app.search.batching import Vector
from app.search.embedding import Embedder
from app.search.embedding_cache import VectorCache
from app.search.pairs import Explanation, Pairing, Words
from app.search.query import Query, SearchOptions
from app.search.ranking import Hit, find, matching, vectors_of
from app.search.snapshots import Snapshot
from dcar_core.util.cpu_features import available_cores
from dcar_core.util.errors import ArtifactError, ImageError
from index_jobs.store.artifact import Item

T = TypeVar("T")

_QUICK_DEPTH = 50  # results
_PICTURES = 8  # read from the gallery at a time


@dataclass(frozen=True, slots=True)
class Match:
    """One result; score is the inner product of unit vectors, the cosine. folded: ids of its near-duplicates."""

    item: Item
    score: float
    folded: list[str]
    reranked: float | None
    explanation: Explanation | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found, by which version, and whether the query's embedding came from the cache.

    offset: results before these. next_offset: where the next page begins, None after the last. min_score: the cut-off
    that was applied. fields: of the metadata, that each result is to have.
    """

    version: int
    matches: list[Match]
    cached: bool
    took_ms: float
    offset: int
    next_offset: int | None
    min_score: float | None
    words: Words | None
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """Some items, and how many there are in all; see `Answer`."""

    version: int
    count: int
    items: list[Item]
    next_offset: int | None


class Retriever:
    """The query path; one per process."""

    def __init__(self, settings: Settings, cache: VectorCache, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._settings = settings
        self._pending = Counter[Waiting]()
        self._embedder = Embedder(settings, cache, self._metrics)
        self._pool = ThreadPoolExecutor(
            min(4, available_cores()),
            thread_name_prefix="dcar-search",
            initializer=_search_thread,
        )
        self._pictures = ThreadPoolExecutor(_PICTURES, thread_name_prefix="dcar-picture")
        self._pairing = Pairing(self._embedder, self._pictures)

    def start(self) -> None:
        """Begin to work; must be called with the event loop running."""
        self._embedder.start()

    async def close(self) -> None:
        """Finish what was accepted, then let threads and connections go."""
        await self._embedder.close()
        self._pool.shutdown()
        self._pictures.shutdown(wait=False, cancel_futures=True)

    def require_room(self) -> None:
        """See `Batcher.require_room`."""
        self._embedder.require_room()

    async def search(self, snapshot: Snapshot, search: Query) -> Answer:
        """The items that a search is for.

        Raises:
            ImageError: the picture cannot be read; the message is the reason.
            Problem: what is asked for cannot be done.
        """
        for words in (search.text, search.without):
            if words:
                self._embedder.require_room_for(snapshot, words)
        async with self._admitted():
            return await self._answer(snapshot, search)

    async def search_all(self, snapshot: Snapshot, searches: Sequence[Query]) -> list[Answer]:
        """Several searches, answered by one version; one that cannot be answered fails them all, under its number."""
        turns = asyncio.Semaphore(1 if any(_is_long(each) for each in searches) else len(searches))

        async def answer(search: Query) -> Answer:
            async with turns:  # re-ranked all at once, they would be too much for the model's queue
                return await self._answer(snapshot, search)

        async with self._admitted(len(searches)):
            answers = await asyncio.gather(*map(answer, searches), return_exceptions=True)
        for number, found in enumerate(answers):
            if isinstance(found, Problem):
                raise found.within(f"queries.{number}")
            if isinstance(found, BaseException):
                raise found
        return [found for found in answers if isinstance(found, Answer)]

    async def item(self, snapshot: Snapshot, item_id: str) -> tuple[int, Item]:
        """An item and the version that knows it."""
        row = _row(snapshot, item_id, "id")
        return snapshot.version, await self._in_pool(snapshot.artifact.item, row)

    async def items(self, snapshot: Snapshot, filter: dict[str, Any] | None, offset: int, count: int) -> Listed:
        """Some of the items that fulfil a filter, in the order of the index.

        Raises:
            Problem: the filter does not fit the index.
        """

        def look() -> Listed:
            rows = np.flatnonzero(snapshot.artifact.live if filter is None else matching(snapshot, filter))
            items = [snapshot.artifact.item(int(row)) for row in rows[offset : offset + count]]
            following = offset + count if len(rows) > offset + count else None
            return Listed(snapshot.version, len(rows), items, following)

        async with self._admitted():
            return await self._in_pool(look)

    async def picture(self, snapshot: Snapshot, item_id: str) -> tuple[bytes, str]:
        """The bytes of an item's picture, from the gallery, and what tells them from others: 32 hex digits."""
        row = _row(snapshot, item_id, "id")

        def read() -> tuple[bytes, str]:
            data = snapshot.artifact.image_bytes(row)
            return data, hashlib.blake2b(data, digest_size=16).hexdigest()

        try:
            async with self._admitted(to="pictures"):
                return await asyncio.get_running_loop().run_in_executor(self._pictures, read)
        except (ArtifactError, ImageError, OSError):
            raise Problem(404, "The picture of this item is no longer in the gallery.") from None

    async def _answer(self, snapshot: Snapshot, search: Query) -> Answer:
        began = time.perf_counter()
        options = search.options
        _require_fields(snapshot, options.fields)
        if options.rerank and not search.text:
            raise field_problem("rerank", "weighs the words of a query, and there are none")
        more = [_row(snapshot, each, "more_like") for each in options.more_like]
        if search.item is not None:
            more.append(_row(snapshot, search.item, "id"))
        less = [_row(snapshot, each, "less_like") for each in options.less_like]
        vector, cached = await self._vector(snapshot, search, more, less)
        end = options.offset + options.k
        reranked = self._settings.rerank_depth if options.rerank else 0
        min_score = _min_score(snapshot, search)

        def look() -> tuple[list[Hit], list[Match]]:
            hits = find(
                snapshot,
                vector,
                max(end + 1, reranked),
                without={*more, *less},
                filter=options.filter,
                min_score=min_score,
                fold=options.fold,
            )
            final = not (reranked or options.explain)  # most searches: the thread is asked once
            return hits, _matches(snapshot, hits[options.offset : end], []) if final else []

        with self._metrics.timed("search"):
            hits, matches = _at_once(look) if _is_quick(snapshot, options, end) else await self._in_pool(look)
        if reranked and options.offset < reranked:
            with self._metrics.timed("rerank"):
                hits = await self._pairing.rerank(snapshot, search.text, hits[:reranked]) + hits[reranked:]
        shown = hits[options.offset : end]
        words: Words | None = None
        explanations: Sequence[Explanation | None] = []
        if options.explain:
            with self._metrics.timed("explain"):
                words = await self._pairing.words(snapshot, search.text) if search.text else None
                explained = shown[: self._settings.explain_results]
                explanations = await self._pairing.explain(snapshot, search.text, vector, explained)
        if reranked or options.explain:
            matches = await self._in_pool(_matches, snapshot, shown, explanations)
        following = end if len(hits) > end and end + options.k <= self._settings.max_window else None
        took_ms = (time.perf_counter() - began) * 1000
        return Answer(
            snapshot.version,
            matches,
            cached,
            took_ms,
            options.offset,
            following,
            min_score,
            words,
            options.fields,
        )

    async def _vector(self, snapshot: Snapshot, search: Query, more: list[int], less: list[int]) -> tuple[Vector, bool]:
        """The query as one vector (E,): the weighted sum of its parts, or its only part as it is."""
        weights = search.options.weights
        parts: list[tuple[float, Vector]] = []
        cached = bool(search.text or search.picture)
        for weight, vector, known in await self._texts(snapshot, search):
            parts.append((weight, vector))
            cached &= known
        if search.picture is not None:
            vector, known = await self._embedder.picture(snapshot, search.picture)
            parts.append((weights.image, vector))
            cached &= known
        for weight, rows in ((weights.more, more), (-weights.less, less)):
            if rows:
                vectors = await self._in_pool(vectors_of, snapshot, rows)
                parts.append((weight, vectors.mean(0)))
        if not any(weight for weight, _ in parts):
            raise field_problem("weights", "leave nothing of this query")
        if len(parts) == 1 and len(more) < 2:
            return parts[0][1], cached
        most = max(abs(weight) for weight, _ in parts)  # only their ratio counts, and tiny ones would vanish
        total = np.sum([weight / most * vector for weight, vector in parts], 0)
        length = float(np.linalg.norm(total))
        if length < 1e-4 * sum(abs(weight) / most for weight, _ in parts):
            raise field_problem("weights", "the parts of this query cancel each other out")
        return (total / length).astype(np.float32), cached

    async def _texts(self, snapshot: Snapshot, search: Query) -> list[tuple[float, Vector, bool]]:
        """The query's words and those for what is not wanted: weight, vector (E,), and whether it was remembered."""
        weights = search.options.weights
        given = [(weights.text, search.text), (-weights.without, search.without)]
        there = [(weight, words) for weight, words in given if words]
        if len(there) == 1:
            ((weight, words),) = there
            return [(weight, *await self._embedder.text(snapshot, words))]
        found = await asyncio.gather(*(self._embedder.text(snapshot, words) for _, words in there))  # in one pass
        return [(weight, *each) for (weight, _), each in zip(there, found, strict=True)]

    async def _in_pool(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)

    @asynccontextmanager
    async def _admitted(self, count: int = 1, *, to: Waiting = "searches") -> AsyncIterator[None]:
        if self._pending[to] + count > self._settings.max_pending:
            self._metrics.refused("queue_full")
            raise Overloaded
        self._pending[to] += count
        self._metrics.pending[to].inc(count)
        deadline = asyncio.timeout(self._settings.deadline_ms / 1000)
        try:
            async with deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            self._metrics.refused("late")
            raise Late from None
        finally:
            self._pending[to] -= count
            self._metrics.pending[to].dec(count)


def _is_quick(snapshot: Snapshot, options: SearchOptions, end: int) -> bool:
    plain = options.filter is None and options.fold is None and end <= _QUICK_DEPTH
    return plain and snapshot.quick


def _is_long(search: Query) -> bool:
    return search.options.rerank or search.options.explain


def _at_once(call: Callable[[], T]) -> T:
    _one_thread()  # each thread has a setting of its own; asking for it again costs less than remembering
    return call()


def _matches(snapshot: Snapshot, hits: Sequence[Hit], explanations: Sequence[Explanation | None]) -> list[Match]:
    item = snapshot.artifact.item
    explained = [*explanations, *[None] * len(hits)]
    return [
        Match(item(hit.row), hit.score, [item(row).id for row in hit.folded], hit.reranked, explanation)
        for hit, explanation in zip(hits, explained, strict=False)
    ]


def _min_score(snapshot: Snapshot, search: Query) -> float | None:
    options = search.options
    wanted = options.min_score
    if wanted != "auto":
        return wanted
    if search.picture is not None or search.item or search.without or options.more_like or options.less_like:
        raise field_problem("min_score", '"auto" is calibrated for searches by words alone; give a number')
    if snapshot.min_score is None:
        raise Problem(
            409,
            "This index was built without --validation, so it is not calibrated; give min_score as a number.",
            errors=[("min_score", "this index has no calibrated cut-off")],
        )
    return snapshot.min_score


def _require_fields(snapshot: Snapshot, fields: Sequence[str]) -> None:
    known = snapshot.artifact.fields if fields else {}
    for name in fields:
        if name not in known and name != "*":
            raise field_problem("fields", f"no item has {name[:80]!r}; there are: {', '.join(sorted(known))}")


def _row(snapshot: Snapshot, item_id: str, field: str) -> int:
    row = snapshot.artifact.row_of(item_id)
    if row is None:
        status = 404 if field == "id" else 422
        shown = repr(item_id[:200])
        raise Problem(status, f"There is no item {shown} in the index.", errors=[(field, f"unknown: {shown}")])
    return row


def _search_thread() -> None:
    compute()
    _one_thread()


def _one_thread() -> None:
    """One query gains nothing from more threads inside FAISS, and they would take the encoder's cores to wait on."""
    import faiss

    faiss.omp_set_num_threads(1)
