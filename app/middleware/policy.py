"""Policies of routes: who may use a route, what a request costs, and how large its body may be.

- A policy is declared where its route is (see `app.api.routing`). The middleware and the OpenAPI document read it here.
- A request to a path without a policy never reaches the router.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import Scope

from app.core.settings import Settings

POLICY = "dcar.policy"  # scope key: the policy of the request's route, None without one
_JSON_BYTES_PER_CHAR = 12  # most bytes that one character takes in JSON: a surrogate pair of \uXXXX escapes
PART_BYTES = 64 * 2**10  # of a body beside its images: fields, boundaries, part headers


def query_bytes(settings: Settings) -> int:
    """Return the largest size of a query in JSON: two texts, and options."""
    return max(PART_BYTES, 2 * settings.max_query_chars * _JSON_BYTES_PER_CHAR + 1024)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a route needs.

    Attributes:
        access: who may use it. open: everybody; read: any API key, if the service has keys; monitor: also the admin
            key; write: the admin key, or a key that may write; admin: the admin key.
        scope: what a key must open. collection: the one in the path, or the default one; checked: the endpoint checks
            the collection; service: all collections.
        cost: 1 if a request counts against the rate limit, else 0; an endpoint may charge more, see `access.charge`.
        body: returns the largest size of a body in bytes.
        field: the field to name if a body is too large.
        is_private: True for routes of the search page, which are not documented.
    """

    access: Literal["open", "read", "monitor", "write", "admin"]
    scope: Literal["collection", "checked", "service"] = "collection"
    cost: Literal[0, 1] = 1
    body: Callable[[Settings], int] = query_bytes
    field: str = "body"
    is_private: bool = False


OPEN = Policy("open", "service", cost=0)
UNKNOWN = Policy("monitor", "service")  # of a path without a route, so that keys are needed to find out what exists


class Policies:
    """The policies of an application's routes, in the order in which routes are matched."""

    def __init__(self) -> None:
        self._declared: dict[str, dict[str, Policy]] = {}  # path template -> method -> policy
        self._patterns: dict[str, re.Pattern[str]] = {}  # of templates with parameters

    def add(self, template: str, pattern: re.Pattern[str], method: str, policy: Policy) -> None:
        """Declare the policy of a route. pattern: matches the paths of the template, with its parameters as groups."""
        self._declared.setdefault(template, {})[method] = policy
        if "{" in template:
            self._patterns[template] = pattern

    def find(self, scope: Scope) -> tuple[Policy | None, str | None]:
        """Return the policy of a request's route, None without a route, and the collection in its path.

        A method that the path does not have gets the policy of one that it has.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if (methods := self._declared.get(path)) is not None:
            return _choose(methods, scope["method"]), None
        for template, pattern in self._patterns.items():
            if match := pattern.match(path):
                return _choose(self._declared[template], scope["method"]), match.groupdict().get("collection")
        return None, None

    def of(self, template: str, method: str) -> Policy:
        """Return the policy of a route. Raise KeyError if it has none."""
        return self._declared[template][method]

    def undeclared(self, routes: Iterable[Any]) -> list[str]:
        """Return the paths of routes without a policy, which are not reachable."""
        return [
            path
            for route in routes
            if not {*(getattr(route, "methods", None) or ())} - {"HEAD"}
            <= self._declared.get(path := getattr(route, "path", str(route)), {}).keys()
        ]


def _choose(methods: dict[str, Policy], method: str) -> Policy:
    return methods.get(method) or next(iter(methods.values()))
