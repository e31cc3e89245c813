"""MCP server of an image search service: read-only tools for assistants, over stdin and
stdout.

    pip install 'dcar-client[mcp]' SEARCH_KEY=... python -m dcar_client.mcp --url
    http://127.0.0.1:8000 --api-key-env SEARCH_KEY

The tools call the service over HTTP, so its keys, rates and limits hold. stdout belongs
to the protocol.
"""

import argparse
import asyncio
import base64
import binascii
import os
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import Field
from pydantic_core import to_json

from dcar_client import (
    AsyncClient,
    ItemResponse,
    SearchOptions,
    SearchResponse,
    ServiceError,
)
from dcar_client.limits import clean, secrets_of

try:
    from mcp.server.mcpserver import Image, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import CallToolResult, ImageContent, TextContent, ToolAnnotations
except ImportError as error:
    raise ImportError(
        "the MCP server needs the extra mcp: pip install 'dcar-client[mcp]'"
    ) from error

THUMBNAIL_PX = 192
MOST_RESULTS = 20
MOST_CHARACTERS = 5_000  # of a text in an answer
# of an answer without thumbnails; 20 items with as much metadata as the service allows
# take 1.3 MB
MOST_BYTES = 2 * 2**20
MOST_THUMBNAIL_BYTES = 2**20
THUMBNAILS_AT_A_TIME = 4
READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)
INSTRUCTIONS = (
    "Search a gallery of images. Tools return captions, categories and ids; set"
    " `thumbnails` to see the images. Compare scores only within one response."
)

T = TypeVar("T")
Words = Annotated[
    str, Field(min_length=1, description="what the image shows, in a few plain words")
]
Count = Annotated[int, Field(ge=1, le=MOST_RESULTS, description="number of results")]
Offset = Annotated[
    int, Field(ge=0, description="results to skip: `next_offset` of the previous page")
]
Filter = Annotated[
    dict[str, Any] | None,
    Field(
        description=(
            'conditions on category, caption and metadata: {"category": "car", "price":'
            ' {"lt": 50}}'
        )
    ),
]
Without = Annotated[str, Field(description="what the images should not show")]
Fields = Annotated[
    list[str] | None,
    Field(description='metadata fields to return with each result; ["*"] for all'),
]
Sort = Annotated[
    str,
    Field(
        description=(
            'field that orders the results that fit: "price", or "-price" descending'
        )
    ),
]
Hybrid = Annotated[
    bool,
    Field(
        description=(
            "look up the words in captions and metadata too: for names and codes"
        )
    ),
]
Thumbnails = Annotated[
    bool, Field(description="return a small image of each result, in the same order")
]
ItemId = Annotated[
    str, Field(min_length=1, description="the id of an item, as results have it")
]


