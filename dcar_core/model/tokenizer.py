"""Tokenizers without PyTorch, on the library `tokenizers`.

- `TextTokenizer` gives the ids of open_clip's byte-pair tokenizer; tests compare them on difficult texts.
- CLIP's own vocabulary is read from open_clip's file without importing open_clip, which takes seconds.
"""

import gzip
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from dcar_core.model.text_cleaning import clean_text, lower
from dcar_core.util.arrays import TokenIds

_SPLIT = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # a version line, then more merges than CLIP uses
_CLIP_CONTEXT, _CLIP_VOCABULARY = 77, 49_408


class TextTokenizer:
    """Texts to token ids.

    limit: tokens of the longest text, SOS and EOT included.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        size = tokenizer.get_vocab_size()
        self._sos, self._eot = size - 2, size - 1  # open_clip appends them to the vocabulary

    @classmethod
    def from_open_clip(cls, simple: Any, limit: int) -> "TextTokenizer | None":
        """Convert open_clip's SimpleTokenizer; None for other tokenizers."""
        if type(simple).__name__ != "SimpleTokenizer" or simple.reduction_fn or simple.clean_fn("A  b") != "a b":
            return None
        ranked = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
        return cls(_byte_pair_tokenizer(simple.encoder, ranked), limit)

    @classmethod
    def for_clip(cls, limit: int = _CLIP_CONTEXT) -> "TextTokenizer":
        """Use the vocabulary that CLIP was trained with."""
        return cls(_clip_tokenizer(), limit)

    @classmethod
    def from_bytes(cls, content: bytes, limit: int) -> "TextTokenizer":
        """Load what `to_bytes` returned."""
        return cls(Tokenizer.from_buffer(content), limit)

    def to_bytes(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        """Return int64 (n, L): SOS, words, EOT, zeros; L of the longest text. Longer texts than the limit are cut."""
        ids = self.encode(texts)
        out = np.zeros((len(ids), max(map(len, ids), default=2)), np.int64)
        for row, text_ids in zip(out, ids, strict=True):
            row[: len(text_ids)] = text_ids
        return out

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text without padding."""
        # One at a time: a text takes microseconds, and the library's threads would compete with the model's.
        return [
            [self._sos, *self._tokenizer.encode(text, add_special_tokens=False).ids[: self._limit - 2], self._eot]
            for text in (lower(clean_text(each)) for each in texts)
        ]


def clip_token_ids(texts: Sequence[str], prompt_tokens: int = 0) -> list[list[int]]:
    """Tokenize with CLIP's own vocabulary and context of 77, SOS and EOT included; needs no model.

    prompt_tokens: positions of the context that prompts take.
    """
    return TextTokenizer.for_clip(_CLIP_CONTEXT - prompt_tokens).encode(texts)


def count_clip_tokens(texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text in CLIP's own vocabulary, SOS and EOT included, without a limit."""
    return [len(ids) for ids in TextTokenizer.for_clip(sys.maxsize).encode(texts)]


def _byte_pair_tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    model = models.BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix=_WORD_END)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@cache
def _clip_tokenizer() -> Tokenizer:
    """Build CLIP's vocabulary: a sign for each byte, the same at a word's end, the merges, SOS and EOT."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).with_name(_VOCABULARY_FILE), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    signs = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges = [(first, second) for first, second in map(str.split, lines[: _CLIP_VOCABULARY - 2 - 2 * len(signs)])]
    words = [*signs, *(sign + _WORD_END for sign in signs), *map("".join, merges), "<start_of_text>", "<end_of_text>"]
    return _byte_pair_tokenizer({word: number for number, word in enumerate(words)}, merges)
