"""Client of one OpenAI-compatible chat endpoint, with retries and bounds.

- Retried with exponential backoff and jitter: 408, 409, 425, 429, 5xx, timeouts, broken connections, and responses that
  are truncated, oversized, not JSON, or without choices.
- Retry-After, in seconds or as a date, holds back every request of the endpoint.
- A refused key or an unknown model ends the run. Any other 4xx fails one image.
- Redirects are not followed, since they could send the key to another host.
"""

import asyncio
import math
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

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
    403: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY)",
    404: "has no such model or address",
}
_MAX_PAUSE_S = 30.0
_MAX_UNUSABLE = 3  # unusable completions before an image fails
_MAX_RESPONSE = 4 << 20  # bytes, compressed and decompressed


@dataclass(frozen=True)
class Completion:
    """One completion of the model.

    text: may be empty. finish: the reason why the model stopped, or REFUSED. usage: the sum over all attempts.
    """

    text: str
    finish: str = ""
    usage: TokenUsage = field(default_factory=TokenUsage)


class _Reply(NamedTuple):
    """A decompressed HTTP response. is_complete: False when it exceeds the size limit."""

    status: int
    retry_after: str | None
    content: bytes
    is_complete: bool


class Endpoint:
    """Client of one model. Close it after use."""

    def __init__(self, model: VisionModel, options: CaptionOptions) -> None:
        self.model, self._options = model, options
        self._not_before = 0.0
        self._wasted = TokenUsage()
        # gzip only: its decompression can be bounded; that of httpx's other encodings cannot.
        headers = {"accept-encoding": "gzip"} | ({"authorization": f"Bearer {model.key}"} if model.key else {})
        self._client = httpx.AsyncClient(
            headers=headers, timeout=options.timeout_s, limits=httpx.Limits(max_connections=options.concurrency)
        )

    async def close(self) -> None:
        await self._client.aclose()

    def take_wasted(self) -> TokenUsage:
        """Return and reset the token usage of failed requests."""
        wasted, self._wasted = self._wasted, TokenUsage()
        return wasted

    async def ask(
        self, messages: list[dict[str, Any]], usable: Callable[[Completion], bool] = lambda _: True
    ) -> Completion:
        """Send a chat and return the completion.

        Args:
            usable: returns False for a completion that must be requested again.

        Raises:
            EndpointError: the request was refused, or every attempt failed; this image has failed.
            CaptionError: no request can succeed, because the key, the model or the address is wrong.
        """
        usage = TokenUsage()
        try:
            return await self._attempt(messages, usable, usage)
        except CaptionError:
            self._wasted.add(usage)
            raise

    async def _attempt(
        self, messages: list[dict[str, Any]], usable: Callable[[Completion], bool], usage: TokenUsage
    ) -> Completion:
        reason, unusable = "", 0
        for attempt in range(self._options.tries):
            await self._pause()
            try:
                async with asyncio.timeout(self._options.timeout_s):  # httpx's timeout restarts with every byte
                    reply = await self._post(messages)
            except (httpx.HTTPError, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                await self._back_off(attempt, None)
                continue
            if reply.status == 200:
                completion = _read(reply, usage)
                if isinstance(completion, Completion) and usable(completion):
                    return completion
                if isinstance(completion, str):
                    reason = f"{completion}: {self._excerpt(reply)}".rstrip(": ")
                else:
                    reason = f"an unusable completion: {self._shortened(completion.text)!r}"
                    unusable += 1
                if unusable == _MAX_UNUSABLE:
                    raise EndpointError(reason)
                await self._back_off(attempt, None)
                continue
            reason = f"{reply.status} {self._excerpt(reply)}"
            if reply.status in _FATAL:
                raise CaptionError(f"{self._url} {_FATAL[reply.status]}: {reason} (model {self.model.name!r})")
            if reply.status not in _RETRIED and reply.status < 500:
                raise EndpointError(reason)
            await self._back_off(attempt, reply.retry_after)
        raise EndpointError(f"no usable response in {self._options.tries} attempts; the last: {reason}")

    async def _post(self, messages: list[dict[str, Any]]) -> _Reply:
        """Send one request; stop reading at the size limit."""
        async with self._client.stream("POST", self._url, json=self._body(messages)) as reply:
            content = bytearray()
            async for part in reply.aiter_raw():
                content += part
                if len(content) > _MAX_RESPONSE:
                    break
        content_bytes = _decompressed(bytes(content), reply.headers.get("content-encoding", ""))
        is_complete = max(len(content), len(content_bytes)) <= _MAX_RESPONSE
        return _Reply(reply.status_code, reply.headers.get("retry-after"), content_bytes, is_complete)

    @property
    def _url(self) -> str:
        return self.model.url.rstrip("/") + "/chat/completions"

    def _body(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        options = self._options
        return {
            "model": self.model.name,
            "messages": messages,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
        }

    def _excerpt(self, reply: _Reply) -> str:
        """Return the start of a response body, without the key."""
        return self._shortened(reply.content.decode("utf-8", "replace"))

    def _shortened(self, text: str) -> str:
        """Mask the key, then shorten; in this order no part of the key remains."""
        text = text.replace(self.model.key, "***") if self.model.key else text
        return " ".join(text.split())[:200]

    async def _pause(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _back_off(self, attempt: int, retry_after: str | None) -> None:
        if attempt + 1 == self._options.tries:
            return
        requested_s = seconds_of(retry_after)
        if requested_s is not None:
            if requested_s > self._options.longest_wait_s:
                raise EndpointError(
                    f"asked to wait {requested_s:.0f} s, longer than {self._options.longest_wait_s:.0f} s"
                )
            self._not_before = max(self._not_before, time.monotonic() + requested_s)
        pause = min(_MAX_PAUSE_S, self._options.backoff_s * 2**attempt)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))


def _decompressed(content: bytes, encoding: str) -> bytes:
    """Decompress gzip up to one byte beyond the size limit; return other encodings unchanged."""
    if encoding.strip().lower() not in {"gzip", "x-gzip"}:
        return content
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content, _MAX_RESPONSE + 1)
    except zlib.error:
        return content


