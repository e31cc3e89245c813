"""Names and attributes in captions: found as whole words, and replaced with correct
article, number and spelling.

- Case, underscores, hyphens and typographic signs are folded: "A morning_glory"
  contains "Morning glory".
- Scripts without spaces between words, such as Chinese and Thai, show no whole words;
  names are found anywhere in them.
- Singular and plural forms are found too, and replaced by the same number of the new
  name.
- An attribute word (colour, count, material, position, size) is replaced by one that is
  no near-synonym. [ours]
- A preceding "a" or "an" follows the sound of the new word, as far as its spelling
  shows it.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from random import Random

_GAP = r"[\s_\-\u2010-\u2013]+"
_APOSTROPHE = "['\u2019\u02bc]"
# Kana, Chinese characters, Thai, Lao, Burmese and Khmer
_UNSPACED = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
)
_OF_UNSPACED = re.compile(f"[{_UNSPACED}]")
_SPACED = rf"[^\W_{_UNSPACED}]"
_NOT_BEFORE = f"(?<!{_SPACED})(?<!{_SPACED}[\\-\u2010\u2011])"
_NOT_AFTER = f"(?![\\-\u2010\u2011]?{_SPACED})"
_ARTICLE = re.compile(r"(?<![^\W_])(a|an)([\s_]+)$", re.IGNORECASE)
_SENTENCE_START = re.compile(r"(^|[.!?][\s\"']+)$")
_PREPOSITION = re.compile(
    r"\s(?:of|in|on|with|at|de|du|la|over|under)\s", re.IGNORECASE
)

_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "leaf": "leaves",
    "loaf": "loaves",
    "knife": "knives",
    "wolf": "wolves",
    "calf": "calves",
    "shelf": "shelves",
    "half": "halves",
    "scarf": "scarves",
    "life": "lives",
    "hoof": "hooves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "hero": "heroes",
    "mango": "mangoes",
    "cactus": "cacti",
    "cookie": "cookies",
    "zombie": "zombies",
    "selfie": "selfies",
    "movie": "movies",
    "hoodie": "hoodies",
    "magpie": "magpies",
    "collie": "collies",
    "moustache": "moustaches",
    "axe": "axes",
    "porsche": "porsches",
    "lens": "lenses",
    "gas": "gases",
    "bus": "buses",
    "emu": "emus",
    "menu": "menus",
    "fireman": "firemen",
    "policeman": "policemen",
    "snowman": "snowmen",
    "fisherman": "fishermen",
    "rhinoceros": "rhinoceroses",
}
_SINGULAR_OF = {plural: singular for singular, plural in _IRREGULAR.items()}
_PLURAL_IN_OS = re.compile(r"[bcdeghiklmnoprstvz]os$")
_UNCHANGED = frozenset(
    {
        "aircraft",
        "binoculars",
        "bison",
        "clothes",
        "corn",
        "cosmos",
        "deer",
        "fish",
        "glasses",
        "goggles",
        "jeans",
        "mercedes",
        "moose",
        "news",
        "offspring",
        "pants",
        "pliers",
        "salmon",
        "scissors",
        "series",
        "sheep",
        "shorts",
        "shrimp",
        "spacecraft",
        "species",
        "sunglasses",
        "swine",
        "thermos",
        "trousers",
        "trout",
    }
)
# Words whose first sound differs from their first letter: vowel spoken as consonant,
# and the reverse.
_A = re.compile(
    r"uni(?!n|m|dent|ron)|us[aeu]|ut[aei]|eu|ewe|one(?!i)|once|uk|u[.-]|ubiq|ufo|ur[aiu]",
    re.IGNORECASE,
)
_AN = re.compile(r"hour|honest|honou?r|heir|8|1[18]$", re.IGNORECASE)
_VOWELS = frozenset("aeiou")
_SPOKEN_WITH_A_VOWEL = frozenset("AEFHILMNORSX")

# Bars separate groups of near-synonyms. Ambiguous words stand in phrases only: "left"
# may be a verb.
LEXICON = (
    (
        "red crimson scarlet maroon|blue navy azure|green olive|yellow"
        " golden|orange|purple violet lavender|pink magenta|brown tan beige|black|white"
        " cream|gray grey silver"
    ),
    # without "one", because its noun would change number
    "two|three|four|five|six|seven|eight|nine|ten",
    (
        "wooden|metal steel metallic|plastic|leather|stone concrete marble|paper"
        " cardboard|woolen woollen knitted|brick|ceramic porcelain"
    ),
)
OPPOSITES = (
    "on the left|on the right",
    "to the left|to the right",
    "left side|right side",
    "left hand|right hand",
    "facing left|facing right",
    "in front of|behind",
    "above|below",
    "inside|outside",
    "indoors|outdoors",
    "foreground|background",
    "top of|bottom of",
    "upper|lower",
    "large|small",
    "big|little",
    "huge|tiny",
    "tall|short",
    "long|short",
    "wide|narrow",
    "thick|thin",
)


def fold_name(name: str) -> str:
    """Fold case, underscores, hyphens, apostrophes, spacing and Unicode forms of a name
    for comparison.
    """
    straight = re.sub(_APOSTROPHE, "'", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(filter(None, re.split(_GAP, straight)))


def find_mentions(caption: str, name: str) -> list[tuple[int, int]]:
    """Return start and end of every mention."""
    if fold_name(name):
        return [match.span() for match in _pattern(name).finditer(caption)]
    return []


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def replace_name(
    caption: str,
    spans: Sequence[tuple[int, int]],
    name: str,
    new: str,
) -> str:
    """Replace the mentions of `name` by `new`; keep their number, capitals and
    separators.
    """
    folded = fold_name(name)
    many = fold_name(plural(name))
    for start, end in sorted(spans, reverse=True):
        written = caption[start:end]
        same = fold_name(written)
        if same == folded:
            numbered = new
        else:
            numbered = plural(new) if same == many else singular(new)
        caption = splice_phrase(
            caption,
            start,
            end,
            _written_like(written, name, numbered),
        )
    return caption


def splice_phrase(caption: str, start: int, end: int, new: str) -> str:
    """Replace caption[start:end] by `new`; keep a sentence's capital and correct the
    preceding article.
    """
    head = caption[:start]
    old = caption[start:end]
    if _SENTENCE_START.search(head) and old[:1].isupper():
        new = upper_first(new)
    before = _ARTICLE.search(head)
    if before:
        said = article(new)
        if before[1] == "AN":
            said = said.upper()
        elif before[1][0].isupper():
            said = said.capitalize()
        head = head[: before.start()] + said + before[2]
    return head + new + caption[end:]


def article(phrase: str) -> str:
    """Return "a" or "an" for a phrase, by its first word as spoken: an 8, an MX-5."""
    first = re.match(r"\W*([^\W_]+)([.\-]?)", phrase)
    if first is None:
        return "a"
    word = first[1]
    if _AN.match(word):
        return "an"
    is_short = word.isupper() and (
        len(word) < 3 or not _VOWELS & set(word.casefold()[1:])
    )
    # spoken letter by letter
    if (is_short and len(phrase) > 1) or re.match(r"[A-Z]\d", word):
        return "an" if word[0] in _SPOKEN_WITH_A_VOWEL else "a"
    sound = unicodedata.normalize("NFD", word[0])[0].casefold()  # without accent
    return "an" if sound in _VOWELS and not _A.match(word + first[2]) else "a"


@lru_cache(maxsize=65536)
def plural(name: str) -> str:
    """Return the plural of a name by its head word: "birds of paradise"; a plural stays
    unchanged.
    """
    return name if singular(name) != name else _with_head(name, _plural_word)


@lru_cache(maxsize=65536)
def singular(name: str) -> str:
    """Return the singular of a name that looks like a plural, else the name."""
    return _with_head(name, _singular_word)


def _with_head(name: str, change: Callable[[str], str]) -> str:
    cut = _PREPOSITION.search(name)
    end = cut.start() if cut else len(name)
    word = re.search(r"[^\W_]+$", name[:end])
    return name[: word.start()] + change(word[0]) + name[end:] if word else name


def _plural_word(word: str) -> str:
    low = word.casefold()
    if low in _UNCHANGED or low in _IRREGULAR:
        return word[0] + _IRREGULAR.get(low, word)[1:]
    if re.search(r"(s|x|z|ch|sh)$", low):
        return word + "es"
    # proper names keep it: two Camrys
    if re.search(r"[^aeiou\d]y$", low) and word[0].islower():
        return word[:-1] + "ies"
    return word + "s"


def _singular_word(word: str) -> str:
    low = word.casefold()
    if low in _SINGULAR_OF:
        return word[0] + _SINGULAR_OF[low][1:]
    if low in _UNCHANGED or low in _IRREGULAR or len(low) < 4:
        return word
    if low.endswith("ies") and len(low) > 4:
        return word[:-3] + "y"
    if re.search(r"(ch|sh|x|ss|zz|[^eo]us)es$", low):
        return word[:-2]
    # proper names such as Barbados stay
    plural_in_os = word[0].islower() and _PLURAL_IN_OS.search(low)
    if plural_in_os or (
        low.endswith("s") and not low.endswith(("ss", "us", "is", "as", "os"))
    ):
        return word[:-1]
    return word


@lru_cache(maxsize=65536)
def _pattern(name: str) -> re.Pattern[str]:
    forms = {name, plural(name), singular(name)}
    parts = {
        _GAP.join(
            map(re.escape, re.split(_GAP, unicodedata.normalize("NFC", form).strip()))
        )
        for form in forms
    }
    either = re.sub(
        _APOSTROPHE,
        _APOSTROPHE,
        "|".join(sorted(parts, key=lambda part: (-len(part), part))),
    )
    before = "" if _OF_UNSPACED.match(name.strip()[:1]) else _NOT_BEFORE
    after = "" if _OF_UNSPACED.match(name.strip()[-1:]) else _NOT_AFTER
    return re.compile(f"{before}(?:{either}){after}", re.IGNORECASE)


def _written_like(written: str, name: str, new: str) -> str:
    """Write `new` with the capitals and separators of the old name in the caption."""
    words = re.split(r"[\s_]+", written)
    if " ".join(words)[: len(name)] != " ".join(name.split())[: len(" ".join(words))]:
        if written.islower() or (written.isupper() and len(written) > 1):
            new = new.lower() if written.islower() else new.upper()
        elif written[:1].isupper():
            is_title = len(words) > 1 and all(word[:1].isupper() for word in words)
            if is_title:
                new = " ".join(map(upper_first, new.split()))
            else:
                new = upper_first(new)
    if "_" in written:
        return "_".join(new.split())
    is_hyphenated = (
        "-" in written
        and " " not in written
        and " " in name.strip()
        and "-" not in name
    )
    return "-".join(new.split()) if is_hyphenated else new


_KINDS = [[group.split() for group in kind.split("|")] for kind in LEXICON]
CHOICES = {
    word: [other[0] for other in kind if other is not row]
    for kind in _KINDS
    for row in kind
    for word in row
}
for _one, _other in (pair.split("|") for pair in OPPOSITES):
    CHOICES.setdefault(_one, []).append(_other)
    CHOICES.setdefault(_other, []).append(_one)
_EITHER = "|".join(sorted(map(re.escape, CHOICES), key=lambda word: (-len(word), word)))
_WORDS = re.compile(rf"(?<![\w-])(?:{_EITHER})(?![\w-])", re.IGNORECASE)


def swap_attributes(
    caption: str,
    kept: Sequence[tuple[int, int]],
    random: Random,
) -> Iterator[str]:
    """Yield variants of the caption with one attribute replaced, in random order;
    `kept` spans stay unchanged.
    """
    places = [
        m
        for m in _WORDS.finditer(caption)
        if not any(m.start() < end and low < m.end() for low, end in kept)
    ]
    ways = [(match, new) for match in places for new in CHOICES[match[0].lower()]]
    random.shuffle(ways)
    for match, new in ways:
        if match[0].isupper():
            cased = new.upper()
        elif match[0][0].isupper():
            cased = upper_first(new)
        else:
            cased = new
        yield splice_phrase(caption, *match.span(), cased)
