"""Response bodies as pydantic models; they document the API and are the source of truth for clients.

Handlers build plain dicts (see `responses`) and do not validate them again; tests check them against these models.
`app.search.results` has those of searches.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.search.results import SearchResponse


class BatchResponse(BaseModel):
    """One response for each query of a batch, in order, all from one index version."""

    index_version: int
    answers: list[SearchResponse]


class Collection(BaseModel):
    """One served collection. count is 0 until it is loaded.

    min_score: the calibrated cut-off that "auto" stands for; null if the index was not calibrated.
    """

    name: str = Field(examples=["twemoji"])
    default: bool
    count: int
    index_version: int | None
    min_score: float | None


class CollectionsResponse(BaseModel):
    """All served collections, the default one first."""

    collections: list[Collection]


class GalleryItem(BaseModel):
    """One item of the gallery with all its metadata. width, height: as of a result."""

    id: str
    caption: str
    category: str
    metadata: dict[str, Any]
    image_url: str
    width: int | None = None
    height: int | None = None


class ItemResponse(GalleryItem):
    """One item and the index version it belongs to."""

    index_version: int


class ItemsResponse(BaseModel):
    """A page of items. count: number of matching items; next_offset: absent on the last page."""

    index_version: int
    count: int
    items: list[GalleryItem]
    next_offset: int | None = None


class Embedding(BaseModel):
    """The vector of one input, of unit length: numbers, or base64 of little-endian float32."""

    object: str = Field(examples=["embedding"])
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Always 0: tokens are not counted."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Embeddings in the order of the input. Only vectors of one fingerprint may be compared."""

    object: str = Field(examples=["list"])
    data: list[Embedding]
    model: str = Field(description="the collection that embedded")
    fingerprint: str = Field(description="of the model; the manifest of an index has the same")
    usage: EmbeddingsUsage


class ServedModel(BaseModel):
    """A collection, as the model that embeds. created: when its version was published, in seconds since 1970."""

    id: str = Field(examples=["twemoji"])
    object: str = Field(examples=["model"])
    created: int
    owned_by: str = Field(examples=["dcar"])


class ModelsResponse(BaseModel):
    """The collections that embed, the default one first, in the shape of OpenAI's API."""

    object: str = Field(examples=["list"])
    data: list[ServedModel]


class JobProgress(BaseModel):
    """Images that have been encoded, of all in the batch that the job is part of."""

    done: int
    total: int


class JobFailure(BaseModel):
    """An item that could not be put, and why."""

    id: str
    reason: str


class JobResponse(BaseModel):
    """A change of items, from its acceptance to a week after its end.

    items: number of items in the request, or that its filter matched then. reason: why the job failed, or why it waits.
    """

    id: str = Field(examples=["18a6f0c2d3b4e5f6a7b8c9d0e1f20314"])
    collection: str
    kind: Literal["put", "patch", "delete"]
    status: Literal["waiting", "running", "done", "failed"]
    items: int
    accepted: str = Field(description="UTC, ISO 8601", examples=["2026-01-31T12:00:00Z"])
    ended: str | None = None
    progress: JobProgress | None = None
    index_version: int | None = Field(None, description="a version that has all changes of the job")
    failed: list[JobFailure] | None = Field(None, description="items that could not be put; all others were")
    reason: str | None = None
    new_fields: list[str] | None = Field(None, description="metadata fields of the request that no item had, up to 20")
    dropped_fields: list[str] | None = Field(
        None, description="fields that an item had and its replacement lacks, up to 20"
    )
    changed: int | None = Field(None, description="items whose fields a patch has changed")
    unknown: list[str] | None = Field(None, description="ids of a patch that the index lacks, the first 100")


class JobsResponse(BaseModel):
    """Changes of items, the newest first."""

    jobs: list[JobResponse]


class HealthResponse(BaseModel):
    """The process is alive."""

    status: str = Field(examples=["ok"])


class ReadinessResponse(BaseModel):
    """ready: searches work in every open collection. degraded: they work, but a newer version cannot be served, or
    images of a gallery are missing; `reason` says which.

    index_version and count belong to the default collection.
    """

    status: str = Field(examples=["ready", "degraded"])
    index_version: int
    count: int = Field(description="number of items in the index")
    reason: str | None = None
    model_note: str | None = Field(None, description="what to know about a model, such as one that stands in")
    opening: int | None = Field(None, description="created collections that wait to be opened; with a key for all")


class ReloadResponse(BaseModel):
    """After a reload: the default collection's version, every collection's version, and whether any changed."""

    index_version: int
    versions: dict[str, int]
    changed: bool


class FieldError(BaseModel):
    """One invalid field, under the name that the request used."""

    field: str = Field(examples=["query"])
    message: str = Field(examples=["must not be empty"])


class FeedbackResponse(BaseModel):
    """The number of stored events; `ignored`: the first 20 that changed nothing, and why."""

    accepted: int
    ignored: list[FieldError]


class ProblemResponse(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(examples=["urn:dcar:problem:invalid-field"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["query: must not be empty"])
    errors: list[FieldError] | None = None


class OpenAIError(BaseModel):
    """An error in the shape of OpenAI's API. param: the invalid field."""

    message: str = Field(examples=["There is no collection 'shoes'; GET /collections lists the served ones."])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["model"])
    code: str | None = Field(examples=["model_not_found"])


class OpenAIErrorResponse(BaseModel):
    """An error of a route below /v1/."""

    error: OpenAIError
