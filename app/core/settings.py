"""Settings of the service: one frozen, typed object from flags and DCAR_* variables,
checked before anything is loaded.

- Arguments of `Settings(...)`, such as command line flags, take precedence over the
  environment.
- Each description is user documentation: a reference is generated from them.
- Secrets are SecretStr, so neither log lines nor tracebacks show them.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from app.core.callers import ApiKey, parse_admin_key, parse_keys
from app.core.plugins import find_plugins
from app.core.redis import connect
from dcar_core.images.formats import WEB_FORMATS, ImageFormat
from dcar_core.util.errors import DcarError
from index_jobs.index.stores import index_path
from index_jobs.spec import KEEP_WRITES

T = TypeVar("T")
S = TypeVar("S", bound=BaseSettings)

DEFAULT_K = 10
MAX_QUERIES = 1000  # upper bound of the setting max_queries
COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SECRETS = ("admin_key", "api_keys", "image_secret", "redis_url")
# Variables with our prefix that are not settings: of other commands, of
# docker-compose.yml, and of Kubernetes, which describes a service named dcar to every
# container.
_OTHER_VARIABLES = re.compile(
    rf"({'|'.join(_SECRETS).upper()})_FILE|FEATURES|CAPTION_API_KEY|JUDGE_API_KEY|REQUIRE_ALL|DOMAIN|PORT_PUBLISHED|MEMORY|IMAGE"
    r"|SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*"
)
_SUCCESSORS = {
    "DCAR_DRAIN_S": (
        "let the proxy or the orchestrator stop sending requests first, such as by"
        " `preStop`"
    ),
    "DCAR_MAX_COLLECTIONS": "a key that may write can create any number of collections",
    "DCAR_MAX_QUEUE_MS": (
        "DCAR_MAX_PENDING and DCAR_DEADLINE_MS bound the searches in progress"
    ),
    "DCAR_REDIS_TIMEOUT_MS": "Redis has a tenth of a second",
    "DCAR_TRACING": "start the service with `opentelemetry-instrument dcar serve`",
}


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _like(pattern: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {example}, not {value}")
        return value

    return AfterValidator(check)


def _check_redis_url(value: SecretStr) -> SecretStr:
    connect(value.get_secret_value())  # which checks it, and connects later
    return value


def _hash_admin_key(value: SecretStr) -> SecretStr:
    return SecretStr(parse_admin_key(value.get_secret_value()))


IndexDir = Annotated[Path, AfterValidator(index_path)]
Listed = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]
Host = Annotated[
    str,
    AfterValidator(str.lower),
    _like("[^/:]*(:[^/:]*:[^/]*)?", "names such as pictures.example.org"),
]
Origin = Annotated[
    str,
    _like(
        r"\*|[a-z][a-z0-9+.-]*://[^/\s*?#@]+",
        "origins such as https://shop.example, or *",
    ),
]
Rate = Annotated[
    str,
    _like(
        r"[1-9]\d*/(second|minute|hour|day)", "one rate such as 20/second or 600/minute"
    ),
]
CollectionName = Annotated[
    str, _like(COLLECTION_NAME.pattern, "names of letters, digits, '.', '_' and '-'")
]
Keys = Annotated[
    dict[str, ApiKey],
    NoDecode,
    BeforeValidator(
        lambda value: parse_keys(value) if isinstance(value, str) else value
    ),
]


_FROM_ENVIRONMENT = SettingsConfigDict(
    env_prefix="DCAR_",
    frozen=True,
    env_ignore_empty=True,
)


class PluginSettings(BaseSettings):
    """Settings of a plug-in: its subclass has the fields, which are variables with the
    prefix DCAR_.
    """

    model_config = _FROM_ENVIRONMENT


class Settings(BaseSettings):
    """Settings of the service. Every field is also an environment variable: `index` is
    DCAR_INDEX, and so on.
    """

    model_config = _FROM_ENVIRONMENT

    index: IndexDir
    """Directory or URL of the published index: the --out of `dcar index build`."""
    collections: dict[CollectionName, IndexDir] = {}
    """More indexes by name, as JSON: {"openmoji": "data/index/openmoji"}."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 opens it to a trusted network; strangers come
    through nginx.
    """
    port: int = Field(8000, ge=0, le=65_535)
    """Port to listen on. 0 takes a free one."""
    workers: int = Field(1, ge=1, le=256)
    """Number of processes that serve the port. Limits, caches and DCAR_THREADS count
    for each.
    """
    allowed_hosts: Listed[Host] = ()
    """Names, separated by commas, by which requests may address a service that listens
    on 127.0.0.1, besides localhost: for a proxy on the same machine that passes on the
    Host header. * allows all.
    """
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)
    ] = "info"
    """Least severe level to log."""
    log_format: Literal["text", "json"] = "text"
    """Format of log lines: plain text or JSON objects."""

    device: str = "auto"
    """Device of the model: auto, cpu, cuda, cuda:1, ..."""
    runtime: str = "auto"
    """Runtime of the encoder: auto, openvino, openvino-bf16, torch or cuda; see
    docs/how-to/choose-a-runtime.md.
    """
    runtime_cache: Path | None = None
    """Directory for exported models, and for mirrors of object storage. Unset: the
    user's cache directory.
    """
    threads: int | None = Field(None, ge=1)
    """Cores for the model. Unset: PyTorch decides; several workers divide the cores."""
    batch_size: int = Field(32, ge=1, le=1024)
    """Largest number of queries in one forward pass."""
    batch_wait_ms: float = Field(10.0, ge=0, le=100)
    """Longest time in milliseconds that a batch waits for the callers of the last one,
    under load only.
    """
    max_pending: int = Field(512, ge=1)
    """Largest number of searches, and of requests for images, in progress, half of them
    by one caller. More get 503.
    """
    deadline_ms: int = Field(10_000, ge=1)
    """Time limit of a search in milliseconds. After it the response is 503."""

    redis_url: Annotated[SecretStr, AfterValidator(_check_redis_url)] | None = None
    """Redis for cached embeddings and rate limits: redis://, rediss:// or unix://.
    Unset: processes share nothing.
    """
    cache_size: int = Field(10_000, ge=0)
    """Number of query embeddings cached in the process, and of pages of results (at
    most 1,000). 0 caches none.
    """
    cache_ttl_s: int = Field(7 * 24 * 3600, ge=1)
    """Lifetime in seconds of an embedding in Redis."""

    max_upload_bytes: int = Field(20 * 2**20, ge=1024)
    """Largest image file in bytes. Larger ones get 413."""
    max_in_flight_bytes: int = Field(256 * 2**20, ge=1024)
    """Largest number of bytes of bodies, fetched images and responses over 64 KiB in
    progress. More get 503.
    """
    upload_timeout_s: float = Field(30, gt=0)
    """Seconds for a request body to arrive. After it the response is 408."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Largest number of pixels in a query image, checked before it is decoded."""
    image_formats: Annotated[Listed[ImageFormat], Field(min_length=1)] = tuple(
        sorted(WEB_FORMATS)
    )
    """Formats of query images, separated by commas; also tiff and bmp."""
    max_query_chars: int = Field(1000, ge=1)
    """Largest number of characters in a text query."""
    max_k: int = Field(200, ge=DEFAULT_K)
    """Largest number of results on a page."""
    max_window: int = Field(1000, ge=DEFAULT_K)
    """Maximum offset + k."""
    max_queries: int = Field(32, ge=1, le=MAX_QUERIES)
    """Largest number of searches in a batch; inputs of /v1/embeddings are embedded so
    many at a time.
    """
    rerank_depth: int = Field(10, ge=1, le=200)
    """Number of first results that `rerank` scores again."""
    explain_results: int = Field(8, ge=1, le=200)
    """Number of results on a page that `explain` explains."""

    poll_s: float = Field(2.0, ge=0, le=600)
    """Seconds between two checks for a newly published index version. 0 disables
    them.
    """
    admin_key: Annotated[SecretStr, AfterValidator(_hash_admin_key)] | None = None
    """Key of the /admin routes: the line that `dcar key admin` prints, sha256:HASH, or
    a key of at least 16 characters. Unset: they are disabled.
    """
    api_keys: Keys = {}
    """Keys that may search, as NAME:HASH pairs separated by commas; `dcar key NAME`
    makes one. NAME:HASH:write may change items as well, and NAME:HASH:read:shoes+bags
    opens these collections only. Unset: everybody may search.
    """
    image_secret: Annotated[SecretStr, Field(min_length=16)] | None = None
    """Secret that signs addresses of pictures, which then open without a key until they
    expire. Unset: none do.
    """
    writes: bool = False
    """Accept changes of items over HTTP, with the admin key or a key that may write."""
    collections_dir: Path | None = None
    """Directory of the collections that are created over HTTP, with DCAR_WRITES. Unset:
    none can be.
    """
    max_jobs: int = Field(1000, ge=1)
    """Largest number of waiting changes of a collection's items. Further requests get
    503.
    """
    keep_writes: int = Field(KEEP_WRITES, ge=1)
    """Number of versions with changes over HTTP that are kept for rollback, besides the
    builds of `--keep`.
    """
    rate_limit: Rate | None = None
    """Rate limit of each key, or of each address where no keys are set: 20/second,
    600/minute. Unset: no limit.
    """
    cors_origins: Listed[Origin] = ()
    """Other sites whose pages may search, separated by commas: https://shop.example. *
    allows all. Unset: none.
    """

    feedback: Annotated[bool | Path, Field(union_mode="left_to_right")] = False
    """Log searches and what is done with their results: true for INDEX/feedback, or
    another directory.
    """
    feedback_texts: bool = False
    """Store the texts of searches in the log."""
    feedback_days: int = Field(90, ge=1)
    """Days after which rows of the log are removed."""
    feedback_bytes: int = Field(2 * 2**30, ge=2**20)
    """Largest size of the log in bytes; the oldest rows are removed."""

    page_hybrid: bool = True
    """Start the search page with `Words too` on, which looks up the words of a search
    as well.
    """
    image_roots: Listed[Path] = ()
    """Directories, separated by commas, from which images are served besides the
    gallery's own.
    """
    image_hosts: Listed[Host] = ()
    """Trusted hosts or buckets, separated by commas, whose images are fetched by URL.
    Needs the extra `http`.
    """
    image_ports: Listed[int] = (80, 443)
    """Ports that a request may name in a URL, separated by commas."""

    @property
    def default_collection(self) -> str:
        return self.index.resolve().name

    @property
    def indexes(self) -> dict[str, Path]:
        """Indexes by collection name. The default one is first and named after its
        directory.
        """
        return {self.default_collection: self.index, **self.collections}

    @property
    def feedback_folder(self) -> Path | None:
        default = self.index / "feedback" if self.feedback else None
        return self.feedback if isinstance(self.feedback, Path) else default

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.default_collection in self.collections:
            raise ValueError(
                f"DCAR_COLLECTIONS: {self.default_collection!r} is the default one,"
                " after its directory"
            )
        if self.feedback_texts and not self.feedback:
            raise ValueError(
                "DCAR_FEEDBACK_TEXTS: needs DCAR_FEEDBACK, the log that holds the texts"
            )
        if (
            self.writes
            and not self.admin_key
            and not any(key.may_write for key in self.api_keys.values())
        ):
            raise ValueError(
                "DCAR_WRITES: needs DCAR_ADMIN_KEY, or a key in DCAR_API_KEYS that may"
                " write"
            )
        return self


