"""Checks that reject a draft caption before the judge model is paid to look at it."""

import re
from typing import NamedTuple

from dcar_core.captioning.questions import word_limit
from dcar_core.data.clean import fold_text
from dcar_core.model.text.tokenizer import count_clip_tokens
from dcar_core.negatives.words import find_mentions

EMPTY, CUT, REFUSAL, LONG, NAMELESS, DUPLICATE, JUDGED = (
    "empty",
    "cut off by the endpoint's limit",
    "a refusal",
    "longer than the context",
    "does not name the category",
    "another image has the same caption",
    "rejected by the judge",
)
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


class DraftFilter:
    """Rejects unusable drafts and records accepted captions.

    Args:
        context: the maximum number of CLIP tokens, SOS and EOT included.
    """

    def __init__(self, context: int) -> None:
        self._context, self._words = context, word_limit(context)
        self._accepted: dict[str, str] = {}

    def rejected(self, draft: str, *, image: str, category: str, finish: str) -> Rejection | None:
        """Return why a draft is rejected, or None if it is usable."""
        if finish == "content_filter":
            return Rejection(REFUSAL, "it was withheld by a content filter; describe only harmless content.")
        straight = draft.replace("\u2019", "'")
        if finish == REFUSED or _REFUSAL.search(straight):
            return Rejection(REFUSAL, "it is not a description of the image.")
        if finish == "length":
            return Rejection(CUT, f"it was cut off; use at most {self._words} words.")
        if not re.search(r"[^\W\d_]", draft):
            return Rejection(EMPTY, "it has no words.")
        (tokens,) = count_clip_tokens([draft])
        if tokens > self._context:
            return Rejection(LONG, f"it is too long; use at most {self._words * self._context // tokens} words.")
        if not find_mentions(draft, category):
            return Rejection(NAMELESS, f'it does not contain the words "{category}".')
        return self.duplicate(draft, image)

    def duplicate(self, draft: str, image: str) -> Rejection | None:
        if self.owner(draft) in {None, image}:
            return None
        return Rejection(DUPLICATE, "another image has the same caption; describe what is specific to this one.")

    def accept(self, draft: str, image: str) -> None:
        self._accepted[fold_text(draft)] = image

    def owner(self, draft: str) -> str | None:
        """Return the image that has this caption, None if no image has it."""
        return self._accepted.get(fold_text(draft))
