"""The routes of names that are taught by examples; see `app.search.concepts`."""

from typing import Annotated

from fastapi import Request
from fastapi.responses import Response
from pydantic import FailFast, Field

from app.api.guard import Policy
from app.api.requests import Strict
from app.api.responses import ConceptsResponse
from app.api.routing import (
    JsonResponse,
    Routes,
    collection_of,
    read_json,
    state_of,
    version_of,
)
from app.api.writing import newest_version, storing
from app.core.problems import Problem
from app.search.concepts import MAX_IDS, MAX_NAME, TaughtConcept
from app.search.query import Name, Text

routes = Routes()


class Examples(
    Strict, json_schema_extra={"examples": [{"ids": ["1f63f", "1f640"], "kind": "cat"}]}
):
    """What teaches a name: items that it stands for."""

    ids: Annotated[
        tuple[Name, ...],
        Field(min_length=1, max_length=MAX_IDS),
        FailFast(),
    ]
    not_ids: Annotated[tuple[Name, ...], FailFast()] = Field(
        (),
        max_length=MAX_IDS,
        description="items that are none",
    )
    kind: Text = Field(
        "",
        max_length=MAX_NAME,
        description="takes the place of the name in texts",
    )


@routes.add(
    "PUT",
    "/concepts/{name}",
    Policy("write", body=lambda _: 2**20),
    TaughtConcept,
    accepts=Examples,
)
async def put_concept(request: Request, name: str) -> Response:
    """Let `@name` stand for items like these, in place of what it stood for; at most 64
    letters, digits, - and _.
    """
    body = await read_json(request, Examples)
    served = await newest_version(request)
    state = state_of(request)
    async with storing("name", state.collections, collection_of(request)):
        teach = served.concepts.teach
        return JsonResponse(
            await state.retriever.examine(
                teach,
                name,
                body.ids,
                body.kind,
                body.not_ids,
            )
        )


@routes.add("GET", "/concepts", Policy("read"), ConceptsResponse)
async def concepts(request: Request) -> Response:
    """List the taught names."""
    served = await version_of(request)
    return JsonResponse(
        {
            "concepts": (
                await state_of(request).retriever.examine(served.concepts.describe)
            )
        }
    )


@routes.add("GET", "/concepts/{name}", Policy("read"), TaughtConcept)
async def concept(request: Request, name: str) -> Response:
    """Return a taught name with the ids that it was taught by."""
    served = await version_of(request)
    for taught in await state_of(request).retriever.examine(
        served.concepts.describe, name
    ):
        return JsonResponse(taught)
    raise Problem(404, "There is no such name.", errors=[("name", "unknown")])


@routes.add("DELETE", "/concepts/{name}", Policy("write"), status=204)
async def delete_concept(request: Request, name: str) -> Response:
    """Forget a name; its examples stay in the index."""
    served = await newest_version(request)
    state = state_of(request)
    async with storing("change", state.collections, collection_of(request)):
        if not await state.retriever.examine(served.concepts.forget, name):
            raise Problem(404, "There is no such name.", errors=[("name", "unknown")])
    return Response(status_code=204)
