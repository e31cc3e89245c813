"""One OpenAI-compatible endpoint: a question in, an answer out, however it misbehaves on the way.

- Tried again, with pauses that double and jitter: 408, 409, 425, 429, 5xx, time-outs, connections that break, answers
  that are no JSON or end in the middle, and answers without choices. Retry-After is honoured, in seconds or as a date,
  and while one request waits for it no other is sent.
- A key that is refused or a model that is not there ends the run; another 4xx fails the one picture.
- Redirects are not followed: they could take the key elsewhere.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from dcar_core.captioning.options import CaptionOptions, Model, Usage
from dcar_core.errors import CaptionError, EndpointError, MissingExtraError
from dcar_core.json_text import parse

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


@dataclass(frozen=True)
class Answer:
    """text may be empty; finish: why the model stopped. usage: of every attempt, since all are paid."""

    text: str
    finish: str = ""
    usage: Usage = field(default_factory=Usage)


class Endpoint:
    """Asks one model. Must be closed."""

    def __init__(self, model: Model, options: CaptionOptions) -> None:
        self.model, self._options = model, options
        self._not_before = 0.0
        self._wasted = Usage()
        headers = {"authorization": f"Bearer {model.key}"} if model.key else {}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=options.timeout_s, limits=httpx.Limits(max_connections=options.concurrency)
        )

    async def close(self) -> None:
        await self._client.aclose()

    def take_wasted(self) -> Usage:
        """What failed requests have used since this was last called: answers that came and were of no use."""
        wasted, self._wasted = self._wasted, Usage()
        return wasted

    async def ask(self, messages: list[dict[str, Any]], usable: Callable[[str], bool] = lambda text: True) -> Answer:
        """The model's answer to a chat.

        Args:
            usable: false for an answer that cannot be used and is asked for again.

        Raises:
            EndpointError: the request was refused, or no try gave an answer; this picture has failed.
            CaptionError: no request can succeed: the key, the model or the address is wrong.
        """
        usage = Usage()
        try:
            return await self._tried(messages, usable, usage)
        except CaptionError:
            self._wasted.add(usage)
            raise

    async def _tried(self, messages: list[dict[str, Any]], usable: Callable[[str], bool], usage: Usage) -> Answer:
        why, useless = "", 0
        for attempt in range(self._options.tries):
            await self._pause()
            try:
                async with asyncio.timeout(self._options.timeout_s):  # httpx's own starts anew with every byte
                    reply = await self._client.post(self._url, json=self._body(messages))
            except (httpx.HTTPError, TimeoutError) as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
                await self._back_off(attempt, None)
                continue
            if reply.status_code == 200:
                found = _read(reply, usage)
                if isinstance(found, Answer) and usable(found.text):
                    return found
                if isinstance(found, str):
                    why = f"{found}: {self._said(reply)}"
                else:
                    why = f"an answer that cannot be used: {self._shown(found.text)!r}"
                useless += isinstance(found, Answer)
                if useless == _USELESS:
                    raise EndpointError(why)
                await self._back_off(attempt, None)
                continue
            why = f"{reply.status_code} {self._said(reply)}"
            if reply.status_code in _FATAL:
                raise CaptionError(f"{self._url} {_FATAL[reply.status_code]}: {why} (model {self.model.name!r})")
            if reply.status_code not in _AGAIN and reply.status_code < 500:
                raise EndpointError(why)
            await self._back_off(attempt, reply.headers.get("retry-after"))
        raise EndpointError(f"no answer in {self._options.tries} tries; the last: {why}")

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

    def _said(self, reply: httpx.Response) -> str:
        """What an error answer says, short, and never with the key in it."""
        return self._shown(reply.text)

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
        if asked is None:
            pause = min(_LONGEST_PAUSE_S, self._options.backoff_s * 2**attempt)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            return
        if asked > self._options.longest_wait_s:
            raise EndpointError(f"asked to wait {asked:.0f} s, longer than {self._options.longest_wait_s:.0f}")
        self._not_before = max(self._not_before, time.monotonic() + asked)


def _read(reply: httpx.Response, usage: Usage) -> Answer | str:
    """The answer, or what is wrong with it; what was used is added up either way."""
    try:
        content = parse(reply.content)
        said = content.get("usage") or {}
        tokens = [said.get(name) for name in ("prompt_tokens", "completion_tokens")]
        given, made = (number if isinstance(number, int) else None for number in tokens)
        usage.add(Usage(1, unknown=1) if given is None or made is None else Usage(1, given, made))
        choice = content["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        if not isinstance(text, str):
            text = " ".join(part.get("text", "") for part in text)  # some give the parts of a message
    except ValueError:
        usage.add(Usage(1, unknown=1))
        return "an answer that is no JSON, or ends in the middle"
    except (AttributeError, IndexError, KeyError, TypeError):
        return "an answer without choices"
    return Answer(text, str(choice.get("finish_reason") or ""), usage)


def seconds_of(retry_after: str | None) -> float | None:
    """Retry-After in seconds; None where it is missing or says nothing."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
