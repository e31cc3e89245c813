"""Log lines with the id of the request that they belong to: plain, or one JSON object each (DCAR_LOG_FORMAT=json).

- A request's id is the caller's X-Request-ID when that is well-formed, else a new one; the answer carries it back.
- No log line holds a query's text or a key.
"""

import contextvars
import itertools
import logging
import os
import re
from typing import Any

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")

_PROCESS = os.urandom(8).hex()
_numbers = itertools.count()
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_OURS = ("app", "dcar_core", "index_jobs")


def choose_id(given: str | None) -> str:
    """The id of a request: the given one, or a number after what is random for each process."""
    return given if given is not None and _WELL_FORMED.fullmatch(given) else f"{_PROCESS}{next(_numbers):016x}"


class _WithId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def log_config(level: str, form: str) -> dict[str, Any]:
    """For logging.config.dictConfig: everything to stderr; of uvicorn only what went wrong, since we log accesses."""
    line = {
        "format": "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s",
        "datefmt": "%Y-%m-%d %H:%M:%S",
    }
    json = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "fmt": "%(asctime)s %(levelname)s %(name)s %(request_id)s %(message)s",
        "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": json if form == "json" else line},
        "filters": {"with_id": {"()": _WithId}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["with_id"]}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},  # libraries tell much while they load
        "loggers": {
            **{name: {"level": level.upper()} for name in _OURS},
            "uvicorn.error": {"level": "DEBUG" if level == "debug" else "WARNING"},
            "uvicorn.access": {"level": "CRITICAL", "propagate": False},
            "python_multipart": {"level": "ERROR"},
        },
    }
