"""The log line and the metrics of a request.

Metrics name the route's template; paths that match no route count as "none".
"""

import logging
from urllib.parse import quote

from starlette.types import Scope

from app.core.metrics import Metrics
from app.http.access import CALLER

logger = logging.getLogger(__name__)

_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_MAX_PATH = 300  # characters


def log_request(metrics: Metrics, scope: Scope, method: str, status: int, seconds: float) -> None:
    template: str = getattr(scope.get("route"), "path", None) or "none"
    metrics.requests.labels(template, str(status)).observe(seconds)
    if status == 200 and scope["path"] in _PROBES:
        return  # probes arrive every few seconds
    if logger.isEnabledFor(logging.INFO):
        client, path = scope.get("client"), quoted_path(scope)
        extra = {
            "method": method,
            "path": path,
            "status": status,
            "ms": round(seconds * 1000, 2),
            "client": client[0] if client else None,
            "caller": scope.get(CALLER),
        }
        logger.info("%s %s %d in %.1f ms", method, path, status, seconds * 1000, extra=extra)


def quoted_path(scope: Scope) -> str:
    """Return the path for a log line; a raw one may contain line breaks."""
    return quote(scope["path"][:_MAX_PATH])
