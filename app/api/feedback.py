"""The routes of feedback, and searches that its log notes."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, FailFast, Field, ValidationInfo

from app.api.guard import CALLER, Policy
from app.api.requests import Strict
from app.api.responses import FeedbackResponse
from app.api.routing import JsonResponse, Routes, collection_of, read_json, state_of
from app.core.problems import Problem
from app.core.turns import run_in_new_thread
from app.feedback.export import summarize
from app.feedback.log import EventRow
from app.search.query import Query
from app.search.results import SearchResponse
from dcar_core.util.errors import ArtifactError, DcarError
from dcar_core.util.processes import in_own_process
from index_jobs.index.versions import read_manifest, version_numbers

routes = Routes()
MAX_EVENTS = 500
_CLIENT = "^[!-~]{1,100}$"
_LISTED = 20  # ignored events in a response
_VERSIONS = 20  # the newest ones, on the insights page
_OFF = "Feedback is off; set DCAR_FEEDBACK to enable it."


def _check_rating(rating: int | None, info: ValidationInfo) -> int | None:
    action = info.data.get("action_name")  # None if it is wrong
    if action is not None and (action == "judge") != (rating is not None):
        raise ValueError("belongs to the action `judge`, which needs it")
    return rating


class FeedbackEvent(BaseModel):
    """What a client did with a result, in the names of OpenSearch's User Behavior
    Insights; its others are ignored.
    """

    query_id: Annotated[
        str, Field(min_length=1, max_length=100, description="of the search response")
    ]
    client_id: Annotated[
        str,
        Field(
            pattern=_CLIENT,
            description="who did it: 1 to 100 ASCII characters without spaces",
        ),
    ]
    action_name: Literal["impression", "click", "save", "purchase", "judge"]
    object_id: Annotated[
        str, Field(min_length=1, max_length=1024, description="`id` of the result")
    ]
    rating: Annotated[
        Annotated[int, Field(ge=0, le=3, strict=True)] | None,
        AfterValidator(_check_rating),
    ] = Field(
        None,
        validate_default=True,
        description="of `judge`: from 0, wrong, to 3, exactly right",
    )


class FeedbackEvents(Strict):
    """Events of one client or several, of one search or several."""

    events: Annotated[
        list[FeedbackEvent],
        Field(min_length=1, max_length=MAX_EVENTS),
        FailFast(),
    ]


@routes.add(
    "POST",
    "/feedback",
    Policy("read", "checked", body=lambda _: 2**18),
    FeedbackResponse,
    accepts=FeedbackEvents,
)
async def feedback(request: Request) -> Response:
    """Store what was done with results. Events that are known, or that fit no search of
    the caller, change nothing.
    """
    log = state_of(request).feedback
    if log is None:
        raise Problem(403, _OFF)
    # as navigator.sendBeacon sends texts
    body = await read_json(request, FeedbackEvents, "text/plain")
    now = int(time.time() * 1000)
    rows = [
        EventRow(
            event.query_id,
            now,
            event.client_id,
            event.action_name,
            event.object_id,
            event.rating,
        )
        for event in body.events
    ]
    faults = await log.accept(request.scope.get(CALLER, ""), rows)
    ignored = [
        {"field": f"events.{number}.{fault[0]}", "message": fault[1]}
        for number, fault in enumerate(faults)
        if fault
    ]
    return JsonResponse(
        {"accepted": len(faults) - len(ignored), "ignored": ignored[:_LISTED]}
    )


@routes.add("GET", "/ui/insights/data", Policy("admin", is_view=True, is_private=True))
async def insights(request: Request) -> Response:
    """Return what the log says about the searches of a collection, and its versions."""
    log = state_of(request).feedback
    collections = state_of(request).collections
    name = collection_of(request) or collections.default
    index = collections.find(name).path
    if log is None:
        raise Problem(404, _OFF)
    try:
        summary = await run_in_new_thread(in_own_process, summarize, log.folder, name)
    except DcarError as error:
        raise Problem(503, str(error)) from None
    versions = await asyncio.to_thread(_versions, index, summary["versions"])
    has_texts = state_of(request).settings.feedback_texts
    names = [name for name, _ in collections]
    more = {
        "versions": versions,
        "collection": name,
        "collections": names,
        "has_texts": has_texts,
    }
    return JsonResponse({**summary, **more})


def _versions(index: Path, counts: dict[int, dict[str, int]]) -> list[dict[str, Any]]:
    """Return the newest versions with their recall on validation texts, and the
    searches that they answered.
    """
    versions = list[dict[str, Any]]()
    for number in version_numbers(index)[: -_VERSIONS - 1 : -1]:
        with suppress(ArtifactError):  # damaged, or removed meanwhile
            manifest = read_manifest(index, number)
            recall = {
                k: manifest.cutoff[name]
                for k in (1, 5, 10)
                if (name := f"recall_at_{k}") in manifest.cutoff
            }
            facts = {
                "version": number,
                "created": manifest.created,
                "count": manifest.count,
                "change": manifest.change,
            }
            versions.append(
                {
                    **facts,
                    "recall": recall,
                    **counts.get(number, {"searches": 0, "clicked": 0}),
                }
            )
    return versions


def noted(
    request: Request,
    query: Query,
    body: SearchResponse,
    *,
    has_image: bool,
) -> None:
    """Note a search in the log, if there is one, and name it in the body.

    One result with `explain` or `facets` is asked for about a list that was noted.
    """
    log = state_of(request).feedback
    if log is not None and not (query.k == 1 and (query.explain or query.facets)):
        caller = request.scope.get(CALLER, "")
        collection = collection_of(request)
        body["query_id"] = log.note(
            caller,
            collection,
            query,
            body,
            has_image=has_image,
        )
