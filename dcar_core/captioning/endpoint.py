"""One OpenAI-compatible chat endpoint, called through the `openai` client, which retries with growing pauses.

- A refused key, an unknown model, or an address that never answered ends the run. Any other error fails one image.
- A 403 refuses the key before the first completion, and one image after it. If it reports moderation, it is a refusal.
- Redirects are not followed, since they could send the images to another host.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dcar_core.captioning.options import CaptionOptions, VisionModel
from dcar_core.captioning.questions import REFUSED
from dcar_core.util.errors import CaptionError, EndpointError, MissingExtraError
from dcar_core.util.json_text import parse_json

try:
    import openai
except ImportError:  # pragma: no cover - the tests have it
    raise MissingExtraError("captioning", "caption") from None

_FATAL = {
    401: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY)",
    403: "refuses the key (DCAR_CAPTION_API_KEY, DCAR_JUDGE_API_KEY) or the image",
    404: "has no such model or address",
}
# Responses, their tokens, and responses without token counts.
USAGE = ("requests", "tokens_in", "tokens_out", "unknown")
Usage = Counter[str]
Usable = Callable[["Completion"], bool]
_MAX_UNUSABLE = 3  # unusable responses before an image fails


@dataclass(frozen=True)
class Completion:
    """One completion of the model. text: may be empty. finish: the reason why the model stopped, or REFUSED."""

    text: str
    finish: str


class Endpoint:
    """Client of one model. Close it after use."""

    def __init__(self, model: VisionModel, options: CaptionOptions) -> None:
        self.model, self._options = model, options
        self._url = model.url.rstrip("/") + "/chat/completions"
        self._has_answered = self._has_accepted_key = False
        try:
            self._client = openai.AsyncOpenAI(
                base_url=model.url,
                api_key=model.key or "none",  # the client takes None from OPENAI_API_KEY, a key for another host
                organization="",
                project="",
                max_retries=options.tries - 1,
                timeout=options.timeout_s,
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
            )
        except Exception as error:  # of several libraries: proxies, certificates, URLs
            raise CaptionError(
                f"{self._url} cannot be requested ({error}); correct the URL, the proxy (HTTP_PROXY, HTTPS_PROXY, "
                f"ALL_PROXY) or the certificates (SSL_CERT_FILE, SSL_CERT_DIR)"
            ) from error

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, messages: list[dict[str, Any]], usage: Usage, usable: Usable = lambda _: True) -> Completion:
        """Send a chat and return the completion.

        usage: receives the tokens of every response, unusable ones included.
        usable: returns False for a completion that must be requested again.

        Raises:
            EndpointError: the request was refused, or every attempt failed; this image has failed.
            CaptionError: no request can succeed, because the key, the model or the address is wrong.
        """
        options, reason = self._options, ""
        completion: Completion | None
        for _ in range(_MAX_UNUSABLE):
            try:
                async with asyncio.timeout(options.tries * options.timeout_s):  # the client's restart with every byte
                    response = await self._client.chat.completions.with_raw_response.create(
                        model=self.model.name,
                        messages=messages,
                        max_tokens=options.max_tokens,
                        temperature=options.temperature,
                    )
            except (openai.APIConnectionError, TimeoutError) as error:
                fault = f"{error} {error.__cause__ or ''}".strip() or "too slow"
                if not self._has_answered and not isinstance(error, openai.APITimeoutError | TimeoutError):
                    raise CaptionError(
                        f"{self._url} cannot be reached ({fault}); start the model's server or correct the URL, and "
                        f"run the same command again"
                    ) from error
                raise EndpointError(f"no response in {options.tries} attempts: {fault}") from error
            except openai.APIStatusError as error:
                self._has_answered = True
                completion = self._refusal(error.status_code, error.response.content)
            else:
                self._has_answered = True
                completion = _read(response.content, usage)
            if completion is None:
                reason = f"no completion: {self._excerpt(response.content)}".rstrip(": ")
                continue
            self._has_accepted_key = True
            if usable(completion):
                return completion
            reason = f"an unusable completion: {self._shortened(completion.text)!r}"
        raise EndpointError(reason)

    def _refusal(self, status: int, content: bytes) -> Completion:
        """Return the refusal in a 403 whose error says that moderation flagged the input, as OpenRouter writes it.

        Raise CaptionError or EndpointError for any other error response.
        """
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            error = parse_json(content)["error"]
            if status == 403 and {"reasons", "flagged_input"} & error["metadata"].keys():
                return Completion(self._shortened(str(error["message"])), REFUSED)
        reason = f"{status} {self._excerpt(content)}"
        if status in _FATAL and not (status == 403 and self._has_accepted_key):
            raise CaptionError(f"{self._url} {_FATAL[status]}: {reason} (model {self.model.name!r})")
        raise EndpointError(reason)

    def _excerpt(self, content: bytes) -> str:
        return self._shortened(content.decode("utf-8", "replace"))

    def _shortened(self, text: str) -> str:
        """Mask the key, then shorten; in this order no part of the key remains."""
        text = text.replace(self.model.key, "***") if self.model.key else text
        return " ".join(text.split())[:200]


def _read(content: bytes, usage: Usage) -> Completion | None:
    """Parse a response, and add its tokens to `usage` in any case. Return None if it has no completion."""
    tokens = {"requests": 1, "unknown": 1}
    try:
        response = parse_json(content)
        reported = response["usage"] if isinstance(response.get("usage"), dict) else {}
        tokens_in, tokens_out = reported.get("prompt_tokens"), reported.get("completion_tokens")
        if isinstance(tokens_in, int) and isinstance(tokens_out, int):
            tokens = {"requests": 1, "tokens_in": tokens_in, "tokens_out": tokens_out}
        choice = response["choices"][0]
        message = choice["message"]
        text, finish = _text_of(message.get("content")), str(choice.get("finish_reason") or "")
        if not text.strip() and (refusal := _text_of(message.get("refusal"))):
            text, finish = refusal, REFUSED
        return Completion(text, finish)
    except (ValueError, AttributeError, IndexError, KeyError, TypeError):
        return None
    finally:
        usage.update(tokens)


def _text_of(content: Any) -> str:
    """Join the text parts of a message: a string, or a list of strings and objects."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return " ".join(text for text in texts if isinstance(text, str))
