"""Notify running services of a published version, so that they load it before their next poll.

- `redis://...` publishes on a channel that services with the same Redis subscribe to.
- `http(s)://...` posts to the admin route of one service, with the key in DCAR_ADMIN_KEY.
- An unreachable service does not fail the job: the version is published, and services poll CURRENT.
- Redirects are not followed, since they could take the key elsewhere.
"""

import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import InvalidURL
from pathlib import Path
from typing import Any

from index_jobs.store.manifest import PUBLISHED_CHANNEL

logger = logging.getLogger(__name__)

_RELOAD = "/admin/reload"
_TIMEOUT_S = 10.0
_REDIS = ("redis://", "rediss://", "unix://")
SCHEMES = (*_REDIS, "http://", "https://")


def notify(services: Sequence[str], index: Path, version: int) -> dict[str, str]:
    """Notify each service and return the outcomes by service, without secrets. Unreachable services raise nothing.

    Args:
        services: URLs that begin with one of SCHEMES.
    """
    outcomes = {}
    for url in services:
        shown = _without_secrets(url)
        try:
            outcomes[shown] = _publish(url, index, version) if url.startswith(_REDIS) else _post(url)
        except Exception as error:
            may_quote_url = isinstance(error, ValueError | InvalidURL)
            reason = type(error).__name__ if may_quote_url else error or type(error).__name__
            outcomes[shown] = f"not reached: {reason}"
            logger.warning("%s could not be notified of version %d: %s", shown, version, outcomes[shown])
    return outcomes


def _without_secrets(url: str) -> str:
    """Return the URL without user, password and query."""
    scheme, _, rest = url.partition("://")
    head = re.split("[?#]", rest)[0]
    is_complete = "@" in head or "@" not in rest  # otherwise the split went through a password
    return f"{scheme}://{head.rpartition('@')[2] if is_complete else ''}"


def _publish(url: str, index: Path, version: int) -> str:
    import redis

    message = json.dumps({"index": str(index.absolute()), "version": version})
    with redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S) as client:
        return f"received by {client.publish(PUBLISHED_CHANNEL, message)}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Make the redirect an error."""


def _post(url: str) -> str:
    request = urllib.request.Request(url.rstrip("/") + _RELOAD, method="POST")
    request.add_header("Authorization", f"Bearer {os.environ.get('DCAR_ADMIN_KEY', '')}")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_S) as response:
            versions: dict[str, int] = json.loads(response.read())["versions"]
    except urllib.error.HTTPError as error:
        with error:
            detail = error.read().decode(errors="replace")[:200]
        hint = "; is DCAR_ADMIN_KEY the admin key of the service?" if error.code in {401, 403} else ""
        raise OSError(f"{error.code} {error.reason}: {detail}{hint}") from None
    return "serves " + ", ".join(f"version {version} of {name}" for name, version in versions.items())
