"""CLIP's byte-pair tokens without PyTorch: the vocabulary of open_clip's tokenizer in the library `tokenizers`.

- The numbers are those that `Backbone.tokenize` gives (tested on whatever text is hard for a tokenizer).
- CLIP's own vocabulary comes from the file that open_clip carries, without importing open_clip, which takes seconds.
- A text never contains a control token, however it is spelt: `clean` comes before either tokenizer.
"""

import gzip
import html
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# What a tokenizer would read as SOS or EOT; a marker in the middle would move the pooling position.
_MARKERS = re.compile(r"<\s*/?\s*(start|end)_of_text\s*>", re.IGNORECASE)
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # a line of version, then merges, more than CLIP takes
_CONTEXT, _SIZE = 77, 49_408


def clean(text: str) -> str:
    """Mended encoding, no HTML entities, no control tokens; what both tokenizers are given."""
    if not text.isascii() or not text.isprintable() or "&" in text:  # else nothing of this would change it
        text = ftfy.fix_text(text)
        while (plain := html.unescape(text)) != text:
            text = plain
    return _MARKERS.sub(" ", text)


class TextTokenizer:
    """Texts to numbers. Build it from open_clip's tokenizer, or from what `dump` gave.

    limit: tokens of the longest text, with SOS and EOT.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        size = tokenizer.get_vocab_size()
        self._sos, self._eot = size - 2, size - 1  # as open_clip appends them

    @classmethod
    def from_open_clip(cls, simple: Any, limit: int) -> "TextTokenizer | None":
        """The same as open_clip's SimpleTokenizer; None for tokenizers of other kinds."""
        if type(simple).__name__ != "SimpleTokenizer" or simple.reduction_fn or simple.clean_fn("A  b") != "a b":
            return None
        ranked = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
        return cls(_tokenizer(simple.encoder, ranked), limit)

    @classmethod
    def for_clip(cls, limit: int = _CONTEXT) -> "TextTokenizer":
        """Of the vocabulary that CLIP was trained with."""
        return cls(_clip_tokenizer(), limit)

    @classmethod
    def from_bytes(cls, content: bytes, limit: int) -> "TextTokenizer":
        """From what `dump` gave."""
        return cls(Tokenizer.from_buffer(content), limit)

    def to_bytes(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """int64 (n, L): SOS, words, EOT, zeros; L of the longest text. What exceeds the limit is cut."""
        found = self.rows(texts)
        out = np.zeros((len(found), max(map(len, found), default=2)), np.int64)
        for row, ids in zip(out, found, strict=True):
            row[: len(ids)] = ids
        return out

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The same without zeros, each text as long as it is."""
        plain = (" ".join(clean(text).split()).lower() for text in texts)
        # One after the other: a few microseconds each, and threads of its own would meet those of the model.
        found = (self._tokenizer.encode(each, add_special_tokens=False).ids for each in plain)
        return [[self._sos, *ids[: self._limit - 2], self._eot] for ids in found]


def clip_token_ids(texts: Sequence[str], prompt_tokens: int = 0) -> list[list[int]]:
    """What CLIP's own vocabulary and context of 77 leave of each text, SOS and EOT included; needs no model.

    prompt_tokens: positions of the context that prompts will take.
    """
    return TextTokenizer.for_clip(_CONTEXT - prompt_tokens).rows(texts)


def count_clip_tokens(texts: Sequence[str]) -> list[int]:
    """How many tokens CLIP's own vocabulary makes of each text, SOS and EOT included, however many there are."""
    return [len(row) for row in TextTokenizer.for_clip(sys.maxsize).rows(texts)]


def _tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    model = models.BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix=_WORD_END)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@cache
def _clip_tokenizer() -> Tokenizer:
    """Numbers as CLIP gives them: a sign for each byte, the same at a word's end, the merges, SOS and EOT."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).with_name(_VOCABULARY), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    signs = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges = [(first, second) for first, second in map(str.split, lines[: _SIZE - 2 - 2 * len(signs)])]
    words = [*signs, *(sign + _WORD_END for sign in signs), *map("".join, merges), "<start_of_text>", "<end_of_text>"]
    return _tokenizer({word: number for number, word in enumerate(words)}, merges)
