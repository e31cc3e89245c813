"""Lexicon of attribute words: colours, counts, positions, materials, sizes. [ours]

- A row holds near-synonyms; a word is replaced by a word of another row.
- Ambiguous words appear in phrases only: "on the left", not "left", which may be a verb.
"""

import re
from collections.abc import Iterator
from random import Random

from dcar_core.negatives.words import splice_phrase

LEXICON: dict[str, tuple[tuple[str, ...], ...]] = {
    "colour": (
        ("red", "crimson", "scarlet", "maroon"),
        ("blue", "navy", "azure"),
        ("green", "olive"),
        ("yellow", "golden"),
        ("orange",),
        ("purple", "violet", "lavender"),
        ("pink", "magenta"),
        ("brown", "tan", "beige"),
        ("black",),
        ("white", "cream"),
        ("gray", "grey", "silver"),
    ),
    # "one" is missing, because its noun would change number
    "count": (("two",), ("three",), ("four",), ("five",), ("six",), ("seven",), ("eight",), ("nine",), ("ten",)),
    "material": (
        ("wooden",),
        ("metal", "steel", "metallic"),
        ("plastic",),
        ("leather",),
        ("stone", "concrete", "marble"),
        ("paper", "cardboard"),
        ("woolen", "woollen", "knitted"),
        ("brick",),
        ("ceramic", "porcelain"),
    ),
}
# Pairs of opposites; each word is replaced by the other.
OPPOSITES: dict[str, tuple[tuple[str, str], ...]] = {
    "position": (
        ("on the left", "on the right"),
        ("to the left", "to the right"),
        ("left side", "right side"),
        ("left hand", "right hand"),
        ("facing left", "facing right"),
        ("in front of", "behind"),
        ("above", "below"),
        ("inside", "outside"),
        ("indoors", "outdoors"),
        ("foreground", "background"),
        ("top of", "bottom of"),
        ("upper", "lower"),
    ),
    "size": (
        ("large", "small"),
        ("big", "little"),
        ("huge", "tiny"),
        ("tall", "short"),
        ("long", "short"),
        ("wide", "narrow"),
        ("thick", "thin"),
    ),
}


def _choices() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for rows in LEXICON.values():
        for row in rows:
            for word in row:
                found[word] = [other[0] for other in rows if other is not row]
    for pairs in OPPOSITES.values():
        for one, other in pairs:
            found.setdefault(one, []).append(other)
            found.setdefault(other, []).append(one)
    return {word: tuple(others) for word, others in found.items()}


CHOICES = _choices()
_WORDS = re.compile(
    r"(?<![\w-])(?:" + "|".join(sorted(map(re.escape, CHOICES), key=lambda w: (-len(w), w))) + r")(?![\w-])",
    re.IGNORECASE,
)


def swap_attributes(caption: str, kept: list[tuple[int, int]], random: Random) -> Iterator[str]:
    """Yield variants of the caption with one attribute replaced, in random order; `kept` spans stay unchanged."""
    places = [m for m in _WORDS.finditer(caption) if not any(m.start() < end and low < m.end() for low, end in kept)]
    ways = [(match, new) for match in places for new in CHOICES[match[0].lower()]]
    random.shuffle(ways)
    for match, new in ways:
        yield splice_phrase(caption, *match.span(), _cased(match[0], new))


def _cased(old: str, new: str) -> str:
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new
