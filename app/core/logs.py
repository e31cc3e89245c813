"""Logging: plain lines or JSON objects (DCAR_LOG_FORMAT=json), each with the id of its request.

- The id of a request is the caller's X-Request-ID if it is well-formed, else a new one; the response returns it.
- No log line holds the text of a query or a key.
"""

import contextvars
import logging
import random
import re
from typing import Any

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_PACKAGES = ("app", "dcar_core", "index_jobs")


def choose_id(sent: str | None) -> str:
    """Return the id of a request: the one that the caller sent if it is well-formed, else a new one."""
    # A UUID reads the system's random numbers, for which the event loop would give its turn to other threads.
    return sent if sent is not None and _WELL_FORMED.fullmatch(sent) else f"{random.getrandbits(128):032x}"


class _AddRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def log_config(level: str, log_format: str) -> dict[str, Any]:
    """Return the argument of logging.config.dictConfig.

    Everything goes to stderr. Of uvicorn only warnings are logged: the service logs requests itself.
    """
    line = {"format": "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s", "datefmt": "%F %T"}
    json = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "fmt": "%(asctime)s %(levelname)s %(name)s %(request_id)s %(message)s",
        "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": json if log_format == "json" else line},
        "filters": {"with_id": {"()": _AddRequestId}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["with_id"]}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},  # libraries log much while they load
        "loggers": {
            **{name: {"level": level.upper()} for name in _PACKAGES},
            "uvicorn.error": {"level": "DEBUG" if level == "debug" else "WARNING"},
            "uvicorn.access": {"level": "CRITICAL", "propagate": False},
            "python_multipart": {"level": "ERROR"},
            "py.warnings": {"level": "WARNING" if level == "debug" else "ERROR"},  # those of libraries
        },
    }
