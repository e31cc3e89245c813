"""The route that accepts feedback: what callers' users did with the results of a search."""

import time
from datetime import UTC

from fastapi import Request
from fastapi.responses import Response

from app.api.requests import FeedbackEvent, FeedbackEvents, read_json
from app.api.responses import JsonResponse
from app.api.routing import Routes, state_of
from app.api.schemas import FeedbackResponse
from app.core.problems import Problem
from app.core.settings import Settings
from app.feedback.store import EventRow
from app.middleware.access import CALLER, Policy
from app.search.query import Query, SearchResults

routes = Routes("feedback")
_LISTED = 20  # ignored events in a response


def _body_bytes(settings: Settings) -> int:
    return 256 * 2**10 if settings.feedback else 1024


@routes.add(
    "POST", "/feedback", Policy("read", "checked", body=_body_bytes), FeedbackResponse, accepts=FeedbackEvents,
    errors=(403, 503),
)  # fmt: skip
async def feedback(request: Request) -> Response:
    """Store what was done with results. Events that are known, or that fit no search of the caller, change nothing."""
    log = state_of(request).feedback
    if log is None:
        raise Problem(403, "Feedback is off; set DCAR_FEEDBACK to enable it.")
    given = await read_json(request, FeedbackEvents, "text/plain")  # as navigator.sendBeacon sends texts
    ignored = await log.accept(request.scope.get(CALLER, ""), [_row(event) for event in given.events])
    listed = [{"field": f"events.{number}.{field}", "message": message} for number, field, message in ignored[:_LISTED]]
    return JsonResponse({"accepted": len(given.events) - len(ignored), "ignored": listed})


def noted(request: Request, query: Query, results: SearchResults, *, has_image: bool) -> str | None:
    """Note a search in the log, if there is one, and return its query id."""
    log = state_of(request).feedback
    if log is None:
        return None
    scope = request.scope
    collection = scope["path_params"].get("collection")
    return log.note(scope.get(CALLER, ""), collection, query, results, has_image=has_image)


def _row(event: FeedbackEvent) -> EventRow:
    moment = event.timestamp
    if moment is not None and moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    milliseconds = int((time.time() if moment is None else moment.timestamp()) * 1000)
    given = event.client_id, event.action_name, event.object_id, event.position, event.rating
    return EventRow(event.query_id, milliseconds, "", *given)
