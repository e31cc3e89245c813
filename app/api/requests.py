"""Requests other than text searches: the models of bodies and parameters, and the
images that bodies hold or name.

- By URL, images are fetched only from the hosts in `DCAR_IMAGE_HOSTS`. One that has an
  address which is not public is refused; the connection goes to a checked address,
  since that of a name may change. Redirects are not followed. Size, time, and
  simultaneous requests are bounded, and the bytes count against the budget of request
  bodies.
"""

import asyncio
import base64
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Scope

from app.api.guard import byte_counter, query_bytes
from app.api.routing import check_content_type, validated
from app.core.problems import Problem, field_problem
from app.core.settings import DEFAULT_K, Settings
from app.core.turns import FairTurns, run_in_new_thread
from app.search.query import GroupBy, Query, check_text, parse_fields
from dcar_core.util.errors import MissingExtraError

TIMEOUT_S = 10.0  # of one image, including the time in the queue
MAX_URLS = 8  # of one request
_MAX_INPUTS = 2048  # to embed, as OpenAI's API takes
_AT_ONCE = 16
_AT_ONCE_EACH = 4  # of one caller
_SCHEMES = ("http://", "https://")
_URL = re.compile("[!-~]{1,8192}")  # printable ASCII
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity"}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_MAX_FIELD_BYTES = 16 * 2**10


def _check_count(values: Any, info: ValidationInfo) -> Any:
    if (
        info.context is not None
        and isinstance(values, list)
        and len(values) > info.context.max_queries
    ):
        raise ValueError(f"at most {info.context.max_queries}, not {len(values)}")
    return values


class Strict(BaseModel):
    """A part of a request without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PageQuery(Strict):
    """A page of results, for searches without other options."""

    k: Annotated[int, Field(ge=1, description="number of results")] = DEFAULT_K
    offset: Annotated[int, Field(ge=0, description="results to skip")] = 0


class ItemsQuery(PageQuery):
    """A page of the gallery's items, in index order or sorted."""

    filter: Annotated[
        dict[str, Any] | None,
        BeforeValidator(
            lambda value: from_json(value) if isinstance(value, str) else value
        ),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
        Field(
            description=(
                'the same conditions as in searches, as JSON: {"category": "cat face"}'
            )
        ),
    ] = None
    sort: Annotated[
        str,
        Field(
            max_length=1025,
            description='sort by a field; "-price" descends; without it last',
        ),
    ] = ""
    group_by: GroupBy = None


def _describe_form(schema: dict[str, Any]) -> None:
    """Declare the file, and the objects that a form holds as JSON; OpenAPI would send
    each as a file of its own.
    """
    for name in ("filter", "weights", "crop"):
        schema["properties"][name] = {
            "type": "string",
            "default": "",
            "description": "as in text searches; as JSON",
        }
    schema["properties"]["file"] = {"type": "string", "format": "binary"}
    schema["required"] = ["file"]


class ImageForm(Query, json_schema_extra=_describe_form):
    """The fields beside the file in a search by image."""


def _kind(value: Any) -> str:
    return "constrained-text" if isinstance(value, str) else "constrained-image"


class EmbeddingsImage(Strict):
    """An image to embed."""

    image: Annotated[
        str, Field(min_length=1, description="the file in base64, or as a data URI")
    ]


_Text = Annotated[
    str,
    Field(min_length=1),
    AfterValidator(check_text),
    Tag("constrained-text"),
]
_Image = Annotated[EmbeddingsImage, Tag("constrained-image")]


class EmbeddingsQuery(
    Strict,
    json_schema_extra={
        "examples": [{"input": ["crying cat", "apple"], "model": "twemoji"}]
    },
):
    """Texts and images to embed, in the shape of OpenAI's API."""

    input: Annotated[
        list[Annotated[_Text | _Image, Discriminator(_kind)]],
        Field(
            min_length=1,
            max_length=_MAX_INPUTS,
            description="texts and images; a single one needs no list",
        ),
        FailFast(),
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    ]
    model: Annotated[
        str | None,
        Field(description="the collection that embeds; the default one if absent"),
    ] = None
    encoding_format: Annotated[
        Literal["float", "base64"],
        Field(description="numbers, or base64 of little-endian float32"),
    ] = "float"
    dimensions: Annotated[
        int | None, Field(description="must be the length of the model's vectors")
    ] = None
    user: Annotated[str | None, Field(description="ignored")] = None


class BatchEntry(Query):
    """One search of a batch: as a text search, or with an image, or both."""

    image: Annotated[
        str | None,
        Field(min_length=1, description="an image file as base64, data URI, or URL"),
    ] = None


class BatchQuery(
    Strict,
    json_schema_extra={
        "examples": [{"queries": [{"query": "crying cat"}, {"query": "apple"}]}]
    },
):
    """Several searches, answered together from one index version."""

    queries: Annotated[
        list[BatchEntry],
        Field(min_length=1),
        FailFast(),
        BeforeValidator(_check_count),
    ]


def batch_bytes(settings: Settings) -> int:
    """Return the largest size of a batch in JSON, whose images in base64 are as large
    as one upload together.
    """
    return settings.max_upload_bytes * 4 // 3 + settings.max_queries * query_bytes(
        settings
    )


