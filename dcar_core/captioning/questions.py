"""Prompts for the captioning models, and parsers and checks of their responses (the paper's Figure 3, own wording).

- The question names the data set and the category, and asks for main object, scene and background.
- The judge sees image and draft, and returns a verdict with feedback.
- Checks reject a draft before the judge is paid to look at it. A rejected draft is requested again with the feedback.
"""

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dcar_core.model.text.tokenizer import count_clip_tokens
from dcar_core.negatives.words import find_mentions
from dcar_core.util.errors import DataError
from dcar_core.util.json_text import replace_surrogates

QUESTION_TEMPLATES = (
    "This picture of {dataset} shows: {category}. Write one caption of at most {words} words that contains the words "
    '"{category}". Say what it looks like and does, then the scene and the background. Only what can be seen.',
    'The picture belongs to the category "{category}" of {dataset}. Describe it in one or two short sentences, at most '
    '{words} words, and call the main object "{category}". Name its colours, number and position, and what is behind '
    "it. Nothing that cannot be seen.",
    'Caption this picture from {dataset} in at most {words} words. The main object is "{category}": use that name, '
    "and tell this picture from others of its kind by attributes, scene and background.",
)
_ONLY = " Answer with the caption alone, without quotation marks, lists or remarks."
_AGAIN = 'Your caption was: "{draft}" It cannot be used: {feedback} Write it anew.' + _ONLY
JUDGE_TEMPLATE = (
    'A caption for the picture, which is of the category "{category}" of {dataset}: "{draft}" Is every statement in it '
    "true of the picture, is the main object described by what sets it apart, and is nothing invented? Answer with "
    'JSON alone: {{"accept": true or false, "feedback": "what is wrong and how to mend it, in one sentence"}}'
)
_THOUGHT_BEGINS, _THOUGHT_ENDS = (re.compile(tag, re.IGNORECASE) for tag in ("<think(?:ing)?>", "</think(?:ing)?>"))
_CONSENT, _NAME = "(?:sure|certainly|of course)", r"(?:here(?:['\u2019]s| is)[^:\n]{0,60}|(?:the )?(?:image )?caption)"
_LABEL = re.compile(rf"^\W*(?:{_CONSENT}\b\W*{_NAME}?|{_NAME})\W*:\s*", re.IGNORECASE)
# The first quotation mark inside must be an opening one: a closing one would end the quotation at the start.
_QUOTED = re.compile(
    '["\u201c]([^"\u201c\u201d]*(?:\\s["\u201c].*)?)["\u201d]'
    "|['\u2018]((?:[^'\u2018\u2019]|(?<=\\w)['\u2019](?=\\w))*(?:\\s['\u2018].*)?)['\u2019]"
)
_WORD = re.compile(r"^[^\w{]*(?:verdict\W+)?(accept(?:ed)?|yes|reject(?:ed)?|no)\b[\s:,.\-]*", re.IGNORECASE)
_FIELDS = frozenset({"category", "dataset", "words"})

REFUSAL = "a refusal"
REFUSED = "refusal"  # finish reason of a completion whose `refusal` field is set
_REFUSAL = re.compile(
    r"\b(i('m| am) (very |so )?sorry|i (can(no|')t|can not|am unable|'m unable|won't|will not|do not|don't) "
    r"(\w+ )?(see|view|assist|help|provide|process|describe|identify|comply|access|caption|fulfil|able)|"
    r"i('m| am) (not able|unable)|as an? (ai|artificial)\b|language model|unable to (view|see|process|access|describe)|"
    r"no (image|picture|photo) (is|was|has been|seems)|can(no|')t (assist|help|comply)|"
    r"(image|picture) (did not|didn't|failed to) load|please (provide|upload|share) (the|an?) (image|picture|photo)|"
    r"against (my|our) (guidelines|policy))",
    re.IGNORECASE,
)


class Rejection(NamedTuple):
    """The reason of a rejection, for the statistics, and the feedback for the model."""

    reason: str
    feedback: str


class Judgement(NamedTuple):
    """Verdict of the judge, with feedback for the next draft."""

    accept: bool
    feedback: str


