"""One OpenAI-compatible endpoint: a question in, an answer out, however it misbehaves on the way.

- Tried again, with pauses that double and jitter: 408, 409, 425, 429, 5xx, time-outs, connections that break, answers
  that are no JSON, end in the middle or do not end, and answers without choices. Retry-After is honoured, in seconds or
  as a date, where it is longer than the pause, and while one request waits for it no other is sent.
- A key that is refused or a model that is not there ends the run; another 4xx fails the one picture.
- Redirects are not followed: they could take the key elsewhere.
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

_AGAIN = frozenset({408, 409, 425, 429})
_FATAL = {
    401: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY)",
    403: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY)",
    404: "has no such model or address",
}
_LONGEST_PAUSE_S = 30.0
_USELESS = 3  # answers of a model that keeps talking past the question
_LONGEST_ANSWER = 4 << 20  # bytes, packed as well as unpacked: a thousand times a caption with all around it


@dataclass(frozen=True)
class Completion:
    """text may be empty; finish: why the model stopped, or REFUSED. usage: of every attempt, since all are paid."""

    text: str
    finish: str = ""
    usage: TokenUsage = field(default_factory=TokenUsage)


class _Reply(NamedTuple):
    """What came, unpacked; whole: false where there was more of it than anybody needs."""

    status: int
    retry_after: str | None
    content: bytes
    whole: bool


class Endpoint:
    """Asks one model. Must be closed."""

    def __init__(self, model: VisionModel, options: CaptionOptions) -> None:
        self.model, self._options = model, options
        self._not_before = 0.0
        self._wasted = TokenUsage()
        # gzip alone: it can be unpacked up to a bound, and most of what httpx would unpack by itself cannot.
        headers = {"accept-encoding": "gzip"} | ({"authorization": f"Bearer {model.key}"} if model.key else {})
        self._client = httpx.AsyncClient(
            headers=headers, timeout=options.timeout_s, limits=httpx.Limits(max_connections=options.concurrency)
        )

    async def close(self) -> None:
        await self._client.aclose()

    def take_wasted(self) -> TokenUsage:
        """What failed requests have used since this was last called: answers that came and were of no use."""
        wasted, self._wasted = self._wasted, TokenUsage()
        return wasted

    async def ask(
        self, messages: list[dict[str, Any]], usable: Callable[[Completion], bool] = lambda _: True
    ) -> Completion:
        """The model's answer to a chat.

        Args:
            usable: false for an answer that cannot be used and is asked for again.

        Raises:
            EndpointError: the request was refused, or no try gave an answer; this picture has failed.
            CaptionError: no request can succeed: the key, the model or the address is wrong.
        """
        usage = TokenUsage()
        try:
            return await self._tried(messages, usable, usage)
        except CaptionError:
            self._wasted.add(usage)
            raise

    async def _tried(
        self, messages: list[dict[str, Any]], usable: Callable[[Completion], bool], usage: TokenUsage
    ) -> Completion:
        why, useless = "", 0
        for attempt in range(self._options.tries):
            await self._pause()
            try:
                async with asyncio.timeout(self._options.timeout_s):  # httpx's own starts anew with every byte
                    reply = await self._post(messages)
            except (httpx.HTTPError, TimeoutError) as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
                await self._back_off(attempt, None)
                continue
            if reply.status == 200:
                found = _read(reply, usage)
                if isinstance(found, Completion) and usable(found):
                    return found
                if isinstance(found, str):
                    why = f"{found}: {self._said(reply)}".rstrip(": ")
                else:
                    why = f"an answer that cannot be used: {self._shown(found.text)!r}"
                useless += isinstance(found, Completion)
                if useless == _USELESS:
                    raise EndpointError(why)
                await self._back_off(attempt, None)
                continue
            why = f"{reply.status} {self._said(reply)}"
            if reply.status in _FATAL:
                raise CaptionError(f"{self._url} {_FATAL[reply.status]}: {why} (model {self.model.name!r})")
            if reply.status not in _AGAIN and reply.status < 500:
                raise EndpointError(why)
            await self._back_off(attempt, reply.retry_after)
        raise EndpointError(f"no answer in {self._options.tries} tries; the last: {why}")

    async def _post(self, messages: list[dict[str, Any]]) -> _Reply:
        """Reads no further than the longest answer that can be one: more could fill the memory."""
        async with self._client.stream("POST", self._url, json=self._body(messages)) as reply:
            content = bytearray()
            async for part in reply.aiter_raw():
                content += part
                if len(content) > _LONGEST_ANSWER:
                    break
        unpacked = _unpacked(bytes(content), reply.headers.get("content-encoding", ""))
        whole = max(len(content), len(unpacked)) <= _LONGEST_ANSWER
        return _Reply(reply.status_code, reply.headers.get("retry-after"), unpacked, whole)

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

    def _said(self, reply: _Reply) -> str:
        """What an error answer says, short, and never with the key in it; as UTF-8, whatever it claims to be."""
        return self._shown(reply.content.decode("utf-8", "replace"))

    def _shown(self, text: str) -> str:
        """Short; the key is taken out first, so that no part of it stays at the cut."""
        text = text.replace(self.model.key, "***") if self.model.key else text
        return " ".join(text.split())[:200]

    async def _pause(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _back_off(self, attempt: int, retry_after: str | None) -> None:
        if attempt + 1 == self._options.tries:
            return
        asked = seconds_of(retry_after)
        if asked is not None:
            if asked > self._options.longest_wait_s:
                raise EndpointError(f"asked to wait {asked:.0f} s, longer than {self._options.longest_wait_s:.0f}")
            self._not_before = max(self._not_before, time.monotonic() + asked)
        pause = min(_LONGEST_PAUSE_S, self._options.backoff_s * 2**attempt)
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))


def _unpacked(content: bytes, encoding: str) -> bytes:
    """Up to a byte more than the longest answer; what is packed in another way than was asked for stays packed."""
    if encoding.strip().lower() not in {"gzip", "x-gzip"}:
        return content
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content, _LONGEST_ANSWER + 1)
    except zlib.error:
        return content


def _read(reply: _Reply, usage: TokenUsage) -> Completion | str:
    """The answer, or what is wrong with it; what was used is added up either way."""
    if not reply.whole:
        usage.add(TokenUsage(1, unknown=1))
        return f"an answer of more than {_LONGEST_ANSWER >> 20} MiB"
    try:
        content = parse_json(reply.content)
        said = content.get("usage")
        said = said if isinstance(said, dict) else {}
        tokens = [said.get(name) for name in ("prompt_tokens", "completion_tokens")]
        given, made = (number if isinstance(number, int) else None for number in tokens)
        usage.add(TokenUsage(1, unknown=1) if given is None or made is None else TokenUsage(1, given, made))
        choice = content["choices"][0]
        message = choice["message"]
        text, finish = _text_of(message.get("content")), str(choice.get("finish_reason") or "")
        if not text.strip() and (refusal := _text_of(message.get("refusal"))):
            text, finish = refusal, REFUSED
    except ValueError:
        usage.add(TokenUsage(1, unknown=1))
        return "an answer that is no JSON, or ends in the middle"
    except (AttributeError, IndexError, KeyError, TypeError):
        return "an answer without choices"
    return Completion(text, finish, usage)


def _text_of(content: Any) -> str:
    """Some give the parts of a message: texts, objects with one, or with none."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join(text for text in texts if isinstance(text, str))


def seconds_of(retry_after: str | None) -> float | None:
    """Retry-After in seconds; None where it is missing or says nothing."""
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