async def read_image_query(
    request: Request, settings: Settings
) -> tuple[ImageForm, bytes]:
    """Read the form of POST /search/image: the query and the file. The parser spools
    large files to disk.
    """
    check_content_type(request, "multipart/form-data")
    if re.search('charset=(?!"?utf-8)', request.headers["content-type"], re.IGNORECASE):
        raise field_problem("Content-Type", "charset must be utf-8", status=400)
    try:
        async with request.form(
            max_files=1,
            max_fields=64,
            max_part_size=_MAX_FIELD_BYTES,
        ) as form:
            texts = [
                (name, value)
                for name, value in form.multi_items()
                if isinstance(value, str) and name != "file"
            ]
            query = validated(ImageForm, parse_fields(texts), settings)
            file = form.get("file")
            if not isinstance(file, UploadFile) or not file.size:
                raise field_problem(
                    "file",
                    "an image with a file name is required, as the form field `file`",
                )
            return query, await file.read()
    except HTTPException as error:
        raise field_problem("body", error.detail, status=error.status_code) from None


def decode_base64(image: str, max_bytes: int, field: str) -> bytes:
    """Return the file in a base64 text or data URI; an error names the field."""
    try:
        data = base64.b64decode(image.rpartition(",")[2], validate=True)
    except ValueError:
        raise field_problem(
            field, "must be base64, or a data URI with base64"
        ) from None
    require_size(len(data), max_bytes, field)
    return data


def require_size(size: int, max_bytes: int, field: str) -> None:
    """Raise Problem if an image file is too large."""
    if size > max_bytes:
        raise field_problem(
            field,
            f"at most {max_bytes / 2**20:.3g} MiB, not {size / 2**20:.3g}",
            status=413,
        )


def is_public(address: str) -> bool:
    """Return True for an address of the public internet. IPv6 addresses that embed an
    IPv4 address do not count.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip not in _GLOBAL_UNICAST or ip.sixtofour or ip.teredo
    ):
        return False
    return ip.is_global and not ip.is_multicast


def _require_public(*addresses: str) -> None:
    if not addresses or not all(map(is_public, addresses)):
        raise field_problem("image", "the host has an address that is not public")


class _PublicResolver:
    """What aiohttp finds the addresses of a host with. It raises Problem if one of them
    is not public.
    """

    async def resolve(self, host: str, port: int, family: int) -> list[dict[str, Any]]:
        known = await run_in_new_thread(
            partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        )
        _require_public(*(str(address[0]) for *_, address in known))
        return [
            {
                "hostname": host,
                "host": address[0],
                "port": port,
                "family": kind,
                "proto": protocol,
                "flags": 0,
            }
            for kind, _, protocol, _, address in known
        ]


class ImageFetcher:
    """Fetch images. One per process. Raise MissingExtraError if the settings need
    aiohttp and it is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turns = FairTurns(_AT_ONCE, _AT_ONCE_EACH)
        if settings.image_hosts and find_spec("aiohttp") is None:
            raise MissingExtraError("fetching images by URL (DCAR_IMAGE_HOSTS)", "http")

    async def read(self, scope: Scope, images: Mapping[str, str]) -> dict[str, bytes]:
        """Return the files of images in base64 or at URLs, by their names. Raise
        Problem with the name of a fault.
        """
        urls = [name for name, image in images.items() if image.startswith(_SCHEMES)]
        if len(urls) > MAX_URLS:
            raise field_problem(
                urls[0].partition(".")[0],
                f"at most {MAX_URLS} images by URL, not {len(urls)}",
            )
        reads = (self._read(scope, image) for image in images.values())
        files = dict[str, bytes]()
        for name, file in zip(
            images,
            await asyncio.gather(*reads, return_exceptions=True),
            strict=True,
        ):
            if isinstance(file, BaseException):
                raise file.within(name) if isinstance(file, Problem) else file
            files[name] = file
        return files

    async def _read(self, scope: Scope, image: str) -> bytes:
        if image.startswith(_SCHEMES):
            return await self.fetch(image, byte_counter(scope))
        return await asyncio.to_thread(
            decode_base64,
            image,
            self._settings.max_upload_bytes,
            "image",
        )

    async def fetch(self, url: str, count: Callable[[int], None]) -> bytes:
        """Return the file at a URL. Raise Problem with the field "image" on failure.
        count: gets each part's size.
        """
        if not self._settings.image_hosts:
            raise field_problem(
                "image",
                "this service fetches no images by URL; send the file in base64",
            )
        import aiohttp
        from yarl import URL

        try:
            parsed = URL(url, encoded=True)
            host = (parsed.raw_host or "").lower()
            port = parsed.port
        except ValueError:
            host = ""
            port = None
        if (
            host not in self._settings.image_hosts
            or port not in self._settings.image_ports
        ):
            raise field_problem(
                "image", f"this service fetches no images from {host}:{port}"
            )
        if not _URL.fullmatch(url) or parsed.raw_user is not None:
            raise field_problem(
                "image",
                "a URL has at most 8,192 printable ASCII characters, and no user name",
            )
        with suppress(ValueError):  # of a name, whose addresses the resolver checks
            _require_public(host)
        body = bytearray()
        connector = aiohttp.TCPConnector(
            resolver=_PublicResolver(), use_dns_cache=False
        )
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._turns.turn(),
                aiohttp.ClientSession(
                    connector=connector, auto_decompress=False
                ) as session,
                session.get(
                    parsed,
                    headers=_HEADERS,
                    allow_redirects=False,
                ) as response,
            ):
                if response.status != 200:
                    raise field_problem(
                        "image",
                        f"the host answered {response.status}; redirects are not"
                        " followed",
                    )
                async for piece in response.content.iter_any():
                    count(len(piece))
                    body += piece
                    require_size(len(body), self._settings.max_upload_bytes, "image")
        except TimeoutError:
            raise field_problem(
                "image", f"the host took more than {TIMEOUT_S:g} seconds"
            ) from None
        except (OSError, aiohttp.ClientError):
            raise field_problem(
                "image", "the host cannot be reached, or does not answer in HTTP"
            ) from None
        return bytes(body)
