"""Policies of routes, and the checks that run before any body is read: keys, scopes and rates.

- A policy is declared where its route is (see `app.api.routing`), which applies it.
- A key for some collections opens their routes, and the few routes that check the collection themselves.
- Admin routes do not need an API key. The client address proves nothing: behind a proxy it is loopback.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import Scope

from app.core.keys import ApiKey, find_key_name, is_key, key_in
from app.core.problems import Problem, field_problem
from app.core.rate_limit import RateLimiter, current_caller
from app.core.settings import Settings

CALLER = "dcar.caller"  # scope key: the name of the request's API key
API_KEY = "dcar.api_key"  # scope key: the request's API key
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
        cost: 1 if a request counts against the rate limit, else 0; an endpoint may charge more, see `Access.charge`.
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


class Access:
    """Check and count each request. rates: None for no rate limit."""

    def __init__(self, settings: Settings, rates: RateLimiter | None) -> None:
        self._settings = settings
        self._default_collection = settings.default_collection  # it looks at the disk
        self._rates = rates

    async def check(self, scope: Scope, policy: Policy) -> None:
        """Write the caller and its key into the scope. Raise Problem if the policy refuses the request."""
        needs_key = bool(self._settings.api_keys) or policy.access in ("write", "admin")
        if policy.access == "open" or scope["method"] == "OPTIONS" or not (needs_key or self._rates is not None):
            return
        headers, key = Headers(scope=scope), None
        if self._settings.api_keys and policy.access != "admin":
            found = self._find_key(headers, accepts_admin=policy.access in ("monitor", "write"))
            if found is None:
                raise _unauthorized("a known API key")
            name, key = found
            collection = scope.get("path_params", {}).get("collection", self._default_collection)
            if policy.scope != "checked" and not key.opens(collection if policy.scope == "collection" else ""):
                raise out_of_scope()
            scope[CALLER], scope[API_KEY] = name, key
            current_caller.set(name)
        if policy.cost:
            await self.charge()
        if policy.access == "write" and not self._settings.writes:
            raise Problem(403, "Writing is disabled; set DCAR_WRITES=true to enable it.")
        if policy.access == "admin" or (policy.access == "write" and key is None):
            self._require_admin(headers)
        elif policy.access == "write" and key is not None and not key.may_write:
            raise out_of_scope()

    async def charge(self, extra: int | None = None) -> None:
        """Count the request, or `extra` beside it. Raise Problem if the caller exceeds the rate limit."""
        caller = current_caller.get()
        if self._rates is not None and (wait := await self._rates.charge(caller, extra)):
            seconds = max(1, math.ceil(wait))
            detail = f"Too many requests from {caller}. Try again in {seconds} s."
            raise Problem(429, detail, headers={"Retry-After": str(seconds)}, refused="rate")

    def _require_admin(self, headers: Headers) -> None:
        secret, key = self._settings.admin_key, key_in(headers)
        if secret is None:
            raise Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
        if key is None or not is_key(key, secret.get_secret_value()):
            raise _unauthorized("the admin key")

    def opens_everything(self, headers: Headers) -> bool:
        """Return True if no key is needed, or if a request has the admin key or a key that opens all collections."""
        found = self._find_key(headers, accepts_admin=True)
        return not self._settings.api_keys or (found is not None and found[1].collections is None)

    def _find_key(self, headers: Headers, *, accepts_admin: bool) -> tuple[str, ApiKey] | None:
        key, admin = key_in(headers), self._settings.admin_key
        if key is None:
            return None
        if accepts_admin and admin is not None and is_key(key, admin.get_secret_value()):
            return "admin", ApiKey("", may_write=True)
        name = find_key_name(self._settings.api_keys, key)
        return None if name is None else (name, self._settings.api_keys[name])


def _unauthorized(wanted: str) -> Problem:
    message, headers = f"must be `Bearer` and {wanted}", {"WWW-Authenticate": "Bearer"}
    return field_problem("Authorization", message, status=401, headers=headers, refused="key")


def out_of_scope() -> Problem:
    """Return a 403 for a key whose scope lacks a collection, or the right to write."""
    return field_problem("Authorization", "the scope of this key does not allow this", status=403, refused="scope")