class GalleryTools:
    """The tools: methods whose names, arguments and docstrings assistants see.

    Args:
        client: of the service.
        url: address of the service, for the links in results.
        folder: folder whose files `search_by_picture` may name; None for no files.
    """

    def __init__(
        self,
        client: AsyncClient,
        url: str,
        folder: Path | None = None,
    ) -> None:
        self._client = client
        self._folder = folder
        self._url = str(httpx.URL(url).copy_with(userinfo=b"")).rstrip("/")
        self._secrets = secrets_of(client._http.headers)
        self._turns = asyncio.Semaphore(THUMBNAILS_AT_A_TIME)

    async def search_by_words(
        self,
        query: Words,
        k: Count = 5,
        offset: Offset = 0,
        filter: Filter = None,
        without: Without = "",
        fields: Fields = None,
        hybrid: Hybrid = False,
        sort: Sort = "",
        thumbnails: Thumbnails = False,
    ) -> Annotated[CallToolResult, SearchResponse]:
        """Find the images that words describe, best first or sorted."""
        options = SearchOptions(
            k=k,
            offset=offset,
            filter=filter,
            without=without,
            fields=fields or [],
            hybrid=hybrid,
        )
        if sort:
            options["sort"] = sort
        return await self._answer(
            self._client.search_text(query, **options),
            thumbnails,
            k,
        )

    async def search_by_picture(
        self,
        image: Annotated[
            str, Field(description="the image file in base64; or name a `file`")
        ] = "",
        file: Annotated[
            str,
            Field(
                description="an image file below the folder that the server was given"
            ),
        ] = "",
        query: Annotated[
            str,
            Field(
                description=(
                    "how the results should differ, or what they should show too"
                )
            ),
        ] = "",
        k: Count = 5,
        offset: Offset = 0,
        filter: Filter = None,
        without: Without = "",
        fields: Fields = None,
        thumbnails: Thumbnails = False,
    ) -> Annotated[CallToolResult, SearchResponse]:
        """Find the images that resemble a picture, best first."""
        options = SearchOptions(
            k=k,
            offset=offset,
            filter=filter,
            without=without,
            fields=fields or [],
        )
        call = self._client.search_image(self._picture(image, file), query, **options)
        return await self._answer(call, thumbnails, k)

    async def similar_items(
        self,
        item_id: ItemId,
        k: Count = 5,
        offset: Offset = 0,
        thumbnails: Thumbnails = False,
    ) -> Annotated[CallToolResult, SearchResponse]:
        """Find the items that look most like one item, best first."""
        return await self._answer(
            self._client.similar(item_id, k=k, offset=offset),
            thumbnails,
            k,
        )

    async def get_item(
        self,
        item_id: ItemId,
        thumbnail: Annotated[
            bool, Field(description="return a small image of it")
        ] = False,
    ) -> Annotated[CallToolResult, ItemResponse]:
        """Return one item with all its metadata."""
        return await self._answer(self._client.item(item_id), thumbnail)

    def _picture(self, image: str, file: str) -> bytes:
        if bool(image) == bool(file):
            raise ToolError("give either `image`, an image file in base64, or `file`")
        if image:
            try:
                return base64.b64decode(
                    image.partition("base64,")[2] or image, validate=True
                )
            except binascii.Error as error:
                raise ToolError(f"image: not base64: {error}") from error
        if self._folder is None:
            raise ToolError(
                "file: the server was started without --pictures, so it reads no files;"
                " give `image`"
            )
        path = (self._folder / file).resolve()
        if not path.is_relative_to(self._folder.resolve()) or not path.is_file():
            raise ToolError(
                f"file: there is no file {file!r} in the folder of pictures"
            )
        return path.read_bytes()

    async def _answer(
        self,
        call: Awaitable[SearchResponse | ItemResponse],
        thumbnails: bool,
        k: int = 1,
    ) -> CallToolResult:
        """Return the service's response as JSON and as structured content, with
        thumbnails after it.

        The service may not be what it seems, so an answer is bounded, and its texts are
        clean.
        """
        response = await _plain(call)
        if isinstance(response, SearchResponse):
            response.results = response.results[:k]
        items = response.results if isinstance(response, SearchResponse) else [response]
        for item in items:
            if not re.match(r"/[^/\\]", item.image_url):  # of another host
                raise ToolError(
                    "the service names an image outside of itself:"
                    f" {self._clean(item.image_url)}"
                )
            item.image_url = self._url + item.image_url
        answer = self._clean(response.model_dump(mode="json", exclude_unset=True))
        if len(text := to_json(answer)) > MOST_BYTES:
            raise ToolError(
                f"the answer has more than {MOST_BYTES >> 20} MiB; ask for fewer"
                " results or `fields`"
            )
        content: list[TextContent | ImageContent] = [
            TextContent(type="text", text=text.decode())
        ]
        if thumbnails:
            content += await asyncio.gather(
                *(self._thumbnail(item.id) for item in items)
            )
        return CallToolResult(content=content, structured_content=answer)

    async def _thumbnail(self, item_id: str) -> ImageContent | TextContent:
        try:
            async with self._turns:
                data = await _plain(self._client.image(item_id, size=THUMBNAIL_PX))
            if len(data) > MOST_THUMBNAIL_BYTES:
                raise ToolError(f"it has more than {MOST_THUMBNAIL_BYTES >> 20} MiB")
        except ToolError as error:
            return TextContent(
                type="text",
                text=f"no thumbnail of {clean(item_id, self._secrets)}: {error}",
            )
        # small files of both kinds are sent as they are
        kind = {b"\x89P": "png", b"RI": "webp"}.get(data[:2], "jpeg")
        return Image(data=data, format=kind).to_image_content()

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return clean(value, self._secrets, MOST_CHARACTERS)
        if isinstance(value, dict):
            return {
                clean(name, self._secrets): self._clean(each)
                for name, each in value.items()
            }
        if isinstance(value, list):
            return [self._clean(member) for member in value]
        return value


async def _plain(call: Awaitable[T]) -> T:
    """Await a request, with the service's errors and those of the connection as errors
    that assistants can read.
    """
    try:
        return await call
    except ServiceError as error:
        faults = (error.problem.errors if error.problem else None) or []
        details = "; ".join(f"{fault.field}: {fault.message}" for fault in faults)
        raise ToolError(f"{error}; {details}" if details else str(error)) from error
    except httpx.TransportError as error:
        raise ToolError(
            f"the image search service does not answer ({type(error).__name__})"
        ) from error
    except ValueError as error:
        raise ToolError(str(error)) from error


def server(
    url: str,
    *,
    key: str | None = None,
    collection: str | None = None,
    folder: Path | None = None,
) -> MCPServer:
    """Return the MCP server of one collection of a service; see `GalleryTools` for
    `folder`.
    """
    client = AsyncClient(url, key=key, collection=collection)

    @asynccontextmanager
    async def open_client(_: MCPServer) -> AsyncIterator[None]:
        async with client:
            yield

    built = MCPServer(
        "dcar",
        instructions=INSTRUCTIONS,
        lifespan=open_client,
        log_level="WARNING",
    )
    tools = GalleryTools(client, url, folder)
    for tool in (
        tools.search_by_words,
        tools.search_by_picture,
        tools.similar_items,
        tools.get_item,
    ):
        built.add_tool(tool, annotations=READ_ONLY)
    return built


def main() -> None:
    """Run the server over stdin and stdout until they close."""
    parser = argparse.ArgumentParser(
        prog="dcar-mcp", description="MCP server of an image search service."
    )
    parser.add_argument(
        "--url",
        required=True,
        help="address of the service, such as http://127.0.0.1:8000",
    )
    parser.add_argument(
        "--collection", help="the collection to search; the default one if left out"
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that has the API key",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="folder whose files may be search pictures",
    )
    arguments = parser.parse_args()
    if not arguments.url.startswith(("http://", "https://")):
        parser.error(
            f"--url: {arguments.url} is not an address such as http://127.0.0.1:8000"
        )
    key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else None
    if arguments.api_key_env and not key:
        parser.error(
            f"--api-key-env: the environment variable {arguments.api_key_env} is"
            " not set"
        )
    if arguments.pictures and not arguments.pictures.is_dir():
        parser.error(f"--pictures: {arguments.pictures} is not a folder")
    server(
        arguments.url,
        key=key,
        collection=arguments.collection,
        folder=arguments.pictures,
    ).run()


if __name__ == "__main__":
    main()
