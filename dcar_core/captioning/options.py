"""What a captioning run is asked for, and how it ended."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dcar_core.util.errors import DataError


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """A model behind an OpenAI-compatible endpoint.

    url: the part before /chat/completions, such as http://127.0.0.1:8000/v1. key: never shown or written.
    price: of a million tokens in and out, in whatever currency, for the cost that is shown.
    """

    url: str
    name: str
    key: str | None = None
    price: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            fits = False
        if not fits:
            raise DataError(f"{self.url!r} is no http(s) URL of an endpoint, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise DataError("the endpoint's URL holds a password; give keys by the environment alone")

    def judge(
        self, url: str | None, name: str | None, key: str | None, price: tuple[float, float] | None
    ) -> "VisionModel":
        """The model that judges: this one, but for what is given. A key goes to the host that it is meant for alone."""
        where = url or self.url
        own = key or (self.key if _origin(where) == _origin(self.url) else None)
        same = where == self.url and name in {None, self.name}
        return VisionModel(url=where, name=name or self.name, key=own, price=price or (self.price if same else None))

    def __repr__(self) -> str:
        return f"Model({self.name!r} at {urlsplit(self.url).hostname})"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Everything but the models and places.

    dataset: what the pictures are of, as the questions name it. context: the most CLIP tokens of a caption, SOS and
    EOT included; the default leaves the prompts their four. rounds: drafts of one picture before it is given up.
    side: pixels of the longer side of the picture that is sent. tries: of one request. longest_wait_s: of Retry-After.
    give_up_after: so many pictures in a row that fail end the run.
    """

    dataset: str
    templates: tuple[str, ...]
    context: int = 73
    rounds: int = 3
    side: int = 768
    max_tokens: int = 200
    temperature: float = 0.2
    concurrency: int = 4
    timeout_s: float = 120.0
    tries: int = 6
    backoff_s: float = 1.0
    longest_wait_s: float = 300.0
    give_up_after: int = 8

    def settings(self, drafter: VisionModel, judge: VisionModel | None) -> dict[str, Any]:
        """What answers depend on: another value of any of these is another run."""
        chosen = ("dataset", "templates", "context", "rounds", "side", "max_tokens", "temperature")
        values = {name: value for name, value in asdict(self).items() if name in chosen}
        values["templates"] = list(self.templates)
        return {**values, "model": drafter.name, "judge": judge.name if judge is not None else None}


@dataclass
class TokenUsage:
    """Requests that were answered, and their tokens; `unknown`: answers that did not say how many."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unknown: int = 0

    def add(self, other: "TokenUsage") -> None:
        self.requests += other.requests
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.unknown += other.unknown

    def cost(self, price: tuple[float, float] | None) -> float:
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6 if price is not None else 0.0


@dataclass
class CaptioningResult:
    """How a run ended.

    Names of pictures: given_up (no draft was accepted), failed (the same command asks again), broken, loose (in no
    category's folder). usage and cost: of this run and those before it.
    """

    out: Path
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # drafts, by reason
    given_up: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    usage: dict[str, TokenUsage] = field(default_factory=dict)  # "draft", "judge"
    cost: float | None = None
