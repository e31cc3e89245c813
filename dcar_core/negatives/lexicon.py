"""Lexicon of attribute words: colours, counts, materials, positions, sizes. [ours]

- Bars separate groups of near-synonyms; a word is replaced by a word of another group.
- Ambiguous words appear in phrases only: "on the left", not "left", which may be a verb.
"""

import re
from collections.abc import Iterator, Sequence
from random import Random

from dcar_core.negatives.words import splice_phrase, upper_first

LEXICON = (
    "red crimson scarlet maroon|blue navy azure|green olive|yellow golden|orange|purple violet lavender|pink magenta|"
    "brown tan beige|black|white cream|gray grey silver",
    "two|three|four|five|six|seven|eight|nine|ten",  # without "one", because its noun would change number
    "wooden|metal steel metallic|plastic|leather|stone concrete marble|paper cardboard|woolen woollen knitted|brick|"
    "ceramic porcelain",
)
OPPOSITES = (
    "on the left|on the right", "to the left|to the right", "left side|right side", "left hand|right hand",
    "facing left|facing right", "in front of|behind", "above|below", "inside|outside", "indoors|outdoors",
    "foreground|background", "top of|bottom of", "upper|lower", "large|small", "big|little", "huge|tiny", "tall|short",
    "long|short", "wide|narrow", "thick|thin",
)  # fmt: skip


def _choices() -> dict[str, list[str]]:
    kinds = [[group.split() for group in kind.split("|")] for kind in LEXICON]
    found = {word: [other[0] for other in kind if other is not row] for kind in kinds for row in kind for word in row}
    pairs = [pair.split("|") for pair in OPPOSITES]
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        found.setdefault(one, []).append(other)
    return found


CHOICES = _choices()
_EITHER = "|".join(sorted(map(re.escape, CHOICES), key=lambda word: (-len(word), word)))
_WORDS = re.compile(rf"(?<![\w-])(?:{_EITHER})(?![\w-])", re.IGNORECASE)


def swap_attributes(caption: str, kept: Sequence[tuple[int, int]], random: Random) -> Iterator[str]:
    """Yield variants of the caption with one attribute replaced, in random order; `kept` spans stay unchanged."""
    places = [m for m in _WORDS.finditer(caption) if not any(m.start() < end and low < m.end() for low, end in kept)]
    ways = [(match, new) for match in places for new in CHOICES[match[0].lower()]]
    random.shuffle(ways)
    for match, new in ways:
        cased = new.upper() if match[0].isupper() else upper_first(new) if match[0][0].isupper() else new
        yield splice_phrase(caption, *match.span(), cased)
