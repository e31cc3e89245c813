"""Which Host headers are answered.

- A request without a Host header, or with two, is refused 400: proxies and servers may disagree about it.
- A request over loopback must name localhost, an address, or a host of DCAR_ALLOWED_HOSTS. Otherwise any web page could
  read the service of its visitor's machine, by a name that it leads there.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from ipaddress import ip_address

from starlette.types import Scope

from app.core.problems import Problem, field_problem

_PORT = re.compile(r":\d*$")


def host_problem(scope: Scope, allowed: Collection[str]) -> Problem | None:
    """Return the refusal of a request for another host, or None. allowed: names of this service; "*" allows all."""
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        is_old = not hosts and scope["http_version"] == "1.0"
        return None if is_old else field_problem("Host", "must be given once", status=400)
    name, server = _PORT.sub("", hosts[0]).strip("[]").lower(), scope.get("server")
    if name in allowed or "*" in allowed or _is_localhost_or_address(name):
        return None
    if server is None or not _is_loopback(server[0]):
        return None
    message = "must be localhost or an address; DCAR_ALLOWED_HOSTS adds the names of this service"
    return field_problem("Host", message, status=421)


@lru_cache(maxsize=256)
def _is_loopback(address: str) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:  # a Unix socket
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


@lru_cache(maxsize=256)
def _is_localhost_or_address(name: str) -> bool:
    try:
        return name == "localhost" or ("%" not in name and bool(ip_address(name)))  # a zone can be any text
    except ValueError:
        return False