def load_templates(file: Path) -> tuple[str, ...]:
    """Load question templates, one per line, with {category} and optionally {dataset} and {words}.

    Raises:
        DataError: the file cannot be read, or a line is not a valid template.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the templates {file} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"the templates file {file} is empty")
    for line in lines:
        names = set(re.findall(r"{(\w*)}", line))
        if "category" not in names or names - _FIELDS or re.search(r"[{}]", re.sub(r"{\w+}", "", line)):
            raise DataError(
                f"{file}: a template needs {{category}}, may have {{dataset}} and {{words}}, and no other braces: "
                f"{line!r}"
            )
    return tuple(lines)


def question(templates: Sequence[str], *, image: str, category: str, dataset: str, context: int) -> str:
    """Return the question for an image. The template is chosen by a hash of the image name."""
    template = templates[zlib.crc32(image.encode()) % len(templates)]
    return template.format(category=category, dataset=dataset, words=word_limit(context)) + _ONLY


def word_limit(context: int) -> int:
    """Return a number of words that nearly always fits the context."""
    return max(8, int(0.6 * context))


def messages_for(text: str, image_uri: str, before: tuple[str, str] | None = None) -> list[dict[str, Any]]:
    """Build the chat for a draft or a verdict. before: the previous draft and the feedback on it."""
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image_uri}}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if before is not None:
        draft, feedback = before
        messages.append({"role": "assistant", "content": draft})
        messages.append({"role": "user", "content": _AGAIN.format(draft=draft, feedback=feedback)})
    return messages


def _without_thoughts(answer: str) -> str:
    """Return the text after the last thought; "" if a thought is not closed, since the response was cut off.

    The opening tag may be missing, because some chat templates contain it.
    """
    remainder = _THOUGHT_ENDS.split(answer)[-1]
    return "" if _THOUGHT_BEGINS.search(remainder) else remainder.strip()


def tidy_draft(answer: str) -> str:
    """Extract the caption: one line, without thoughts, labels, markup and quotation marks."""
    text = _without_thoughts(answer)
    text = _LABEL.sub("", text)
    text = " ".join(re.sub(r"[*#`]+", "", text).split())
    quoted = _QUOTED.fullmatch(text)
    return (quoted[1] or quoted[2] or "").strip() if quoted else text


def read_verdict(answer: str) -> Judgement | None:
    """Parse a verdict: JSON inside any text, or a leading yes, accept, no or reject; None if there is none."""
    text = _without_thoughts(answer)
    for start in (match.start() for match in re.finditer("{", text)):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
            if isinstance(found, dict) and "accept" in found:
                said = found["accept"]
                accept = said if isinstance(said, bool) else str(said).strip().casefold() in {"true", "yes", "1"}
                return Judgement(accept, replace_surrogates(" ".join(str(found.get("feedback") or "").split())))
        except ValueError:
            continue
        except RecursionError:  # nested too deeply for a verdict
            return None
    word = _WORD.match(text)
    if word is None:
        return None
    return Judgement(word[1].casefold()[0] in "ay", " ".join(text[word.end() :].split()))


def rejection(draft: str, *, category: str, finish: str, context: int) -> Rejection | None:
    """Return why a draft is rejected, or None if it is usable. context: the maximum number of CLIP tokens."""
    words = word_limit(context)
    if finish == "content_filter":
        return Rejection(REFUSAL, "it was withheld by a content filter; describe only harmless content.")
    if finish == REFUSED or _REFUSAL.search(draft.replace("\u2019", "'")):
        return Rejection(REFUSAL, "it is not a description of the image.")
    if finish == "length":
        return Rejection("cut off by the endpoint's limit", f"it was cut off; use at most {words} words.")
    if not re.search(r"[^\W\d_]", draft):
        return Rejection("empty", "it has no words.")
    (tokens,) = count_clip_tokens([draft])
    if tokens > context:
        return Rejection("longer than the context", f"it is too long; use at most {words * context // tokens} words.")
    if not find_mentions(draft, category):
        return Rejection("does not name the category", f'it does not contain the words "{category}".')
    return None
