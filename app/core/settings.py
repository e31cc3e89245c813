"""The service's settings: one frozen, typed object, read from DCAR_* variables and flags, checked before it starts.

- Arguments given to `Settings(...)` (command line flags) win over the environment; nothing reads the environment later.
- Secrets are SecretStr, so that neither a log line nor a traceback shows them.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from app.core.keys import parse_keys
from app.core.rate_limit import parse_rate
from app.core.redis import check as check_redis
from dcar_core.util.errors import DcarError

DEFAULT_K = 10
MOST_QUERIES = 1000  # in one batch request, whatever the settings say
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*?#@]+")  # what a browser sends is compared as a whole
_SLIP = 0.85  # how alike a name and that of a setting are, from 0 to 1, to be taken for it with a slip


class Settings(BaseSettings):
    """Every field is also an environment variable: `index` is DCAR_INDEX, `redis_url` is DCAR_REDIS_URL, and so on."""

    model_config = SettingsConfigDict(env_prefix="DCAR_", frozen=True, env_ignore_empty=True)

    index: Path = Field(description="published index directory, the --out of `dcar index build`")
    collections: dict[str, Path] = Field(
        {}, description='more indexes, each by its name: {"openmoji": "data/index/openmoji"}'
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535, description="0 takes a free one")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    tracing: bool = Field(False, description="OpenTelemetry traces, sent where OTEL_EXPORTER_OTLP_ENDPOINT says")
    drain_s: float = Field(
        0, ge=0, description="at the end, /readyz says no for so long before connections are refused"
    )

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    runtime: str = Field(
        "auto", description="what runs the encoder: auto, torch, openvino-bf16, ..: docs/how-to/choose-a-runtime.md"
    )
    runtime_cache: Path | None = Field(None, description="exports and measurements; unset: the user's cache directory")
    threads: int | None = Field(None, ge=1, description="cores for the model; unset leaves it to PyTorch")
    batch_size: int = Field(32, ge=1, le=1024, description="most queries in one forward pass")
    batch_wait_ms: float = Field(2.0, ge=0, le=100, description="longest wait for company, under load only")
    max_pending: int = Field(512, ge=1, description="searches at a time; more are answered 503 at once")
    max_queue_ms: int = Field(2000, ge=1, description="longest expected wait for the model; beyond it 503 at once")
    deadline_ms: int = Field(10_000, ge=1, description="for a search once it is read; 503 after that")

    redis_url: SecretStr | None = Field(None, description="unset: the cache lives in this process; see redis_client.py")
    redis_timeout_ms: int = Field(100, ge=1, description="a slower Redis counts as absent")
    cache_size: int = Field(10_000, ge=0, description="embeddings kept in this process, before Redis; 0 none")
    cache_ttl_s: int = Field(7 * 24 * 3600, ge=1, description="lifetime of an entry in Redis")

    max_upload_bytes: int = Field(20 * 2**20, ge=1024)
    max_in_flight_bytes: int = Field(256 * 2**20, ge=1024, description="that have come of all bodies under way")
    upload_timeout_s: float = Field(30, gt=0, description="for a body to arrive; 408 after that")
    max_pixels: int = Field(64_000_000, ge=1, description="of a query picture, checked before it is decoded")
    max_query_chars: int = Field(1000, ge=1)
    max_k: int = Field(200, ge=DEFAULT_K)
    max_window: int = Field(1000, ge=DEFAULT_K, description="deepest result that paging reaches: offset + k")
    max_queries: int = Field(32, ge=1, le=MOST_QUERIES, description="in one request to /search/batch")
    rerank_depth: int = Field(20, ge=1, le=200, description="results that `rerank` scores again")
    explain_results: int = Field(8, ge=1, le=200, description="results on a page that `explain` explains")

    poll_s: float = Field(2.0, ge=0, description="how often CURRENT is looked at for a new version; 0 never")
    admin_key: SecretStr | None = Field(
        None, description="bearer key of /admin, or sha256:HASH of it; unset disables it"
    )
    api_keys: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="NAME:HASH,NAME:HASH of the keys that may search, from `dcar key NAME`; unset lets everybody"
    )
    rate_limit: str | None = Field(None, description="of each key, or address without keys: 20/second, 600/minute")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="other sites whose pages may search, separated by commas: https://shop.example; unset none"
    )

    @property
    def indexes(self) -> dict[str, Path]:
        """Every index by the name of its collection; the default one first, named after its directory."""
        return {self.index.resolve().name: self.index, **self.collections}

    @field_validator("collections")
    @classmethod
    def _are_names(cls, value: dict[str, Path], info: ValidationInfo) -> dict[str, Path]:
        taken = info.data["index"].resolve().name if "index" in info.data else None
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
                raise ValueError(f"{name[:80]!r} is no name for a collection: letters, digits, '.', '_' and '-'")
            if name == taken:
                raise ValueError(f"{name!r} is the name of the default collection already, after its directory")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _are_keys(cls, value: object) -> object:
        return parse_keys(value) if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _are_origins(cls, value: object) -> object:
        origins = tuple(o.rstrip("/") for o in value.replace(",", " ").split()) if isinstance(value, str) else value
        if isinstance(origins, tuple) and not all(o == "*" or _ORIGIN.fullmatch(o) for o in origins):
            raise ValueError("must be origins such as https://shop.example, without path or wildcards, or *")
        return origins

    @field_validator("rate_limit")
    @classmethod
    def _is_rate(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rate(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_redis(value.get_secret_value())
        return value

    @field_validator("admin_key")
    @classmethod
    def _is_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        given = value.get_secret_value().strip()
        if len(given) < 8 or not given.isascii() or not given.isprintable():  # others cannot be sent in a header
            raise ValueError("must be at least 8 characters of ASCII")
        if given.startswith("sha256:") and not re.fullmatch("sha256:[0-9A-Fa-f]{64}", given):
            raise ValueError("must be sha256: and the 64 hexadecimal digits of the key's hash; no key could match this")
        return SecretStr(given)


def load_settings(**given: Any) -> Settings:
    """The settings from flags (None: not given) and the environment.

    Raises:
        DcarError: a value is wrong or missing, or a variable has a slip in its name; one line names the variable, never
            the value of a secret.
    """
    for variable in sorted(os.environ):
        name = variable.removeprefix("DCAR_").lower()
        if variable.startswith("DCAR_") and name not in Settings.model_fields:  # others are of other commands
            for meant in difflib.get_close_matches(name, Settings.model_fields, 1, _SLIP):
                raise DcarError(f"{variable}: there is no such setting; is DCAR_{meant.upper()} meant?")
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = (f"DCAR_{str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors())
        raise DcarError("; ".join(dict.fromkeys(faults))) from None
    except SettingsError:  # of the variables that hold JSON, the only one
        raise DcarError('DCAR_COLLECTIONS: must be JSON such as {"openmoji": "data/index/openmoji"}') from None
