"""Lexicon of attribute words: colours, counts, positions, materials, sizes. [ours]

- A row holds near-synonyms; a word is replaced by a word of another row.
- Ambiguous words appear in phrases only: "on the left", not "left", which may be a verb.
"""

import re
from collections.abc import Iterator
from random import Random

from dcar_core.negatives.words import splice_phrase

LEXICON = (
    (  # colours
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
    # counts; "one" is missing, because its noun would change number
    (("two",), ("three",), ("four",), ("five",), ("six",), ("seven",), ("eight",), ("nine",), ("ten",)),
    (  # materials
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
)
# Positions and sizes: pairs of opposites; each word is replaced by the other.
OPPOSITES = (
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
    ("large", "small"),
    ("big", "little"),
    ("huge", "tiny"),
    ("tall", "short"),
    ("long", "short"),
    ("wide", "narrow"),
    ("thick", "thin"),
)


def _choices() -> dict[str, list[str]]:
    found = {word: [other[0] for other in rows if other is not row] for rows in LEXICON for row in rows for word in row}
    for one, other in (*OPPOSITES, *(pair[::-1] for pair in OPPOSITES)):
        found.setdefault(one, []).append(other)
    return found


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
