"""What makes a draft useless, told before a judge is asked for money."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dcar_core.data.clean import normalise
from dcar_core.negatives.words import find_mentions

EMPTY, CUT, REFUSAL, LONG, NAMELESS, DUPLICATE, JUDGED = (
    "empty",
    "cut off by the endpoint's limit",
    "a refusal",
    "longer than the context",
    "does not name the category",
    "another picture has it too",
    "turned down by the judge",
)
REFUSED = "refusal"  # why a model stopped that says by a field of the answer that it refuses
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
    """Why a draft cannot be used: the reason that is counted, and what the model is told."""

    reason: str
    feedback: str


class DraftFilter:
    """Remembers the captions that were accepted. count_tokens: CLIP's, SOS and EOT included."""

    def __init__(self, context: int, words: int, count_tokens: Callable[[Sequence[str]], list[int]]) -> None:
        self._context, self._words, self._count = context, words, count_tokens
        self._accepted: dict[str, str] = {}

    def rejected(self, draft: str, *, image: str, category: str, finish: str) -> Rejection | None:
        """Why this draft will not do, or None."""
        if finish == "content_filter":
            return Rejection(REFUSAL, "it was held back by a content filter; describe only what is harmless.")
        straight = draft.replace("\u2019", "'")
        if finish == REFUSED or _REFUSAL.search(straight):
            return Rejection(REFUSAL, "it is no description of the picture.")
        if finish == "length":
            return Rejection(CUT, f"it was cut off; use at most {self._words} words.")
        if not re.search(r"[^\W\d_]", draft):
            return Rejection(EMPTY, "it has no words.")
        tokens = self._count([draft])[0]
        if tokens > self._context:
            return Rejection(LONG, f"it is too long; use at most {self._words * self._context // tokens} words.")
        if not find_mentions(draft, category):
            return Rejection(NAMELESS, f'it does not contain the words "{category}".')
        if self.owner(draft) not in {None, image}:
            return Rejection(DUPLICATE, "another picture has the very same caption; say what sets this one apart.")
        return None

    def accept(self, draft: str, image: str) -> None:
        self._accepted[normalise(draft)] = image

    def owner(self, draft: str) -> str | None:
        """The picture that has this caption."""
        return self._accepted.get(normalise(draft))
