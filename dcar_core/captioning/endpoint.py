"""Client of one OpenAI-compatible chat endpoint, with retries and bounds.

- Retried with exponential backoff and jitter: 408, 409, 425, 429, 5xx, timeouts, broken connections, and responses that
  are truncated, oversized, not JSON, or without choices.
- Retry-After, in seconds or as a date, holds back every request of the endpoint.
- A refused key, an unknown model, or an address that never answered ends the run. Any other 4xx fails one image.
- A 403 refuses the key before the first completion, and one image after it. If it reports moderation, it is a refusal.
- Redirects are not followed, since they could send the key to another host.
"""

import asyncio
import contextlib
import math
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from dcar_core.captioning.filters import REFUSED
from dcar_core.captioning.options import CaptionOptions, TokenUsage, VisionModel
from dcar_core.util.errors import CaptionError, EndpointError, MissingExtraError
from dcar_core.util.json_text import parse_json

try:
    import httpx
except ImportError:  # pragma: no cover - the tests have it
    raise MissingExtraError("captioning", "caption") from None

_RETRIED = frozenset({408, 409, 425, 429})
_FATAL = {
    401: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY)",
    403: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY) or the image",
    404: "has no such model or address",
}
_MAX_PAUSE_S = 30.0
_MAX_UNUSABLE = 3  # unusable completions before an image fails
_MAX_RESPONSE = 4 << 20  # bytes, compressed and decompressed


@dataclass(frozen=True)
class Completion:
    """One completion of the model. text: may be empty. finish: the reason why the model stopped, or REFUSED."""

    text: str
    finish: str


class _ResponseError(Exception):
    """A response without a completion; the message is the fault."""


class Endpoint:
    """Client of one model. Close it after use."""

    def __init__(self, model: VisionModel, options: CaptionOptions) -> None:
        self.model, self._options = model, options
        self._url = model.url.rstrip("/") + "/chat/completions"
        self._not_before, self._has_answered, self._has_accepted_key = 0.0, False, False
        # gzip only: its decompression can be bounded; that of httpx's other encodings cannot.
        headers = {"accept-encoding": "gzip"} | ({"authorization": f"Bearer {model.key}"} if model.key else {})
        try:
            self._client = httpx.AsyncClient(
                headers=headers, timeout=options.timeout_s, limits=httpx.Limits(max_connections=options.concurrency)
            )
            self._client.build_request("POST", self._url)
        except (httpx.InvalidURL, ImportError, OSError, ValueError) as error:
            raise CaptionError(
                f"{self._url} cannot be requested ({error}); correct the URL, the proxy (HTTP_PROXY, HTTPS_PROXY, "
                f"ALL_PROXY) or the certificates (SSL_CERT_FILE, SSL_CERT_DIR)"
            ) from error

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(
        self,
        messages: list[dict[str, Any]],
        usage: TokenUsage,
        usable: Callable[[Completion], bool] = lambda _: True,
    ) -> Completion:
        """Send a chat and return the completion.

        Args:
            usage: receives the tokens of every attempt, failed ones included.
            usable: returns False for a completion that must be requested again.

        Raises:
            EndpointError: the request was refused, or every attempt failed; this image has failed.
            CaptionError: no request can succeed, because the key, the model or the address is wrong.
        """
        reason, unusable, tries = "", 0, self._options.tries
        for attempt in range(tries):
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            retry_after, content = None, b""
            try:
                async with asyncio.timeout(self._options.timeout_s):  # httpx's timeout restarts with every byte
                    reply, content = await self._post(messages)
                self._has_answered = True
                status = reply.status_code
                completion = _read(content, usage) if status == 200 else self._read_moderation(status, content)
                if completion is not None:
                    self._has_accepted_key = True
                    if usable(completion):
                        return completion
                    reason = f"an unusable completion: {self._shortened(completion.text)!r}"
                    unusable += 1
                    if unusable == _MAX_UNUSABLE:
                        raise EndpointError(reason)
                else:
                    reason = f"{status} {self._excerpt(content)}"
                    self._require_retryable(status, reason)
                    retry_after = reply.headers.get("retry-after")
            except _ResponseError as error:
                reason = f"{error}: {self._excerpt(content)}".rstrip(": ")
            except (httpx.HTTPError, TimeoutError, ExceptionGroup) as error:
                # anyio raises a group for a port of a proxy that is none
                fault = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                if isinstance(fault, httpx.ConnectError | OverflowError) and not self._has_answered:
                    raise CaptionError(
                        f"{self._url} cannot be reached ({fault}); start the model's server or correct the URL, and "
                        f"run the same command again"
                    ) from error
                reason = f"{type(fault).__name__}: {fault}".rstrip(": ")
            self._hold_back(retry_after)
            if attempt + 1 < tries:
                pause = min(_MAX_PAUSE_S, self._options.backoff_s * 2**attempt)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        raise EndpointError(f"no usable response in {tries} attempts; the last: {reason}")

    async def _post(self, messages: list[dict[str, Any]]) -> "tuple[httpx.Response, bytes]":
        """Send one request; return the response and its decompressed content, cut behind the size limit."""
        body = {
            "model": self.model.name,
            "messages": messages,
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
        }
        async with self._client.stream("POST", self._url, json=body) as reply:
            content = bytearray()
            async for part in reply.aiter_raw():
                content += part
                if len(content) > _MAX_RESPONSE:
                    return reply, bytes(content)
        if reply.headers.get("content-encoding", "").strip().lower() in {"gzip", "x-gzip"}:
            with contextlib.suppress(zlib.error):
                return reply, zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content, _MAX_RESPONSE + 1)
        return reply, bytes(content)

    def _require_retryable(self, status: int, reason: str) -> None:
        if status in _FATAL and not (status == 403 and self._has_accepted_key):
            raise CaptionError(f"{self._url} {_FATAL[status]}: {reason} (model {self.model.name!r})")
        if status not in _RETRIED and status < 500:
            raise EndpointError(reason)

    def _read_moderation(self, status: int, content: bytes) -> Completion | None:
        """Return the refusal in a 403 whose error says that moderation flagged the input, as OpenRouter writes it."""
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            error = parse_json(content)["error"]
            if status == 403 and {"reasons", "flagged_input"} & error["metadata"].keys():
                return Completion(self._shortened(str(error["message"])), REFUSED)
        return None

    def _excerpt(self, content: bytes) -> str:
        return self._shortened(content.decode("utf-8", "replace"))

    def _shortened(self, text: str) -> str:
        """Mask the key, then shorten; in this order no part of the key remains."""
        text = text.replace(self.model.key, "***") if self.model.key else text
        return " ".join(text.split())[:200]

    def _hold_back(self, retry_after: str | None) -> None:
        requested_s = seconds_of(retry_after) or 0.0
        if requested_s > self._options.longest_wait_s:
            raise EndpointError(f"asked to wait {requested_s:.0f} s, longer than {self._options.longest_wait_s:.0f} s")
        self._not_before = max(self._not_before, time.monotonic() + requested_s)


