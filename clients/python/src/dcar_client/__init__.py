"""Client of a DCAR image search service, synchronous (`Client`) and asynchronous (`AsyncClient`).

from dcar_client import Client

with Client("http://127.0.0.1:8000") as client:
    for result in client.search_text("crying cat", k=3).results:
        print(result.score, result.id, result.caption)
"""

from dcar_client.calls import ItemFields, NewEvent, NewItem, NewQuery
from dcar_client.client import AsyncClient, Client
from dcar_client.errors import ServiceError
from dcar_client.models import (
    BatchResponse,
    Collection,
    CollectionsResponse,
    Crop,
    Embedding,
    EmbeddingsResponse,
    EmbeddingsUsage,
    FacetValue,
    FeedbackResponse,
    FieldError,
    GalleryItem,
    HealthResponse,
    ItemResponse,
    ItemsResponse,
    JobFailure,
    JobProgress,
    JobResponse,
    JobsResponse,
    ProblemResponse,
    ReadinessResponse,
    ReloadResponse,
    Result,
    ResultExplanation,
    ResultGroup,
    SearchOptions,
    SearchResponse,
    TextQuery,
    Weights,
    WordEffect,
)

__all__ = [
    "AsyncClient",
    "BatchResponse",
    "Client",
    "Collection",
    "CollectionsResponse",
    "Crop",
    "Embedding",
    "EmbeddingsResponse",
    "EmbeddingsUsage",
    "FacetValue",
    "FeedbackResponse",
    "FieldError",
    "GalleryItem",
    "HealthResponse",
    "ItemFields",
    "ItemResponse",
    "ItemsResponse",
    "JobFailure",
    "JobProgress",
    "JobResponse",
    "JobsResponse",
    "NewEvent",
    "NewItem",
    "NewQuery",
    "ProblemResponse",
    "ReadinessResponse",
    "ReloadResponse",
    "Result",
    "ResultExplanation",
    "ResultGroup",
    "SearchOptions",
    "SearchResponse",
    "ServiceError",
    "TextQuery",
    "Weights",
    "WordEffect",
]
