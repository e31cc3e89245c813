"""Checks that reject a draft caption before the judge model is paid to look at it."""

import re
from typing import NamedTuple

from dcar_core.captioning.questions import word_limit
from dcar_core.model.text.tokenizer import count_clip_tokens
from dcar_core.negatives.words import find_mentions

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
        feedback = f"it is too long; use at most {words * context // tokens} words."
        return Rejection("longer than the context", feedback)
    if not find_mentions(draft, category):
        return Rejection("does not name the category", f'it does not contain the words "{category}".')
    return None