def _read(content: bytes, usage: TokenUsage) -> Completion:
    """Parse a response; add its tokens to `usage` in any case. Raise _ResponseError if it holds no completion."""
    tokens = TokenUsage(1, unknown=1)
    try:
        if len(content) > _MAX_RESPONSE:
            raise _ResponseError(f"a response of more than {_MAX_RESPONSE >> 20} MiB")
        response = parse_json(content)
        reported = response.get("usage")
        reported = reported if isinstance(reported, dict) else {}
        tokens_in, tokens_out = reported.get("prompt_tokens"), reported.get("completion_tokens")
        if isinstance(tokens_in, int) and isinstance(tokens_out, int):
            tokens = TokenUsage(1, tokens_in, tokens_out)
        choice = response["choices"][0]
        message = choice["message"]
        text, finish = _text_of(message.get("content")), str(choice.get("finish_reason") or "")
        if not text.strip() and (refusal := _text_of(message.get("refusal"))):
            text, finish = refusal, REFUSED
        return Completion(text, finish)
    except ValueError:
        raise _ResponseError("a response that is not JSON or is truncated") from None
    except (AttributeError, IndexError, KeyError, TypeError):
        raise _ResponseError("a response without choices") from None
    finally:
        usage.add(tokens)


def _text_of(content: Any) -> str:
    """Join the text parts of a message: a string, or a list of strings and objects."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join(text for text in texts if isinstance(text, str))


def seconds_of(retry_after: str | None) -> float | None:
    """Parse a Retry-After header to seconds; None if it is missing or invalid."""
    if retry_after is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(retry_after)
        return None if math.isnan(seconds) else max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (OverflowError, TypeError, ValueError):
        return None
