"""Route dependencies: what a handler needs from the request and the application, as `Annotated` aliases.

All dependencies are coroutines: FastAPI runs a plain function in a thread, which costs more than a search.
"""

from typing import Annotated

from fastapi import Depends, Path, Request
from fastapi import Query as QueryParam

from app.api.bodies import check_batch, check_form_type, check_window, read_batch, read_image_query
from app.api.requests import ItemsQuery, PageQuery
from app.core.keys import is_key, key_in
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.settings import Settings
from app.middleware.access import charge, unauthorised
from app.search.collections import Collections
from app.search.query import Query, SearchOptions
from app.search.retriever import Retriever
from app.search.snapshots import Snapshot

ItemId = Annotated[str, Path(description="the id of an item, as results give it", max_length=1024)]


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def retriever_of(request: Request) -> Retriever:
    retriever: Retriever = request.app.state.retriever
    return retriever


async def collections_of(request: Request) -> Collections:
    collections: Collections = request.app.state.collections
    return collections


def collection_of(request: Request) -> str | None:
    """Return the collection named in the path; None means the default one."""
    name: str | None = request.path_params.get("collection")
    return name


async def snapshot_of(request: Request) -> Snapshot:
    """Return the live version of the collection named in the path.

    Raises:
        CollectionNotFoundError: the collection is unknown.
        NotReadyError: it is not loaded yet.
    """
    return (await collections_of(request))[collection_of(request)].require()


async def batch_of(request: Request) -> list[Query]:
    """Return the queries of POST /search/batch; each one counts against the caller's rate limit."""
    settings = settings_of(request)
    queries = await read_batch(request, settings)
    await charge(request, len(queries) - 1)
    return check_batch(queries, settings)


async def image_query_of(request: Request) -> Query:
    """Return the query of POST /search/image.

    Raises:
        Problem: the form is invalid, or the model's queue is full; then the body is not read.
    """
    check_form_type(request)
    (await retriever_of(request)).require_room()
    return await read_image_query(request, settings_of(request))


async def similar_query_of(request: Request, item_id: ItemId, page: Annotated[PageQuery, QueryParam()]) -> Query:
    """Return the query of GET /items/{id}/similar."""
    options = SearchOptions(k=page.k, offset=page.offset)
    check_window(options, settings_of(request))
    return Query(options, item_id=item_id)


async def items_query_of(request: Request, query: Annotated[ItemsQuery, QueryParam()]) -> ItemsQuery:
    """Return the query of GET /items."""
    max_k = settings_of(request).max_k
    if query.k > max_k:
        raise field_problem("k", f"at most {max_k}, not {query.k}")
    return query


async def require_admin(request: Request) -> None:
    """Accept only the holder of the admin key. The client address proves nothing: behind a proxy it is loopback."""
    key = settings_of(request).admin_key
    if key is None:
        raise Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
    given = key_in(request.headers)
    if given is None or not is_key(given, key.get_secret_value()):
        metrics: Metrics = request.app.state.metrics
        metrics.refused("key")
        raise unauthorised("must be `Bearer` and the admin key")


RetrieverDep = Annotated[Retriever, Depends(retriever_of)]
CollectionsDep = Annotated[Collections, Depends(collections_of)]
SnapshotDep = Annotated[Snapshot, Depends(snapshot_of)]
BatchDep = Annotated[list[Query], Depends(batch_of)]
ImageQueryDep = Annotated[Query, Depends(image_query_of)]
ItemsQueryDep = Annotated[ItemsQuery, Depends(items_query_of)]
SimilarQueryDep = Annotated[Query, Depends(similar_query_of)]
