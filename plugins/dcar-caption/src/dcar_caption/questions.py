"""Prompts for the captioning models, and parsers and checks of their responses (the
paper's Figure 3, own wording).

Checks reject a draft before the judge is paid to look at it. A rejected draft is
requested again with the feedback.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcar_caption.endpoint import REFUSED, Completion
from dcar_core.model.tokenizer import count_clip_tokens
from dcar_core.negatives.words import find_mentions
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

TEMPLATES = [
    (
        "This picture of {dataset} shows: {category}. Write one caption of at most"
        ' {words} words that contains the words "{category}". Say what it looks like'
        " and does, then the scene and the background. Only what can be seen."
    ),
    (
        'The picture belongs to the category "{category}" of {dataset}. Describe it in'
        " one or two short sentences, at most {words} words, and call the main object"
        ' "{category}". Name its colours, number and position, and what is behind it.'
        " Nothing that cannot be seen."
    ),
    (
        "Caption this picture from {dataset} in at most {words} words. The main object"
        ' is "{category}": use that name, and tell this picture from others of its kind'
        " by attributes, scene and background."
    ),
]
_ONLY = " Answer with the caption alone, without quotation marks, lists or remarks."
_AGAIN = (
    'Your caption was: "{draft}" It cannot be used: {feedback} Write it anew.' + _ONLY
)
JUDGE_TEMPLATE = (
    'A caption for the picture, which is of the category "{category}" of {dataset}:'
    ' "{draft}" Is every statement in it true of the picture, is the main object'
    " described by what sets it apart, and is nothing invented? Answer with JSON alone:"
    ' {{"accept": true or false, "feedback": "what is wrong and how to mend it, in one'
    ' sentence"}}'
)
_THOUGHT_BEGINS, _THOUGHT_ENDS = (
    re.compile(tag, re.IGNORECASE) for tag in ("<think(?:ing)?>", "</think(?:ing)?>")
)
_CONSENT = "(?:sure|certainly|of course)"
_NAME = r"(?:here(?:['\u2019]s| is)[^:\n]{0,60}|(?:the )?(?:image )?caption)"
_LABEL = re.compile(rf"^\W*(?:{_CONSENT}\b\W*{_NAME}?|{_NAME})\W*:\s*", re.IGNORECASE)
_QUOTED = re.compile(
    "[\"\u201c]([^\"\u201c\u201d]*)[\"\u201d]|['\u2018]((?:[^'\u2018\u2019]|\\b['\u2019]\\b)*)['\u2019]"
)
_VERDICT = re.compile(
    r"^[^\w{]*(?:verdict\W+)?(accept(?:ed)?|yes|reject(?:ed)?|no)\b[\s:,.\-]*",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(i('m| am) (very |so )?sorry|i (can(no|')t|can not|am unable|'m"
    r" unable|won't|will not|do not|don't) "
    r"(\w+"
    r" )?(see|view|assist|help|provide|process|describe|identify|comply|access|caption"
    r"|fulfil|able)|"
    r"i('m| am) (not able|unable)|as an? (ai|artificial)\b|language model|unable to"
    r" (view|see|process|access|describe)|"
    r"no (image|picture|photo) (is|was|has been|seems)|can(no|')t (assist|help|comply)|"
    r"(image|picture) (did not|didn't|failed to) load|please (provide|upload|share)"
    r" (the|an?) (image|picture|photo)|"
    r"against (my|our) (guidelines|policy))",
    re.IGNORECASE,
)
# the reason, for the statistics, and the feedback for the model
Rejection = tuple[str, str]


def load_templates(file: Path | None) -> list[str]:
    """Return the question templates, one per line of the file; the usual ones without a
    file. Raise DataError.
    """
    if file is None:
        return TEMPLATES
    try:
        lines = [
            line.strip()
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        if not lines or not all(
            "{category}" in line and line.format(category=1, dataset=1, words=1)
            for line in lines
        ):
            raise ValueError("no question, or one without {category}")
        return lines
    except (OSError, ValueError, LookupError) as error:
        needed = "a question a line, with {category}, {dataset} and {words}"
        raise DataError(
            f"the templates {file} cannot be used ({error}); write {needed}"
        ) from error


def question(templates: Sequence[str], key: str, **shown: Any) -> str:
    """Return the question for an image; a hash of its key chooses the template."""
    return templates[zlib.crc32(key.encode()) % len(templates)].format(**shown) + _ONLY


def messages_for(
    text: str,
    image_uri: str,
    before: tuple[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Build the chat for a draft or a verdict. before: the previous draft and the
    feedback on it.
    """
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": image_uri}},
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if before is not None:
        draft, feedback = before
        messages.append({"role": "assistant", "content": draft or "(nothing)"})
        messages.append(
            {"role": "user", "content": _AGAIN.format(draft=draft, feedback=feedback)}
        )
    return messages


def _without_thoughts(answer: str) -> str:
    # the opening tag may be missing, or the end cut off
    remainder = _THOUGHT_ENDS.split(answer)[-1]
    return "" if _THOUGHT_BEGINS.search(remainder) else remainder.strip()


def tidy_draft(answer: str) -> str:
    """Extract the caption: one line, without thoughts, labels, markup and quotation
    marks.
    """
    text = _LABEL.sub("", _without_thoughts(answer))
    text = " ".join(re.sub(r"[*#`]+", "", text).split())
    if quoted := _QUOTED.fullmatch(text):
        return (quoted[1] or quoted[2] or "").strip()
    return text


def read_verdict(answer: Completion) -> tuple[bool, str] | None:
    """Return a judge's decision and its feedback, of JSON inside any text or after a
    leading yes or no, or None.
    """
    text = _without_thoughts(answer.text) if answer.finish != REFUSED else ""
    try:
        said = parse_json(text[text.find("{") : text.rfind("}") + 1])
        accepts = str(said["accept"]).strip().casefold() in {"true", "yes", "1"}
        return accepts, " ".join(str(said.get("feedback") or "").split())
    except (AttributeError, LookupError, TypeError, ValueError):
        word = _VERDICT.match(text)
        if word:
            return (word[1].casefold()[0] in "ay", " ".join(text[word.end() :].split()))
        return None


def rejection(
    draft: str,
    finish: str,
    category: str,
    words: int,
    context: int,
) -> Rejection | None:
    """Return why a draft is rejected, or None if it is usable. context: the maximum
    number of CLIP tokens.
    """
    if finish in ("content_filter", REFUSED) or _REFUSAL.search(
        draft.replace("\u2019", "'")
    ):
        return (
            "a refusal",
            "it is not a description of the image; describe only harmless content.",
        )
    if finish == "length":
        return (
            "cut off by the endpoint's limit",
            f"it was cut off; use at most {words} words.",
        )
    if not re.search(r"[^\W\d_]", draft):
        return ("empty", "it has no words.")
    if (tokens := count_clip_tokens([draft])[0]) > context:
        return (
            "longer than the context",
            f"it is too long; use at most {words * context // tokens} words.",
        )
    if not find_mentions(draft, category):
        return (
            "does not name the category",
            f'it does not contain the words "{category}".',
        )
    return None
