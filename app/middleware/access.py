"""ASGI middleware that runs before any body is read: it finds the policy of the route, checks keys and counts requests.

- Only paths with a declared policy are passed on; see `app.middleware.policy`.
- A key for some collections opens their routes, and the few routes that check the collection themselves.
- Admin routes do not need an API key. The client address proves nothing: behind a proxy it is loopback.
"""

import math
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.keys import ApiKey, find_key_name, is_key, key_in
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.rate_limit import RateLimiter, current_caller
from app.core.settings import Settings
from app.middleware.policy import POLICY, UNKNOWN, Policies, Policy

CALLER = "dcar.caller"  # scope key: the name of the request's API key
API_KEY = "dcar.api_key"  # scope key: the request's API key
_CHARGE = "dcar.charge"  # scope key: counts more requests for the caller


class Access:
    """Check and count each request. rates: None for no rate limit."""

    def __init__(
        self, app: ASGIApp, settings: Settings, policies: Policies, rates: RateLimiter | None, metrics: Metrics
    ) -> None:
        self._app = app
        self._settings = settings
        self._default_collection = settings.default_collection  # it looks at the disk
        self._policies = policies
        self._rates = rates
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            policy, collection = self._policies.find(scope)
            scope[POLICY] = policy
            problem = None
            if scope["method"] != "OPTIONS":
                problem = await self._problem(scope, policy or UNKNOWN, collection or self._default_collection)
            if problem is None and policy is None:
                problem = Problem(404, f"There is nothing at {scope['path'][:200]}; see /docs for the routes.")
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
            if scope["method"] in ("GET", "HEAD") and CALLER in scope:
                send = partial(_send_private, send)
        await self._app(scope, receive, send)

    async def _problem(self, scope: Scope, policy: Policy, collection: str) -> Problem | None:
        """Return why a request is refused; None if it is not."""
        needs_key = bool(self._settings.api_keys) or policy.access in ("write", "admin")
        if policy.access == "open" or not (needs_key or self._rates is not None):
            return None
        headers = Headers(scope=scope)
        caller, key = current_caller.get(), None
        if self._settings.api_keys and policy.access != "admin":
            found = self._find_key(headers, accepts_admin=policy.access in ("monitor", "write"))
            if found is None:
                return self._refuse("key", unauthorized("must be `Bearer` and a known API key"))
            caller, key = found
            if policy.scope != "checked" and not key.opens(collection if policy.scope == "collection" else ""):
                return self._refuse("scope", out_of_scope())
            scope[CALLER], scope[API_KEY] = caller, key
            current_caller.set(caller)
        if self._rates is not None and policy.cost:
            scope[_CHARGE] = partial(self._charge, self._rates, caller)
            if (problem := await self._charge(self._rates, caller)) is not None:
                return problem
        if policy.access == "write" and not self._settings.writes:
            return Problem(403, "Writing is disabled; set DCAR_WRITES=true to enable it.")
        if policy.access == "admin" or (policy.access == "write" and key is None):
            return self._check_admin(headers)
        if policy.access == "write" and key is not None and not key.may_write:
            return out_of_scope()
        return None

    async def _charge(self, rates: RateLimiter, caller: str, extra: int | None = None) -> Problem | None:
        wait = await rates.charge(caller, extra)
        if not wait:
            return None
        seconds = max(1, math.ceil(wait))
        detail = f"Too many requests from {caller}. Try again in {seconds} s."
        return self._refuse("rate", Problem(429, detail, headers={"Retry-After": str(seconds)}))

    def _check_admin(self, headers: Headers) -> Problem | None:
        secret, key = self._settings.admin_key, key_in(headers)
        if secret is None:
            return Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them.")
        if key is None or not is_key(key, secret.get_secret_value()):
            return self._refuse("key", unauthorized("must be `Bearer` and the admin key"))
        return None

    def _find_key(self, headers: Headers, *, accepts_admin: bool) -> tuple[str, ApiKey] | None:
        key, admin = key_in(headers), self._settings.admin_key
        if key is None:
            return None
        if accepts_admin and admin is not None and is_key(key, admin.get_secret_value()):
            return "admin", ApiKey("", may_write=True)
        name = find_key_name(self._settings.api_keys, key)
        return None if name is None else (name, self._settings.api_keys[name])

    def _refuse(self, reason: str, problem: Problem) -> Problem:
        self._metrics.refused.labels(reason).inc()
        return problem


async def _send_private(send: Send, message: Message) -> None:
    """Keep shared caches from storing a response that needed a key."""
    if message["type"] == "http.response.start":
        headers = MutableHeaders(raw=message["headers"])
        headers.setdefault("Cache-Control", "private")
        headers.add_vary_header("Authorization, X-API-Key")
    await send(message)


async def charge(request: Request, more: int) -> None:
    """Count `more` requests beside the one that is counted already. Raise Problem if they exceed the rate limit."""
    count: Callable[[int], Awaitable[Problem | None]] | None = request.scope.get(_CHARGE)
    problem = await count(more) if count is not None and more else None
    if problem is not None:
        raise problem


def unauthorized(message: str) -> Problem:
    """Return a 401 that names the header and the scheme."""
    problem = field_problem("Authorization", message, status=401)
    problem.headers["WWW-Authenticate"] = "Bearer"
    return problem


def out_of_scope() -> Problem:
    """Return a 403 for a key whose scope lacks a collection, or the right to write."""
    return field_problem("Authorization", "the scope of this key does not allow this", status=403)
