"""Captions of emoji: one per emoji for the domains, many for training the base
model.
"""

import hashlib
import random
import re

TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
TONE_NAMES = {
    1: ("light skin", "light skinned", "light", "white", "pale"),
    2: ("medium light skin", "medium light", "light brown skin"),
    3: ("medium skin", "medium", "tan", "tanned", "olive skin"),
    4: ("medium dark skin", "medium dark", "brown skin", "brown"),
    5: ("dark skin", "dark skinned", "dark", "very dark skin", "black"),
}
GENDER_NAMES = {
    "man": ("man", "guy", "male", "boy"),
    "woman": ("woman", "lady", "female", "girl"),
    "person": ("person", "someone"),
}
TYPED_NEARBY = {
    "a": "qs",
    "b": "vn",
    "c": "xv",
    "d": "sf",
    "e": "wr",
    "f": "dg",
    "g": "fh",
    "h": "gj",
    "i": "uo",
    "j": "hk",
    "k": "jl",
    "l": "ko",
    "m": "n",
    "n": "bm",
    "o": "ip",
    "p": "o",
    "q": "wa",
    "r": "et",
    "s": "ad",
    "t": "ry",
    "u": "yi",
    "v": "cb",
    "w": "qe",
    "x": "zc",
    "y": "tu",
    "z": "xa",
}
TEMPLATES = (
    "{}",
    "{}",
    "{}",
    "{} emoji",
    "a picture of {}",
    "an emoji of {}",
    "a photo of a {}",
)


def plain_label(label: str) -> str:
    """Return an emoji label in plain English: "flag: Japan" -> "flag of Japan"."""
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    return label.replace("\u201c", "").replace("\u201d", "").replace(": ", ", ")


def tone_words(tones: list[int]) -> list[str]:
    """Return the names of skin tones, without repetitions."""
    return [f"{TONES[tone]} skin tone" for tone in dict.fromkeys(tones)]


def useful_tags(emoji: dict) -> list[str]:
    """Return the tags that add a word to the label."""
    label_words = set(plain_label(emoji["label"]).lower().replace(",", "").split())
    return [tag for tag in emoji["tags"] if tag.lower() not in label_words]


def domain_caption(emoji: dict) -> str:
    """Return an emoji's caption in a domain: its label, then up to four tags."""
    return ", ".join([plain_label(emoji["label"]), *useful_tags(emoji)[:4]])


def sample_caption(
    emoji: dict, rng: random.Random
) -> tuple[str, frozenset[str] | None]:
    """Draw a caption: the label, another name, label and tags, or tags alone.

    Returns:
        The caption, and for tags alone the `facts` that an emoji must have for the
        caption to be true of it; otherwise None.
    """
    label = plain_label(emoji["label"])
    tags = emoji["tags"]
    names = [
        name.replace("_", " ").replace("-", " ").lower() for name in emoji["names"]
    ]
    tones = tone_words(emoji["tones"])
    kind = rng.random()
    if kind < 0.15 and names:
        text = rng.choice(names)
        if tones and "tone" not in text:
            text += ", " + ", ".join(tones)
        return rng.choice(TEMPLATES).format(text), None
    if kind < 0.40 and tags:
        words = [*rng.sample(tags, min(len(tags), rng.choice((1, 1, 1, 2, 3)))), *tones]
        return rng.choice((", ", " ")).join(words), frozenset(
            word.lower() for word in words
        )
    if kind < 0.60 and tags:
        return (
            ", ".join([label, *rng.sample(tags, min(len(tags), rng.randint(1, 5)))]),
            None,
        )
    if tones and rng.random() < 0.3:  # "woman running dark skin"
        base = plain_label(emoji["base_label"])
        short = [tone.removesuffix(" tone") for tone in tones]
        label = rng.choice(
            (f"{base} {' '.join(short)}", f"{base} with {' and '.join(tones)}")
        )
    elif emoji["label"].startswith("flag: ") and rng.random() < 0.4:
        country = emoji["label"].removeprefix("flag: ")
        label = rng.choice((country, f"{country} flag", f"the flag of {country}"))
    return rng.choice(TEMPLATES).format(label), None


def short_caption(emoji: dict, rng: random.Random) -> tuple[str, frozenset[str]]:
    """Draw a short query: one tag or two, half of the time with skin tones. Also return
    the facts it requires.
    """
    if not emoji["tags"]:
        return plain_label(emoji["label"]), facts(emoji)
    words = rng.sample(emoji["tags"], min(len(emoji["tags"]), rng.choice((1, 1, 1, 2))))
    words += tone_words(emoji["tones"]) if rng.random() < 0.5 else []
    return rng.choice((", ", " ")).join(words), frozenset(
        word.lower() for word in words
    )


def spoken_caption(emoji: dict, rng: random.Random) -> str:
    """Draw a caption that names gender and skin tone as people do: "dark skinned lady
    running".
    """
    label = plain_label(emoji["base_label"])
    first = label.split(" ")[0].strip(",")
    if first in GENDER_NAMES and rng.random() < 0.6:
        label = label.replace(first, rng.choice(GENDER_NAMES[first]), 1)
    if not emoji["tones"]:
        return label
    tone = " and ".join(
        rng.choice(TONE_NAMES[tone]) for tone in dict.fromkeys(emoji["tones"])
    )
    return rng.choice(
        ("{1} {0}", "{0} {1}", "{0}, {1}", "{0} with {1}", "{1} {0} emoji")
    ).format(label, tone)


def with_typo(text: str, rng: random.Random) -> str:
    """Make one typing error in a word of at least four letters, if there is one; its
    first letter stays.
    """
    words = text.split(" ")
    places = [
        place for place, word in enumerate(words) if len(word) >= 4 and word.isalpha()
    ]
    if not places:
        return text
    place = rng.choice(places)
    word = words[place]
    at = rng.randrange(1, len(word))
    kind = rng.random()
    head = word[:at]
    letter = word[at]
    tail = word[at + 1 :]
    if kind < 0.25:
        word = head + tail
    elif kind < 0.50 and tail:
        word = head + tail[0] + letter + tail[1:]
    elif kind < 0.65:
        word = head + 2 * letter + tail
    elif kind < 0.92:
        vowel = letter in "aeiou" and kind >= 0.82
        word = (
            head
            + rng.choice("aeiou" if vowel else TYPED_NEARBY.get(letter, "e"))
            + tail
        )
    else:
        word = head + rng.choice("aeiounrst") + letter + tail
    words[place] = word
    return " ".join(words)


def facts(emoji: dict) -> frozenset[str]:
    """Return an emoji's tags, skin tones and label words, in lower case."""
    words = plain_label(emoji["label"]).lower().replace(",", "").split()
    return frozenset(
        [*words, *(tag.lower() for tag in emoji["tags"]), *tone_words(emoji["tones"])]
    )


def family(emoji: dict) -> str:
    """Return an emoji's label without gender and skin tone: "woman running" and "man
    running" are one family.
    """
    return re.sub(
        r"\b(man|woman|men|women|person|people|boy|girl)s?\b",
        "",
        emoji["base_label"],
    ).strip()


def split_of(base: str) -> str:
    """Return "train" (50 %), "val" (10 %) or "test" (40 %) by a hash of the base emoji.

    All skin tones of an emoji are in the same split.
    """
    slot = int(hashlib.sha256(base.encode()).hexdigest()[:8], 16) % 100
    return "train" if slot < 50 else "val" if slot < 60 else "test"
