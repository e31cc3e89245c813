"""Tokenizers without PyTorch, on the library `tokenizers`, and where a tokenized text
begins and ends.

- One class for every vocabulary: byte pairs, SentencePiece and WordPiece differ in
  their files alone.
- Ids are those of open_clip's own tokenizers, save that no text can place a control
  token.
- CLIP's vocabulary lies beside this module, so that no search needs open_clip.
- A tokenizer of the Hugging Face kind is read from its `tokenizer.json`; code that it
  brings along is never loaded.
"""

import gzip
import hashlib
import html
import json
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from dcar_core.util.arrays import TokenIds
from dcar_core.util.errors import ModelError
from dcar_core.util.hub import fetch

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_SPLIT = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
_START = "<start_of_text>"
_END = "<end_of_text>"
# a version line, then more merges than used
CLIP_VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
# sha256 of it, unpacked
_CLIP_DIGEST = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"
_COMMON_WORDS = 12_000  # of the words of CLIP's vocabulary; later ones are rare names
_CLIP_CONTEXT = 77
_CLIP_VOCABULARY = 49_408
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

# By the names of open_clip's `tokenizer_kwargs.clean`.
NORMALIZERS: dict[str, Callable[[str], str]] = {
    "lower": lambda text: _collapse_spaces(text).lower(),
    "whitespace": lambda text: _collapse_spaces(text),
    # as SigLIP was trained
    "canonicalize": lambda text: _collapse_spaces(
        text.replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower()
    ),
}


@dataclass(frozen=True)
class TextLayout:
    """One tokenized text: start tokens, caption, end token, padding.

    Every method takes NumPy arrays and PyTorch tensors alike, so that runtimes without
    PyTorch follow the same rule. A text ends at its first end token: the largest id
    marks the end in CLIP's vocabulary alone.

    context_length: L, the most positions, prompts included. start_ids: tokens before
    the caption; prompts follow them. reads_padding: the tower attends to padding or
    reads the last row, so it needs texts of the whole context.
    """

    context_length: int
    start_ids: tuple[int, ...]
    end_id: int
    pad_id: int
    reads_padding: bool = False

    @property
    def start(self) -> int:
        """Position of the first prompt or caption token."""
        return len(self.start_ids)

    def lengths(self, tokens: Any) -> Any:
        """(B, n) -> (B,): tokens up to the end token, which is included."""
        before_end = (tokens == self.end_id).cumsum(-1) == 0
        return (before_end.sum(-1) + 1).clip(max=tokens.shape[-1])

    def caption_mask(self, tokens: Any) -> Any:
        """(B, n) -> bool (B, n): the caption's own tokens, without start, end and
        padding.
        """
        before_end = (tokens == self.end_id).cumsum(-1) == 0
        position = (tokens == tokens).cumsum(-1) - 1
        return before_end & (position >= self.start)

    def padded_length(self, prompt_tokens: int) -> int | None:
        """Length that texts must have beside this many prompts; None where they may be
        trimmed.
        """
        return self.context_length - prompt_tokens if self.reads_padding else None


@dataclass(frozen=True)
class TextTokenizer:
    """Texts to token ids.

    limit: tokens of the longest text, start and end tokens included.
    normalizer: a name of `NORMALIZERS`.
    special_ids: control tokens that no text may contain.
    """

    tokenizer: Tokenizer
    limit: int
    normalizer: str
    start_ids: tuple[int, ...]
    end_id: int
    pad_id: int = 0
    special_ids: frozenset[int] = frozenset()

    @staticmethod
    @cache
    def for_clip() -> "TextTokenizer":
        """Use the vocabulary and the context that CLIP was trained with."""
        return load_byte_pairs(CLIP_VOCABULARY)

    @property
    def layout(self) -> TextLayout:
        return TextLayout(self.limit, self.start_ids, self.end_id, self.pad_id)

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        """Return int64 (n, m): start, words, end, padding; m of the longest text. Texts
        over the limit are cut.
        """
        ids = self.encode(texts)
        out = np.full(
            (len(ids), max(map(len, ids), default=len(self.start_ids) + 1)),
            self.pad_id,
            np.int64,
        )
        for row, text_ids in zip(out, ids, strict=True):
            row[: len(text_ids)] = text_ids
        return out

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text without padding."""
        most = self.limit - len(self.start_ids) - 1
        return [
            [*self.start_ids, *self.caption_ids(text)[:most], self.end_id]
            for text in texts
        ]

    def caption_ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, without start and end and however many there
        are.
        """
        normal = NORMALIZERS[self.normalizer](clean_text(text))
        # One at a time: a text takes microseconds, and the library's threads would
        # compete with the model's.
        ids: list[int] = self.tokenizer.encode(normal, add_special_tokens=False).ids
        if self.special_ids:
            return [token for token in ids if token not in self.special_ids]
        return ids

    def exceeds_limit(self, text: str) -> bool:
        """True if a text would be cut."""
        return len(self.start_ids) + len(self.caption_ids(text)) + 1 > self.limit


def clean_text(text: str) -> str:
    """Repair the encoding of a text and resolve its HTML entities, as open_clip
    does.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    # whose expressions take a service longer to compile than all other texts to clean
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _collapse_spaces(text: str) -> str:
    return " ".join(text.split())


def count_clip_tokens(texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text in CLIP's own vocabulary, SOS and EOT included,
    without a limit.
    """
    return [
        len(ids)
        for ids in replace(TextTokenizer.for_clip(), limit=sys.maxsize).encode(texts)
    ]


