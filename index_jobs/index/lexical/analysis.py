"""Analysis of text into the terms of the lexical index; the same for items and for queries.

- Case, width and accents are folded: "Éclair" and "eclair" are one term. So are Arabic and Hebrew words with and
  without their vowel points. The vowel signs of other scripts are part of the word.
- A code gives its parts and the whole: "WX-300", "WX 300" and "wx300" share terms.
- Chinese, Japanese and Korean text gives characters and pairs of neighbours, since it has no spaces.
- English plurals lose their ending by Harman's three rules, which also leave codes and other languages readable.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

_ACCENTS = re.compile(
    "[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u0652\u0670]"  # Latin, Hebrew, Arabic
)
_MARKS = "".join(  # those above U+FDFF choose the form of an emoji, or are of scripts that are rare
    mark for mark in map(chr, range(0x370, 0xFE00)) if unicodedata.category(mark) in {"Mn", "Mc"}
)
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CJK_START = re.compile(f"[{_CJK}]")
_WORD = rf"[^\W_{_CJK}]+(?:[{_MARKS}][^\W_{_CJK}]*)*"
_CHUNK = re.compile(rf"[{_CJK}]+|{_WORD}(?:[-./_]{_WORD})*")
_PART = re.compile(rf"[^\W\d_]+(?:[{_MARKS}][^\W\d_]*)*|\d+")
_STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it",
    "of", "on", "or", "that", "the", "to", "with",
})  # fmt: skip
_BLOCK = re.compile(r".{1,256}(?!\S)|.{1,256}", re.DOTALL)  # ends with a word if it can
_MAX_TERM = 64  # characters
_MAX_QUERY_TERMS = 64


def index_terms(text: str) -> list[str]:
    """Return the terms of an item's text, in order, with repetitions."""
    return [term for parts, code in _chunks(text) for term in (*parts, *code)]


def _chunks(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the terms of the parts of each chunk, and that of the whole if it is a code."""
    for match in _CHUNK.finditer("".join(map(_fold, _BLOCK.findall(text)))):
        chunk = match.group()
        if _CJK_START.match(chunk):
            yield [*chunk, *(chunk[i : i + 2] for i in range(len(chunk) - 1))], []
            continue
        parts = _PART.findall(chunk)
        is_code = len(parts) > 1 and any(part.isdecimal() for part in parts)
        yield [_singular(part)[:_MAX_TERM] for part in parts], ["".join(parts)[:_MAX_TERM]] if is_code else []


def _fold(block: str) -> str:
    """Fold case, width and accents, in a time that grows with the square of the marks after one letter."""
    folded = unicodedata.normalize("NFKC", block).casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", folded)))
    return folded


def query_terms(text: str, is_known: Callable[[str], bool]) -> list[str]:
    """Return the distinct terms of a query, without stop words unless it has no others.

    A code that no item has in one piece is left out if items have its parts: the file IMG_0010.jpg is not "img0010".
    """
    terms = dict[str, None]()
    for parts, code in _chunks(text):
        terms |= dict.fromkeys(parts)
        if any(map(is_known, code)) or not all(map(is_known, parts)):
            terms |= dict.fromkeys(code)
    return ([term for term in terms if term not in _STOP_WORDS] or list(terms))[:_MAX_QUERY_TERMS]


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s"):
        return word
    if word.endswith("ies") and word[-4] not in "ae":
        return word[:-3] + "y"
    if word.endswith(("xes", "zes", "ches", "shes", "sses")):
        return word[:-2]
    if word.endswith("es") and word[-3] not in "aeo":
        return word[:-1]
    return word if word.endswith(("us", "ss", "es")) else word[:-1]