def _read(reply: _Reply, usage: TokenUsage) -> Completion | str:
    """Parse a response to its completion, or to a description of its fault; add its token usage in both cases."""
    if not reply.is_complete:
        usage.add(TokenUsage(1, unknown=1))
        return f"a response of more than {_MAX_RESPONSE >> 20} MiB"
    try:
        content = parse_json(reply.content)
        reported = content.get("usage")
        reported = reported if isinstance(reported, dict) else {}
        counts = [reported.get(name) for name in ("prompt_tokens", "completion_tokens")]
        tokens_in, tokens_out = (count if isinstance(count, int) else None for count in counts)
        if tokens_in is None or tokens_out is None:
            usage.add(TokenUsage(1, unknown=1))
        else:
            usage.add(TokenUsage(1, tokens_in, tokens_out))
        choice = content["choices"][0]
        message = choice["message"]
        text, finish = _text_of(message.get("content")), str(choice.get("finish_reason") or "")
        if not text.strip() and (refusal := _text_of(message.get("refusal"))):
            text, finish = refusal, REFUSED
    except ValueError:
        usage.add(TokenUsage(1, unknown=1))
        return "a response that is not JSON or is truncated"
    except (AttributeError, IndexError, KeyError, TypeError):
        return "a response without choices"
    return Completion(text, finish, usage)


def _text_of(content: Any) -> str:
    """Join the text parts of a message: a string, or a list of strings and objects."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join(text for text in texts if isinstance(text, str))


def seconds_of(retry_after: str | None) -> float | None:
    """Parse a Retry-After header to seconds; None if it is missing or invalid."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (OverflowError, TypeError, ValueError):
        return None
