"""The one error of the client.

Exception
`- ServiceError    the service (or a proxy before it) sent an error, or a body that is not the service's

Without a response, httpx raises `httpx.TransportError`.
"""

import httpx
from pydantic import ValidationError

from dcar_client.models import ProblemResponse


class ServiceError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        problem: the problem document (RFC 9457); None if the response has none.
        request_id: the id under which the service logged the request; None if the response has none.
    """

    def __init__(self, status: int, problem: ProblemResponse | None = None, request_id: str | None = None) -> None:
        detail = problem.detail if problem is not None else "not a response of the service"
        super().__init__(f"{status}: {detail}" + (f" (request {request_id})" if request_id else ""))
        self.status = status
        self.problem = problem
        self.request_id = request_id


def error_from(response: httpx.Response) -> ServiceError:
    """Return the error that a response stands for."""
    try:
        problem = ProblemResponse.model_validate_json(response.content)
    except ValidationError:
        problem = None
    return ServiceError(response.status_code, problem, response.headers.get("x-request-id"))
