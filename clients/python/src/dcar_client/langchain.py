"""Retriever for LangChain: documents are the captions of images; their metadata has
ids, scores and links.

from dcar_client import Client
from dcar_client.langchain import DcarRetriever

retriever = DcarRetriever(client=Client("http://127.0.0.1:8000"), k=3,
options={"hybrid": True}) retriever.invoke("crying cat", filter={"base": True})
"""

import asyncio
from typing import Any

from pydantic import Field

from dcar_client import AsyncClient, Client, SearchResponse

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForRetrieverRun,
        CallbackManagerForRetrieverRun,
    )
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
except ImportError as error:
    raise ImportError(
        "the retriever needs the extra langchain: pip install 'dcar-client[langchain]'"
    ) from error

# sides in pixels would hide an item's own fields of these names
_LEFT_OUT = {"caption", "metadata", "width", "height"}


class DcarRetriever(BaseRetriever):
    """Find images by text. Keyword arguments of `invoke` and `ainvoke` take precedence
    over `k` and `options`.

    Attributes:
        client: of the service; the caller closes it.
        async_client: for `ainvoke`; without it, `client` works in a thread.
        k: number of documents.
        options: further `SearchOptions` of every search.
    """

    client: Client
    async_client: AsyncClient | None = None
    k: int = Field(default=5, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        **options: Any,
    ) -> list[Document]:
        return _documents(self.client.search_text(query, **self._options(options)))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        **options: Any,
    ) -> list[Document]:
        if self.async_client is None:
            manager = run_manager.get_sync()
            return await asyncio.to_thread(
                self._get_relevant_documents,
                query,
                run_manager=manager,
                **options,
            )
        return _documents(
            await self.async_client.search_text(query, **self._options(options))
        )

    def _options(self, own: dict[str, Any]) -> dict[str, Any]:
        return {"k": self.k, **self.options, **own}


def _documents(response: SearchResponse) -> list[Document]:
    return [
        Document(
            id=result.id,
            page_content=result.caption,
            metadata=(result.metadata or {})
            | result.model_dump(exclude=_LEFT_OUT, exclude_none=True),
        )
        for result in response.results
    ]