def common_words(count: int) -> list[str]:
    """Return English words of CLIP's vocabulary, at even distances from its most
    frequent ones to rare ones.
    """
    return _words()[:: max(1, _COMMON_WORDS // count)][:count]


@cache
def _words() -> list[str]:
    pieces, _ = _read_byte_pairs(CLIP_VOCABULARY)
    words = (
        piece.removesuffix(_WORD_END) for piece in pieces if piece.endswith(_WORD_END)
    )
    return [
        word
        for word in words
        if 4 <= len(word) <= 12 and word.isascii() and word.isalpha()
    ][:_COMMON_WORDS]


def load_tokenizer(
    config: Mapping[str, Any], directory: Path | None
) -> tuple[TextTokenizer, str]:
    """Load the tokenizer of a checked configuration, with its identity for the content
    hash.
    """
    text = config["text_cfg"]
    settings = text.get("tokenizer_kwargs") or {}
    limit = int(text.get("context_length", 77))
    if name := text.get("hf_tokenizer_name"):
        normalizer = settings.get("clean", "whitespace")
        strip_end = bool(settings.get("strip_sep_token"))
        file = _find(name, directory, TOKENIZER)
        settings_file = _find(name, directory, SETTINGS)
        if file is None:
            raise ModelError(
                f"{directory or name} has no {TOKENIZER}, and no other tokenizer is"
                " supported"
            )
        tokenizer = load_hub_tokenizer(
            file,
            settings_file,
            limit,
            normalizer=normalizer,
            strip_end=strip_end,
        )
        decisive = normalizer, tokenizer.start_ids, tokenizer.end_id, tokenizer.pad_id
        return tokenizer, f"{hashlib.sha256(file.read_bytes()).hexdigest()} {decisive}"
    normalizer = settings.get("clean", "lower")
    own = settings.get("bpe_path")
    file = directory / own if own and directory is not None else CLIP_VOCABULARY
    tokenizer = replace(
        load_byte_pairs(file) if own else TextTokenizer.for_clip(),
        limit=limit,
        normalizer=normalizer,
    )
    if own:
        digest = hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest()
    else:
        digest = _CLIP_DIGEST
    return tokenizer, f"{digest} {normalizer}"


def _find(repository: str, directory: Path | None, name: str) -> Path | None:
    if directory is None:
        return fetch(repository, name)
    return directory / name if (directory / name).is_file() else None


def load_byte_pairs(file: Path) -> TextTokenizer:
    """Load a vocabulary of CLIP's kind: gzipped merges, one per line."""
    pieces, merges = _read_byte_pairs(file)
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, end_of_word_suffix=_WORD_END)
    )
    split = pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    return TextTokenizer(tokenizer, _CLIP_CONTEXT, "lower", (ids[_START],), ids[_END])


def _read_byte_pairs(file: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pieces in the order of their ids, and the merges.

    The pieces are one character per byte, the same with the suffix of a word's end, the
    merges, SOS and EOT.
    """
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1:]
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    signs = [chr(byte) for byte in plain] + [
        chr(256 + i) for i in range(256 - len(plain))
    ]
    # the last may be empty
    pairs = [line.split() for line in lines[: _CLIP_VOCABULARY - 2 - 2 * len(signs)]]
    pieces = [
        *signs,
        *(sign + _WORD_END for sign in signs),
        *map("".join, pairs),
        _START,
        _END,
    ]
    return pieces, [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def load_hub_tokenizer(
    file: Path,
    settings_file: Path | None,
    limit: int,
    *,
    normalizer: str = "whitespace",
    strip_end: bool = False,
) -> TextTokenizer:
    """Load a tokenizer of the Hugging Face kind from its `tokenizer.json` and, if there
    is one, its settings.

    strip_end: the model was trained with 0 in place of the end token (CLIPA).
    Raise ModelError if it surrounds texts in a way that is not supported.
    """
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if settings_file is not None:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
    else:
        settings = {}
    start, end = _ends(tokenizer)
    # a text, or an object with it
    tokens = {kind: settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    ids = {
        kind: (
            tokenizer.token_to_id(
                token["content"] if isinstance(token, dict) else token
            )
            if token
            else None
        )
        for kind, token in tokens.items()
    }
    # Settings beside the file overrule its template, as transformers has it for Gemma's
    # tokenizer.
    if settings.get("add_eos_token") and not end and ids["eos"] is not None:
        end = [ids["eos"]]
    if settings.get("add_bos_token") is False and start == [ids["bos"]]:
        start = []
    if len(end) != 1:
        raise ModelError(
            f"a tokenizer whose texts end with {len(end)} control tokens is not"
            " supported"
        )
    pads = (ids["pad"], *map(tokenizer.token_to_id, ("<pad>", "[PAD]")), 0)
    pad = next(token for token in pads if token is not None)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = {model.get("unk_id"), tokenizer.token_to_id(model.get("unk_token") or "")}
    special = {
        number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    special_ids = frozenset((special - unknown) | {*start, *end})
    return TextTokenizer(
        tokenizer,
        limit,
        normalizer,
        tuple(start),
        0 if strip_end else end[0],
        pad,
        special_ids,
    )


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens that a text gets in front and behind."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ModelError(
        "the tokenizer adds control tokens within a text, which is not supported"
    )
