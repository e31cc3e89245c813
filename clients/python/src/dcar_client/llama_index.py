"""Retriever for LlamaIndex: nodes have the captions of images as text, and ids,
categories and links as metadata.

from dcar_client import Client
from dcar_client.llama_index import DcarRetriever

retriever = DcarRetriever(Client("http://127.0.0.1:8000"), k=3, options={"hybrid":
True}) retriever.retrieve("crying cat")
"""

import asyncio

from dcar_client import AsyncClient, Client, SearchOptions, SearchResponse

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise ImportError(
        "the retriever needs the extra llama-index: pip install"
        " 'dcar-client[llama-index]'"
    ) from error

# sides in pixels would hide an item's own fields of these names
_LEFT_OUT = {"caption", "metadata", "width", "height"}


class DcarRetriever(BaseRetriever):
    """Find images by text, by the image at `QueryBundle.image_path`, or by both.

    Args:
        client: of the service; the caller closes it.
        async_client: for `aretrieve`; without it, `client` works in a thread.
        k: number of nodes.
        options: further options of every search.
    """

    def __init__(
        self,
        client: Client,
        *,
        async_client: AsyncClient | None = None,
        k: int = 5,
        options: SearchOptions | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._async_client = async_client
        self._options = SearchOptions(**{"k": k, **(options or {})})

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = query_bundle.query_str
        image = query_bundle.image_path
        if image:
            return _nodes(self._client.search_image(image, query, **self._options))
        return _nodes(self._client.search_text(query, **self._options))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._async_client is None:
            return await asyncio.to_thread(self._retrieve, query_bundle)
        query = query_bundle.query_str
        image = query_bundle.image_path
        if image:
            return _nodes(
                await self._async_client.search_image(image, query, **self._options)
            )
        return _nodes(await self._async_client.search_text(query, **self._options))


def _nodes(response: SearchResponse) -> list[NodeWithScore]:
    nodes = []
    for result in response.results:
        metadata = (result.metadata or {}) | result.model_dump(
            exclude=_LEFT_OUT, exclude_none=True
        )
        nodes.append(
            NodeWithScore(
                node=TextNode(id_=result.id, text=result.caption, metadata=metadata),
                score=result.score,
            )
        )
    return nodes
