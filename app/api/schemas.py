"""What comes back, as pydantic models: the documentation of the API's answers.

Answers are built as plain dicts (see `answers`) and not validated again; the tests check them against these models.
What is only there when it was asked for is absent otherwise, not null.
"""

from typing import Any

from pydantic import BaseModel, Field

from app.search.pairs import Fit


class Word(BaseModel):
    """A word of the query and its weight; 1 is the average."""

    word: str = Field(examples=["crying"])
    weight: float = Field(examples=[1.21])


class Explanation(BaseModel):
    """Why a result has its score.

    relevance: patch by patch, what that part of the picture, as the model sees it, adds to the score.
    fit: how a square under that map shows what the model sees, as CSS's object-fit: a cut from the middle (cover), the
        picture squeezed (fill), or all of it with margins (contain).
    words: the query's words with their exact weights for this picture.
    """

    relevance: list[list[float]]
    fit: Fit = "cover"
    words: list[Word] | None = None


class Result(BaseModel):
    """One result. score is the cosine between query and item, at most 1.

    rerank_score: the cosine under the pair's exact weights, which results are then sorted by. folded: near-duplicates.
    metadata: the `fields` that were asked for, as far as the item has them.
    """

    rank: int = Field(examples=[1])
    id: str = Field(examples=["1f63f.png"])
    score: float = Field(examples=[0.4213])
    caption: str = Field(examples=["crying cat"])
    category: str = Field(examples=["cat face"])
    image_url: str = Field(examples=["/items/1f63f.png/image"])
    metadata: dict[str, Any] | None = None
    rerank_score: float | None = None
    folded: list[str] | None = None
    explanation: Explanation | None = None


class SearchAnswer(BaseModel):
    """Results, best first, and the index version that they are from.

    next_offset: where the next page begins; absent after the last. min_score: the cut-off that was applied.
    words: the query's words, weighed by the text alone.
    """

    index_version: int
    took_ms: float = Field(description="from the parsed query to the results, in milliseconds")
    cached: bool = Field(description="whether the query's embedding was remembered")
    results: list[Result]
    next_offset: int | None = None
    min_score: float | None = None
    words: list[Word] | None = None


class BatchAnswer(BaseModel):
    """The answers to several searches, in their order, all by one version."""

    index_version: int
    answers: list[SearchAnswer]


class Collection(BaseModel):
    """One domain that is served. count is 0 until it is loaded.

    min_score: what "auto" means there; null where the index was not calibrated.
    """

    name: str = Field(examples=["twemoji"])
    default: bool
    count: int
    index_version: int | None
    min_score: float | None


class CollectionList(BaseModel):
    """All that is served, the default one first."""

    collections: list[Collection]


class Known(BaseModel):
    """Everything that is known about an item of the gallery."""

    id: str
    caption: str
    category: str
    metadata: dict[str, Any]
    image_url: str


class ItemAnswer(Known):
    """One item, and the index version that knows it."""

    index_version: int


class ItemList(BaseModel):
    """Some of the gallery's items. count: how many there are in all; next_offset: absent after the last."""

    index_version: int
    count: int
    items: list[Known]
    next_offset: int | None = None


class Health(BaseModel):
    """The process lives."""

    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """ready: searches are answered. degraded: they are, by an older version than the published one; reason says why.

    index_version and count are the default collection's.
    """

    status: str = Field(examples=["ready", "degraded"])
    index_version: int
    count: int = Field(description="items in the index")
    reason: str | None = None


class Reloaded(BaseModel):
    """After a reload: the default collection's version, that of each by name, and whether any has changed."""

    index_version: int
    versions: dict[str, int]
    changed: bool


class FieldError(BaseModel):
    """A field at fault, under the caller's name for it."""

    field: str = Field(examples=["query"])
    message: str = Field(examples=["must not be empty"])


class ProblemAnswer(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(examples=["urn:dcar:problem:invalid-field"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["query: must not be empty"])
    errors: list[FieldError] | None = None
