"""Cleaning of user text before tokenization: encoding, HTML entities, control tokens, case.

- Every tokenizer and the service's query form use `strip_control_tokens`, so no text can place SOS or EOT.
- `fix_encoding` takes linear time, also for entities nested thousands of times.
"""

import html
import re
import string
from collections.abc import Callable

# Spellings that a CLIP tokenizer reads as SOS or EOT, or that look the same to a reader.
_CLIP_CONTROL = re.compile(  # possessive: with backtracking, 1,000 spaces would take half a minute
    r"<\s*+/?\s*+\|?\s*+(?:start_?of_?text|end_?of_?text)\s*+\|?\s*+>", re.IGNORECASE
)
# An ampersand that was escaped again and again, in any spelling that `html.unescape` resolves.
_NESTED_AMPERSAND = re.compile(r"&(?:amp;?|AMP;?|#0*38(?:;|(?!\d))|#[xX]0*26(?:;|(?![0-9a-fA-F])))+")
_UNESCAPE_PASSES = 8
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def strip_control_tokens(text: str) -> str:
    """Replace CLIP's control tokens, in any spelling, by a space."""
    return _CLIP_CONTROL.sub(" ", text)


def fix_encoding(text: str) -> str:
    """Repair the encoding and resolve HTML entities, nested ones too."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy  # whose expressions take a service longer to compile than all other texts to clean

    text = ftfy.fix_text(_NESTED_AMPERSAND.sub("&", text))
    for _ in range(_UNESCAPE_PASSES):
        plain = html.unescape(_NESTED_AMPERSAND.sub("&", text))
        if plain == text:
            return text
        text = plain
    return text.replace("&", " ")


def clean_text(text: str) -> str:
    """Fix the encoding of a text and strip its control tokens; the input of every tokenizer."""
    return strip_control_tokens(fix_encoding(text))


def collapse_spaces(text: str) -> str:
    return " ".join(text.split())


# By the names of open_clip's `tokenizer_kwargs.clean`.
NORMALIZERS: dict[str, Callable[[str], str]] = {
    "lower": lambda text: collapse_spaces(text).lower(),
    "whitespace": collapse_spaces,
    # as SigLIP was trained
    "canonicalize": lambda text: collapse_spaces(text.replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower()),
}
