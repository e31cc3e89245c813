"""One OpenAI-compatible chat endpoint, called through the `openai` client, which
retries with growing pauses.
"""

import asyncio
import contextlib
import os
from collections import Counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai

from dcar_caption.options import CaptionOptions
from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import parse_json

REFUSED = "refusal"  # finish reason of a completion that is a refusal
KEYS = "DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY"


class CaptionError(DcarError):
    """The endpoint or the journal cannot be used."""


class EndpointError(CaptionError):
    """One request failed. The message is the reason."""


class Completion(NamedTuple):
    text: str
    finish: str  # the reason why the model stopped, or REFUSED


class Endpoint:
    """One model. Close its client after use. usage: counts of responses and their
    tokens, which it adds to.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str,
        options: CaptionOptions,
        usage: Counter[str],
    ) -> None:
        if "@" in urlsplit(url).netloc:
            raise DataError(
                "the endpoint's URL contains a password; pass keys through the"
                " environment"
            )
        # errors of the client would show it
        if not (key.isascii() and key.isprintable()):
            raise DataError(
                f"a key ({KEYS}) has characters that are not printable ASCII; set it"
                " again"
            )
        self.model = model
        self.usage = usage
        self._key = key
        self._options = options
        try:
            self.client = openai.AsyncOpenAI(
                # for None it would send OPENAI_API_KEY, of another host
                base_url=url,
                api_key=key or "none",
                organization="",
                project="",
                max_retries=options.tries - 1,
                timeout=options.timeout,
                # nor images to another host
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
            )
        except Exception as error:  # of several libraries
            hint = (
                "correct the URL, the proxy (ALL_PROXY, ...) or the certificates"
                " (SSL_CERT_FILE, SSL_CERT_DIR)"
            )
            raise CaptionError(
                f"{url} cannot be requested ({error}); {hint}"
            ) from error

    async def ask(self, messages: list[dict[str, Any]]) -> Completion:
        """Send a chat and return its completion. Raise EndpointError if there is
        none.
        """
        options = self._options
        try:
            # the client's restart with every byte
            async with asyncio.timeout(options.tries * options.timeout):
                response = await self.client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=messages,
                    max_tokens=options.max_tokens,
                    temperature=options.temperature,
                )
        except openai.APIStatusError as error:
            raise EndpointError(
                self._excerpt(f"{error.status_code} {error.response.text}")
            ) from error
        except (openai.OpenAIError, TimeoutError) as error:
            raise EndpointError(
                self._excerpt(f"{error} {error.__cause__ or ''}") or "too slow"
            ) from error
        self.usage["requests"] += 1
        try:
            answer = parse_json(response.content)
            # servers may leave it out
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                tokens = [
                    int(answer["usage"][name])
                    for name in ("prompt_tokens", "completion_tokens")
                ]
                self.usage.update(tokens_in=tokens[0], tokens_out=tokens[1])
            choice = answer["choices"][0]
            text = choice["message"].get("content") or ""
            refusal = choice["message"].get("refusal")
            if refusal and not text:
                finish = REFUSED
            else:
                finish = choice.get("finish_reason") or ""
            return Completion((text or refusal or "").strip(), finish)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise EndpointError(
                f"no completion: {self._excerpt(response.text)}"
            ) from None

    def _excerpt(self, text: str) -> str:
        """Return the beginning of a text without the key."""
        return " ".join(
            (text.replace(self._key, "***") if self._key else text).split()
        )[:200]


def open_endpoints(options: CaptionOptions, usage: Counter[str]) -> dict[str, Endpoint]:
    """Return the endpoints by role: "draft" and, unless it is off, "judge". Keys come
    from the environment.
    """
    key, judge_key = (
        os.environ.get(f"DCAR_{role}_API_KEY", "").strip()
        for role in ("CAPTION", "JUDGE")
    )
    endpoints = {"draft": Endpoint(options.url, options.model, key, options, usage)}
    if options.judge:
        url = options.judge_url or options.url
        # no other host may see the key
        is_same_host = urlsplit(url)[:2] == urlsplit(options.url)[:2]
        own_key = judge_key or (key if is_same_host else "")
        endpoints["judge"] = Endpoint(
            url,
            options.judge_model or options.model,
            own_key,
            options,
            usage,
        )
    return endpoints
