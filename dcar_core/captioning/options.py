"""Options and result of a captioning run."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dcar_core.util.errors import DataError, shorten


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """A model behind an OpenAI-compatible endpoint.

    url: the base URL, without /chat/completions, such as http://127.0.0.1:8000/v1. key: never logged or written; white
    space around it is removed.
    price: of a million input and output tokens, in any currency, for the displayed cost.
    """

    url: str
    name: str
    key: str | None = field(default=None, repr=False)
    price: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            fits = False
        if not fits:
            raise DataError(f"{self.url!r} is not an http(s) URL of an endpoint, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise DataError("the endpoint's URL contains a password; pass keys through the environment")
        if self.key is not None:
            object.__setattr__(self, "key", self.key.strip())
            if not (self.key.isascii() and self.key.isprintable()):
                names = "DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY"
                raise DataError(f"a key ({names}) has characters that are not printable ASCII; set it again")

    def judge(
        self, url: str | None, name: str | None, key: str | None, price: tuple[float, float] | None
    ) -> "VisionModel":
        """Return the judge model: this model with the given changes. The key is reused for the same origin only."""
        where = url or self.url
        own = key or (self.key if _origin(where) == _origin(self.url) else None)
        same = where == self.url and name in {None, self.name}
        return VisionModel(url=where, name=name or self.name, key=own, price=price or (self.price if same else None))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Options of a run, without models and paths.

    dataset: a description of the images, used in the questions. context: maximum CLIP tokens of a caption, SOS and EOT
    included; the default leaves room for four prompts. rounds: drafts per image. side: longer side of the image that is
    sent, in pixels. tries: attempts per request. give_up_after: number of consecutive failed images that ends the run.
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
    give_up_after: int = 8

    def settings(self, drafter: VisionModel, judge: VisionModel | None) -> dict[str, Any]:
        """Return the settings that responses depend on; a journal with other settings belongs to another run."""
        chosen = ("dataset", "templates", "context", "rounds", "side", "max_tokens", "temperature")
        values = {name: value for name, value in asdict(self).items() if name in chosen}
        values["templates"] = list(self.templates)
        return {**values, "model": drafter.name, "judge": judge.name if judge is not None else None}


@dataclass
class CaptioningResult:
    """Outcome of a run.

    Names of images: given_up (no draft was accepted), failed (retried by the next run), broken (unreadable), loose
    (outside of the category folders), linked (folders that are links). usage and cost include earlier runs.
    """

    out: Path
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # drafts, by reason
    given_up: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    usage: dict[str, Counter[str]] = field(default_factory=dict)  # of "draft" and "judge"; see `endpoint.USAGE`
    cost: float | None = None

    def __str__(self) -> str:
        rejected = self.out.with_name(f"{self.out.stem}.rejected.jsonl")
        lines = [f"{self.out}: {self.accepted:,} captions"]
        if self.rejected:
            lines.append(f"{sum(self.rejected.values()):7,} drafts rejected, kept in {rejected.name}:")
            lines += [f"{number:11,} {reason}" for reason, number in self.rejected.most_common()]
        for what, names in (
            ("images given up, all drafts rejected", self.given_up),
            ("images outside of category folders, left out", self.loose),
            ("links to folders, not followed", self.linked),
            ("images unreadable, left out", [f"{name} ({why})" for name, why in sorted(self.broken.items())]),
            ("images failed, retried by the same command", [f"{n} ({why})" for n, why in sorted(self.failed.items())]),
        ):
            if names:
                lines.append(f"{len(names):7,} {what}: {shorten(names)}")
        for role, usage in sorted(self.usage.items()):
            unknown = f", {usage['unknown']:,} responses without token counts" if usage["unknown"] else ""
            tokens = f"{usage['tokens_in']:,} + {usage['tokens_out']:,} tokens{unknown}"
            lines.append(f"{usage['requests']:7,} {role} responses, {tokens}")
        if self.cost is not None:
            is_least = any(usage["unknown"] for usage in self.usage.values())
            lines.append(f"cost {self.cost:.4f}" + (" at least" if is_least else ""))
        return "\n".join(lines)
