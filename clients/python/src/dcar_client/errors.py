"""The one error of the client.

Exception
`- ServiceError    the service (or a proxy before it) sent an error, or a body that is
                   not the service's

Without a response, httpx raises `httpx.TransportError`. Texts of a response are cleaned
before they become part of an error: see `dcar_client.limits.clean`.
"""

import contextlib
from functools import partial

import httpx

from dcar_client.limits import clean, json_of, secrets_of
from dcar_client.models import FieldError, ProblemResponse


class ServiceError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        problem: the problem document (RFC 9457); None if the response has none.
        request_id: the id under which the service logged the request; None if the
            response has none.
    """

    def __init__(
        self,
        status: int,
        problem: ProblemResponse | None = None,
        request_id: str | None = None,
    ) -> None:
        if problem is not None:
            detail = problem.detail
        else:
            detail = "not a response of the service"
        super().__init__(
            f"{status}: {detail}" + (f" (request {request_id})" if request_id else "")
        )
        self.status = status
        self.problem = problem
        self.request_id = request_id


def error_from(response: httpx.Response) -> ServiceError:
    """Return the error that a response stands for, without the key or password of its
    request.
    """
    plain = partial(clean, secrets=secrets_of(response.request.headers))
    problem = None
    with contextlib.suppress(ValueError):
        sent = ProblemResponse.model_validate(json_of(response))
        texts = {
            name: plain(getattr(sent, name)) for name in ("type", "title", "detail")
        }
        faults = sent.errors and [
            FieldError(field=plain(error.field), message=plain(error.message))
            for error in sent.errors[:20]
        ]
        problem = sent.model_copy(update={**texts, "errors": faults})
    request_id = plain(response.headers.get("x-request-id", "")) or None
    return ServiceError(response.status_code, problem, request_id)
