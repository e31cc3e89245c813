"""Requests become checked queries here, as dependencies, so that the routes read like sentences.

The body is read by hand and not by FastAPI: a wrong content type is refused before anything is read, pydantic parses
the JSON in one step, and every fault has the caller's name for the field.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from app.access import unauthorised
from app.keys import given_key, is_key
from app.problems import Problem, field_problem, from_validation
from app.retriever import Retriever
from app.schemas import DEFAULT_K, ImageForm, K, TextQuery, normalise
from app.settings import Settings
from app.snapshots import Snapshots

# text/search bodies: a character takes at most 12 bytes of JSON
JSON_BYTES_PER_CHAR = 12


@dataclass(frozen=True, slots=True)
class Words:
    """A text query, normalised."""

    text: str
    k: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture query, as the bytes of the file."""

    data: bytes
    k: int


def settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def retriever_of(request: Request) -> Retriever:
    retriever: Retriever = request.app.state.retriever
    return retriever


def snapshots_of(request: Request) -> Snapshots:
    snapshots: Snapshots = request.app.state.snapshots
    return snapshots


def _check_type(request: Request, wanted: str) -> None:
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given != wanted:
        message = f"must be {wanted}, not {given or 'absent'}"
        raise field_problem("Content-Type", message, status=415)


def _check_k(k: int, settings: Settings) -> int:
    if k > settings.max_k:
        raise field_problem("k", f"at most {settings.max_k}, not {k}")
    return k


async def read_words(request: Request) -> Words:
    """The query of POST /search/text."""
    _check_type(request, "application/json")
    settings = settings_of(request)
    try:
        given = TextQuery.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from None
    if len(given.query) > settings.max_query_chars:
        message = f"at most {settings.max_query_chars} characters, not {len(given.query)}"
        raise field_problem("query", message)
    text = normalise(given.query)
    if not text:
        raise field_problem("query", "must not be empty")
    return Words(text, _check_k(given.k, settings))


async def read_picture(request: Request) -> Picture:
    """The picture of POST /search/image. Large parts are spooled to a file by the parser, not kept in memory."""
    _check_type(request, "multipart/form-data")
    settings = settings_of(request)
    async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
        fields: dict[str, Any] = {"k": form["k"]} if "k" in form else {}
        try:
            k = ImageForm.model_validate(fields).k
        except ValidationError as error:
            raise from_validation(error) from None
        _check_k(k, settings)
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise field_problem("file", "a picture is required, as the form field `file`")
        if file.size is not None and file.size > settings.max_upload_bytes:
            message = f"at most {settings.max_upload_bytes} bytes, not {file.size}"
            raise field_problem("file", message, status=413)
        data = await file.read()
    if not data:
        raise field_problem("file", "the file is empty")
    return Picture(data, k)


def read_k(request: Request, k: Annotated[K, Query()] = DEFAULT_K) -> int:
    """k as a parameter of the URL."""
    return _check_k(k, settings_of(request))


def require_admin(request: Request) -> None:
    """Let only the holder of the admin key pass.

    The caller's address is no proof: behind a proxy everybody comes from loopback.
    """
    key = settings_of(request).admin_key
    if key is None:
        raise Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
    given = given_key(request.headers)
    if given is None or not is_key(given, key.get_secret_value()):
        raise unauthorised("must be `Bearer` and the admin key")


SettingsDep = Annotated[Settings, Depends(settings_of)]
RetrieverDep = Annotated[Retriever, Depends(retriever_of)]
SnapshotsDep = Annotated[Snapshots, Depends(snapshots_of)]
WordsDep = Annotated[Words, Depends(read_words)]
PictureDep = Annotated[Picture, Depends(read_picture)]
KDep = Annotated[int, Depends(read_k)]
ItemId = Annotated[str, Path(description="an item's id, as the results give it", max_length=1024)]
