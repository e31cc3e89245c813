"""Tell running services that a version was published, so that they need not look for it.

- `redis://..` publishes on a channel that services with the same Redis listen to; `http(s)://..` posts to one service's
  admin route, with the key of DCAR_ADMIN_KEY.
- Nobody being there is no failure: the version is published, and services look at CURRENT by themselves.
- Redirects are not followed: they could take the key elsewhere.
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

logger = logging.getLogger(__name__)

CHANNEL = "dcar:published"
RELOAD = "/admin/reload"
_TIMEOUT_S = 10.0
_REDIS = ("redis://", "rediss://", "unix://")
SCHEMES = (*_REDIS, "http://", "https://")


def notify(targets: Sequence[str], index: Path, version: int) -> dict[str, str]:
    """Tell each target; what came of it by target, without secrets. Never raises for a target that cannot be reached.

    Args:
        targets: URLs that begin with one of SCHEMES.
    """
    told = {}
    for target in targets:
        shown = _place(target)
        try:
            told[shown] = _redis(target, index, version) if target.startswith(_REDIS) else _http(target)
        except Exception as error:
            quoted = isinstance(error, ValueError | InvalidURL)  # such a message has a part of the URL
            told[shown] = f"not reached: {type(error).__name__ if quoted else error or type(error).__name__}"
            logger.warning("%s could not be told of version %d: %s", shown, version, told[shown])
    return told


def _place(target: str) -> str:
    """Without user, password and options."""
    scheme, _, rest = target.partition("://")
    head = re.split("[?#]", rest)[0]
    told = "@" in head or "@" not in rest  # else it is a password that was cut
    return f"{scheme}://{head.rpartition('@')[2] if told else ''}"


def _redis(url: str, index: Path, version: int) -> str:
    import redis

    client = redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    try:
        message = json.dumps({"index": str(index.absolute()), "version": version})
        return f"heard by {client.publish(CHANNEL, message)}"
    finally:
        client.close()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """No other request: the redirect is the answer, an error."""


def _http(url: str) -> str:
    request = urllib.request.Request(url.rstrip("/") + RELOAD, method="POST")
    request.add_header("Authorization", f"Bearer {os.environ.get('DCAR_ADMIN_KEY', '')}")
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=_TIMEOUT_S) as answer:
            versions: dict[str, int] = json.loads(answer.read())["versions"]
    except urllib.error.HTTPError as error:
        with error:
            detail = error.read().decode(errors="replace")[:200]
        hint = "; is DCAR_ADMIN_KEY the service's admin key?" if error.code in {401, 403} else ""
        raise OSError(f"{error.code} {error.reason}: {detail}{hint}") from None
    return "serves " + ", ".join(f"version {version} of {name}" for name, version in versions.items())
