"""The routes of feedback, and searches that its log notes."""

import asyncio
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from app.api.requests import CLIENT_NAME, FeedbackEvent, FeedbackEvents, read_json
from app.api.responses import JsonResponse
from app.api.routing import Routes, collection_of, state_of
from app.api.schemas import FeedbackResponse
from app.core.problems import Problem
from app.feedback.store import EventRow
from app.http.access import CALLER, Policy
from app.search.query import Query
from app.search.results import SearchResponse
from dcar_core.util.errors import ArtifactError, DcarError
from index_jobs.index.versions import read_manifest, version_numbers

routes = Routes("feedback")
_LISTED = 20  # ignored events in a response
_CLIENT = re.compile(CLIENT_NAME)
_DAY_S = 24 * 3600
_VERSIONS = 20  # the newest ones, on the insights page
_OFF = "Feedback is off; set DCAR_FEEDBACK to enable it."


@routes.add(
    "POST", "/feedback", Policy("read", "checked", body=lambda settings: 2**18 if settings.feedback else 2**10),
    FeedbackResponse, accepts=FeedbackEvents, errors=(403, 503),
)  # fmt: skip
async def feedback(request: Request) -> Response:
    """Store what was done with results. Events that are known, or that fit no search of the caller, change nothing."""
    log = state_of(request).feedback
    if log is None:
        raise Problem(403, _OFF)
    given = await read_json(request, FeedbackEvents, "text/plain")  # as navigator.sendBeacon sends texts
    ignored = await log.accept(request.scope.get(CALLER, ""), [_row(event) for event in given.events])
    listed = [{"field": f"events.{number}.{field}", "message": message} for number, field, message in ignored[:_LISTED]]
    return JsonResponse({"accepted": len(given.events) - len(ignored), "ignored": listed})


@routes.add("GET", "/ui/insights/data", Policy("admin", is_private=True))
async def insights(request: Request) -> Response:
    """Return what the log says about the searches of a collection, and its versions."""
    log, collections = state_of(request).feedback, state_of(request).collections
    name = collection_of(request) or collections.default
    index = collections.find(name).index
    if log is None:
        raise Problem(404, _OFF)
    try:
        summary = await log.insights(name)
    except DcarError as error:
        raise Problem(503, str(error)) from None
    versions = await asyncio.to_thread(_versions, index, summary["versions"])
    names = [each for each, _ in collections]
    return JsonResponse({**summary, "versions": versions, "collection": name, "collections": names})


def _versions(index: Path, served: dict[int, dict[str, int]]) -> list[dict[str, Any]]:
    """Return the newest versions with their recall on validation texts, and the searches that they answered."""
    found = list[dict[str, Any]]()
    for number in version_numbers(index)[: -_VERSIONS - 1 : -1]:
        with suppress(ArtifactError):  # damaged, or removed meanwhile
            manifest = read_manifest(index, number)
            recall = {k: manifest.cutoff[name] for k in (1, 5, 10) if (name := f"recall_at_{k}") in manifest.cutoff}
            facts = {"version": number, "created": manifest.created, "count": manifest.count, "change": manifest.change}
            found.append({**facts, "recall": recall, **served.get(number, {"searches": 0, "clicked": 0})})
    return found


def noted(request: Request, query: Query, body: SearchResponse, *, has_image: bool) -> None:
    """Note a search in the log, if there is one, and name it in the body.

    One result with `explain` or `facets` is asked for about a list that was noted.
    """
    log = state_of(request).feedback
    if log is not None and not (query.k == 1 and (query.explain or query.facets)):
        caller, client = request.scope.get(CALLER, ""), _client_of(request)
        body["query_id"] = log.note(caller, collection_of(request), query, body, has_image=has_image, client=client)


def _client_of(request: Request) -> str:
    """Return the client that a request names, "" for none, or for a name that an event could not have."""
    for name, value in request.scope["headers"]:
        if name == b"x-client-id":
            return client if _CLIENT.fullmatch(client := value.decode("latin-1")) else ""
    return ""


def _row(event: FeedbackEvent) -> EventRow:
    now = moment = datetime.now(UTC)
    if event.timestamp is not None:
        given = event.timestamp if event.timestamp.tzinfo else event.timestamp.replace(tzinfo=UTC)
        moment = given if abs((given - now).total_seconds()) < _DAY_S else now  # a search has events for a day
    milliseconds = int(moment.timestamp() * 1000)
    facts = event.client_id, event.action_name, event.object_id, event.rating
    return EventRow(event.query_id, milliseconds, *facts)
