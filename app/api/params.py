"""Requests become checked queries here, as dependencies, so that the routes read like sentences.

The body is read by hand and not by FastAPI: pydantic parses the JSON in one step, a form of a wrong content type is
refused before anything of it is read, and every fault has the caller's name for the field.

All dependencies are coroutines: FastAPI runs a plain function in a thread of its own, which costs more than a search.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from app.api.requests import LISTS, BatchQuery, ImageForm, ItemsQuery, PageQuery, TextQuery
from app.core.keys import given_key, is_key
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem, from_validation
from app.core.settings import Settings
from app.middleware.access import charge, unauthorised
from app.search.collections import Collections
from app.search.query import Query as SearchQuery
from app.search.query import SearchOptions, normalise
from app.search.retriever import Retriever
from app.search.snapshots import Snapshot

# text/search bodies: a character takes at most 12 bytes of JSON
JSON_BYTES_PER_CHAR = 12
_LEFT_EMPTY = frozenset({*LISTS, "filter", "weights"})
_TEXTS = frozenset({"query", "without"})  # as they are, no JSON
_PART_BYTES = 16 * 2**10  # of a form's field
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii", b"iso-8859-1", b"latin-1", b"windows-1252"})

M = TypeVar("M", bound=BaseModel)
ItemId = Annotated[str, Path(description="an item's id, as the results give it", max_length=1024)]


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def metrics_of(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


async def retriever_of(request: Request) -> Retriever:
    retriever: Retriever = request.app.state.retriever
    return retriever


async def collections_of(request: Request) -> Collections:
    collections: Collections = request.app.state.collections
    return collections


def collection_of(request: Request) -> str | None:
    """The name in the path; None on the routes that have none, and mean the default."""
    name: str | None = request.path_params.get("collection")
    return name


async def snapshot_of(request: Request) -> Snapshot:
    """The version that answers now, in the collection that the path names.

    Raises:
        Problem: there is no such collection, or it is not loaded.
    """
    return (await collections_of(request))[collection_of(request)].require()


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _check_type(content_type: str, wanted: str) -> None:
    given = content_type.split(";")[0].strip().lower()
    if given != wanted:
        message = f"must be {wanted}, not {given or 'absent'}"
        raise field_problem("Content-Type", message, status=415)


def _check_charset(content_type: str) -> None:
    """Starlette's parser would decode a form's texts by whatever codec of Python the caller names."""
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        message = f"charset must be utf-8, not {charset.decode('latin-1')[:80]!r}"
        raise field_problem("Content-Type", message, status=400)


def _check(options: SearchOptions, settings: Settings) -> None:
    if options.k > settings.max_k:
        raise field_problem("k", f"at most {settings.max_k}, not {options.k}")
    if options.offset + options.k > settings.max_window:
        raise field_problem("offset", f"together with k at most {settings.max_window}")


def _words(given: str, settings: Settings, field: str = "query") -> str:
    if len(given) > settings.max_query_chars:
        raise field_problem(field, f"at most {settings.max_query_chars} characters, not {len(given)}")
    return normalise(given)


def _without(given: SearchOptions, settings: Settings) -> str:
    words = _words(given.without, settings, "without")
    if given.without and not words:
        raise field_problem("without", "must not be empty where it is given")
    return words


def _text_search(given: TextQuery, settings: Settings) -> SearchQuery:
    text = _words(given.query, settings)
    if not text and (given.query or not given.more_like):
        unwanted = "less_like" if given.less_like else "without" if given.without else None
        if unwanted and not given.query:
            raise field_problem(unwanted, "needs something to search for beside it: query or more_like")
        raise field_problem("query", "must not be empty")
    _check(given, settings)
    return SearchQuery(given, text, without=_without(given, settings))


def _json(content_type: str, body: bytes, model: type[M]) -> M:
    _check_type(content_type, "application/json")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def words_in(content_type: str, body: bytes, settings: Settings) -> SearchQuery:
    """The query that a body of POST /search/text holds."""
    return _text_search(_json(content_type, body, TextQuery), settings)


async def read_words(request: Request) -> SearchQuery:
    """The query of POST /search/text."""
    return words_in(_content_type(request), await request.body(), settings_of(request))


async def read_batch(request: Request) -> list[SearchQuery]:
    """The queries of POST /search/batch."""
    given = _json(_content_type(request), await request.body(), BatchQuery).queries
    settings = settings_of(request)
    if len(given) > settings.max_queries:
        raise field_problem("queries", f"at most {settings.max_queries}, not {len(given)}")
    await charge(request, len(given) - 1)
    searches = []
    for number, each in enumerate(given):
        try:
            searches.append(_text_search(each, settings))
        except Problem as problem:
            raise problem.within(f"queries.{number}") from None
    return searches


async def read_picture(request: Request) -> SearchQuery:
    """The picture of POST /search/image. Large parts are spooled to a file by the parser, not kept in memory.

    When the model has too much to do already, the picture is not even read: receiving and decoding it costs more than
    many searches by words.
    """
    _check_type(_content_type(request), "multipart/form-data")
    _check_charset(_content_type(request))
    (await retriever_of(request)).require_room()
    settings = settings_of(request)
    async with _form(request) as form:
        file = form.get("file")
        if isinstance(file, str):
            raise field_problem("file", "must be a file: send it with a file name")
        try:
            given = ImageForm.model_validate(_fields(form))
        except ValidationError as error:
            raise from_validation(error) from None
        _check(given, settings)
        text, without = _words(given.query, settings), _without(given, settings)
        if not isinstance(file, UploadFile):
            raise field_problem("file", "a picture is required, as the form field `file`")
        if file.size is not None and file.size > settings.max_upload_bytes:
            message = f"at most {settings.max_upload_bytes / 2**20:.3g} MiB, not {file.size / 2**20:.3g}"
            raise field_problem("file", message, status=413)
        data = await file.read()
    if not data:
        raise field_problem("file", "the file is empty")
    return SearchQuery(given, text, data, without=without)


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    try:
        form = await request.form(max_files=1, max_fields=64, max_part_size=_PART_BYTES)
    except HTTPException as error:
        raise field_problem("body", error.detail, status=error.status_code) from None
    except OSError:
        detail = "There is no room for uploads at the moment. Try again later."
        raise Problem(503, detail, headers={"Retry-After": "10"}) from None
    try:
        yield form
    finally:
        await form.close()


def _fields(form: FormData) -> dict[str, Any]:
    """A form's fields as the options of JSON have them: texts as they are, all else as JSON, lists also one by one.
    A list or an object that is empty was not filled in.

    What is no field is one too many, as in JSON: a filter with a slip in its name must not be taken for none.
    """
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, str) or (value == "" and name in _LEFT_EMPTY):
            continue
        if name in LISTS:
            fields.setdefault(name, []).extend(_texts(value))
        elif name in _TEXTS:
            fields[name] = value
        else:
            try:
                fields[name] = from_json(value)  # as bodies in JSON are read; half a surrogate pair is an error to both
            except ValueError:
                fields[name] = value
    return fields


def _texts(value: str) -> list[Any]:
    """Those of a JSON list, or one as it is."""
    if value.lstrip().startswith("["):
        try:
            found = from_json(value)
        except ValueError:
            found = None
        if isinstance(found, list):
            return found
    return [value]


async def read_similar(
    request: Request,
    item_id: ItemId,
    page: Annotated[PageQuery, Query()],
) -> SearchQuery:
    """The query of GET /items/{id}/similar."""
    options = SearchOptions(k=page.k, offset=page.offset)
    _check(options, settings_of(request))
    return SearchQuery(options, item=item_id)


async def read_listing(request: Request, page: Annotated[ItemsQuery, Query()]) -> ItemsQuery:
    """The query of GET /items."""
    if page.k > settings_of(request).max_k:
        raise field_problem("k", f"at most {settings_of(request).max_k}, not {page.k}")
    return page


async def require_admin(request: Request) -> None:
    """Let only the holder of the admin key pass.

    The caller's address is no proof: behind a proxy everybody comes from loopback.
    """
    key = settings_of(request).admin_key
    if key is None:
        raise Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
    given = given_key(request.headers)
    if given is None or not is_key(given, key.get_secret_value()):
        metrics_of(request).refused("key")
        raise unauthorised("must be `Bearer` and the admin key")


RetrieverDep = Annotated[Retriever, Depends(retriever_of)]
CollectionsDep = Annotated[Collections, Depends(collections_of)]
SnapshotDep = Annotated[Snapshot, Depends(snapshot_of)]
WordsDep = Annotated[SearchQuery, Depends(read_words)]
BatchDep = Annotated[list[SearchQuery], Depends(read_batch)]
PictureDep = Annotated[SearchQuery, Depends(read_picture)]
ItemsQueryDep = Annotated[ItemsQuery, Depends(read_listing)]
SimilarDep = Annotated[SearchQuery, Depends(read_similar)]