def _read_secrets() -> dict[str, str]:
    """Return the settings that DCAR_ADMIN_KEY_FILE and the like name a file for, as of
    Docker's secrets.
    """
    secrets = {}
    for name in _SECRETS:
        variable = f"DCAR_{name.upper()}"
        if file := os.environ.get(f"{variable}_FILE"):
            if os.environ.get(variable):
                raise DcarError(
                    f"{variable}_FILE: {variable} is set as well; unset one of them"
                )
            try:
                secrets[name] = Path(file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise DcarError(f"{variable}_FILE: {error}") from None
            if not secrets[name]:
                raise DcarError(f"{variable}_FILE: {file} is empty")
    return secrets


def load_settings(**flags: Any) -> Settings:
    """Read the settings from flags (None: not set) and the environment.

    Raise DcarError, which names the variable in one line, if a value is wrong or
    missing, or a name is misspelt.
    """
    known = {*Settings.model_fields}
    for plugin in find_plugins():
        if plugin.settings_model is not None:
            known |= plugin.settings_model.model_fields.keys()
    for variable in sorted(os.environ):
        name = variable.removeprefix("DCAR_")
        if variable in _SUCCESSORS:
            raise DcarError(
                f"{variable}: this setting was removed; {_SUCCESSORS[variable]}"
            )
        if (
            name != variable
            and name.lower() not in known
            and not _OTHER_VARIABLES.fullmatch(name)
        ):
            (nearest,) = difflib.get_close_matches(name.lower(), sorted(known), 1, 0.0)
            raise DcarError(
                f"{variable}: unknown setting; did you mean DCAR_{nearest.upper()}?"
            )
    for plugin in find_plugins():
        if plugin.settings_model is not None:
            read_settings(plugin.settings_model)  # a wrong value ends the start here
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return read_settings(Settings, **_read_secrets() | given)
    except SettingsError:  # only this variable holds JSON
        raise DcarError(
            'DCAR_COLLECTIONS: must be JSON such as {"openmoji": "data/index/openmoji"}'
        ) from None


def read_settings(model: type[S], **given: Any) -> S:
    """Return the settings of a model from what is given and the environment. Raise
    DcarError, which names the variables, if a value is wrong or missing.
    """
    try:
        return model(**given)
    except ValidationError as error:
        raise DcarError("; ".join(dict.fromkeys(map(_fault, error.errors())))) from None


def _fault(entry: Any) -> str:
    message = entry["msg"].removeprefix("Value error, ")
    return f"DCAR_{entry['loc'][0].upper()}: {message}" if entry["loc"] else message
