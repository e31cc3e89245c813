"""CLIP's byte-pair tokens without PyTorch: the vocabulary of open_clip's tokenizer in the library `tokenizers`.

- The numbers are those that `Backbone.tokenize` gives (tested on whatever text is hard for a tokenizer).
- A text never contains a control token, however it is spelt: `clean` comes before either tokenizer.
"""

import html
import re
from collections.abc import Sequence
from typing import Any

import ftfy
import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# What a tokenizer would read as SOS or EOT; a marker in the middle would move the pooling position.
_MARKERS = re.compile(r"<\s*/?\s*(start|end)_of_text\s*>", re.IGNORECASE)
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"


def clean(text: str) -> str:
    """Mended encoding, no HTML entities, no control tokens; what both tokenizers are given."""
    if not text.isascii() or not text.isprintable() or "&" in text:  # else nothing of this would change it
        text = ftfy.fix_text(text)
        while (plain := html.unescape(text)) != text:
            text = plain
    return _MARKERS.sub(" ", text)


class Tokens:
    """Texts to numbers. Build it from open_clip's tokenizer, or from what `dump` gave.

    limit: tokens of the longest text, with SOS and EOT.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        size = tokenizer.get_vocab_size()
        self._sos, self._eot = size - 2, size - 1  # as open_clip appends them

    @classmethod
    def of(cls, simple: Any, limit: int) -> "Tokens | None":
        """The same as open_clip's SimpleTokenizer; None for tokenizers of other kinds."""
        if type(simple).__name__ != "SimpleTokenizer" or simple.reduction_fn or simple.clean_fn("A  b") != "a b":
            return None
        ranked = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
        model = models.BPE(vocab=dict(simple.encoder), merges=ranked, end_of_word_suffix=_WORD_END)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return cls(tokenizer, limit)

    @classmethod
    def load(cls, content: bytes, limit: int) -> "Tokens":
        """From what `dump` gave."""
        return cls(Tokenizer.from_buffer(content), limit)

    def dump(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """int64 (n, L): SOS, words, EOT, zeros; L of the longest text. What exceeds the limit is cut."""
        plain = (" ".join(clean(text).split()).lower() for text in texts)
        # One after the other: a few microseconds each, and threads of its own would meet those of the model.
        found = [self._tokenizer.encode(each, add_special_tokens=False).ids[: self._limit - 2] for each in plain]
        out = np.zeros((len(found), max(map(len, found), default=0) + 2), np.int64)
        for row, ids in zip(out, found, strict=True):
            row[: len(ids) + 2] = [self._sos, *ids, self._eot]
        return out
