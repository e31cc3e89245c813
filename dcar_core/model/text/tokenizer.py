"""Tokenizers without PyTorch, on the library `tokenizers`.

- One class for every vocabulary: byte pairs, SentencePiece and WordPiece differ in their files alone.
- Ids are those of open_clip's own tokenizers; tests compare them on difficult texts.
- No text can place a control token: CLIP's are stripped by their spelling, those of other vocabularies by their ids.
- CLIP's vocabulary is read from open_clip's file without importing open_clip, which takes seconds.
- A tokenizer of the Hugging Face kind is read from its files; transformers is needed only where a model has no
  `tokenizer.json`. Code that a tokenizer brings along is never loaded.
"""

import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from dcar_core.model.hub import fetch
from dcar_core.model.text.cleaning import NORMALIZERS, clean_text
from dcar_core.util.arrays import TokenIds
from dcar_core.util.errors import MissingExtraError, ModelError, is_panic

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPLIT = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END, _START, _END = "</w>", "<start_of_text>", "<end_of_text>"
_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # a version line, then more merges than CLIP uses
LONGEST_VOCABULARY = 1 << 24  # characters; CLIP's has 3 million, and a gzip bomb would fill the memory
_COMMON_WORDS = 12_000  # of the words of CLIP's vocabulary; later ones are rare names
_CLIP_CONTEXT, _CLIP_VOCABULARY = 77, 49_408


@dataclass(frozen=True)
class TextLayout:
    """One tokenized text: start tokens, caption, end token, padding.

    Every method takes NumPy arrays and PyTorch tensors alike, so that runtimes without PyTorch follow the same rule. A
    text ends at its first end token: the largest id marks the end in CLIP's vocabulary alone.

    context_length: L, the most positions, prompts included.
    start_ids: tokens before the caption; prompts follow them.
    reads_padding: the tower attends to padding or reads the last row, so it needs texts of the whole context.
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
        """(B, n) -> bool (B, n): the caption's own tokens, without start, end and padding."""
        before_end = (tokens == self.end_id).cumsum(-1) == 0
        position = (tokens == tokens).cumsum(-1) - 1
        return before_end & (position >= self.start)

    def padded_length(self, prompt_tokens: int) -> int | None:
        """Length that texts must have beside this many prompts; None where they may be trimmed."""
        return self.context_length - prompt_tokens if self.reads_padding else None


@dataclass(frozen=True)
class TextTokenizer:
    """Texts to token ids.

    limit: tokens of the longest text, start and end tokens included.
    normalizer: a name of `cleaning.NORMALIZERS`.
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
        return load_byte_pairs(clip_vocabulary())

    def with_limit(self, limit: int) -> "TextTokenizer":
        return replace(self, limit=limit)

    @property
    def layout(self) -> TextLayout:
        return TextLayout(self.limit, self.start_ids, self.end_id, self.pad_id)

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        """Return int64 (n, L): start, words, end, padding; L of the longest text. Texts over the limit are cut."""
        ids = self.encode(texts)
        out = np.full((len(ids), max(map(len, ids), default=len(self.start_ids) + 1)), self.pad_id, np.int64)
        for row, text_ids in zip(out, ids, strict=True):
            row[: len(text_ids)] = text_ids
        return out

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text without padding."""
        most = self.limit - len(self.start_ids) - 1
        return [[*self.start_ids, *self.caption_ids(text)[:most], self.end_id] for text in texts]

    def caption_ids(self, text: str) -> list[int]:
        """Return the ids of a text alone, without start and end and however many there are."""
        normal = NORMALIZERS[self.normalizer](clean_text(text))
        try:  # one at a time: a text takes microseconds, and the library's threads would compete with the model's
            ids: list[int] = self.tokenizer.encode(normal, add_special_tokens=False).ids
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ModelError(f"the model's tokenizer fails on a text: {error}") from error
        return [each for each in ids if each not in self.special_ids] if self.special_ids else ids

    def exceeds_limit(self, text: str) -> bool:
        """True if a text would be cut."""
        return len(self.start_ids) + len(self.caption_ids(text)) + 1 > self.limit

    def identity(self) -> str:
        """sha256 over the vocabulary and whatever else decides on ids."""
        content = json.loads(self.tokenizer.to_str())
        model = content["model"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.pop("merges", [])]
        pieces = model.pop("vocab")
        scores = [score for _, score in pieces] if isinstance(pieces, list) else None
        described = [
            sorted(self.tokenizer.get_vocab().items()), merges, scores, _set_values(model),
            [_set_values(token) for token in content["added_tokens"]], content["normalizer"], content["pre_tokenizer"],
            self.normalizer, list(self.start_ids), self.end_id, self.pad_id, sorted(self.special_ids),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _set_values(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Leave out switches that are off, so that a new one in a later library version changes no identity."""
    return sorted((name, value) for name, value in settings.items() if value not in (None, "") and value is not False)


def count_clip_tokens(texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text in CLIP's own vocabulary, SOS and EOT included, without a limit."""
    return [len(ids) for ids in TextTokenizer.for_clip().with_limit(sys.maxsize).encode(texts)]


def common_words(count: int) -> list[str]:
    """Return English words of CLIP's vocabulary, at even distances from its most frequent ones to rare ones."""
    vocabulary, _ = _read_byte_pairs(clip_vocabulary())
    words = (token.removesuffix(_WORD_END) for token in vocabulary if token.endswith(_WORD_END))
    found = [word for word in words if 4 <= len(word) <= 12 and word.isascii() and word.isalpha()]
    return found[: _COMMON_WORDS : max(1, _COMMON_WORDS // count)][:count]


def clip_vocabulary() -> Path:
    """The file of CLIP's own byte pairs, in open_clip."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name(_VOCABULARY_FILE)


def load_byte_pairs(file: Path) -> TextTokenizer:
    """Load a vocabulary of CLIP's kind: gzipped merges, one per line."""
    ids, ranks = _read_byte_pairs(file)
    merges = [(merge[0], merge[1]) for merge in sorted(ranks, key=ranks.__getitem__) if len(merge) == 2]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix=_WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return TextTokenizer(tokenizer, _CLIP_CONTEXT, "lower", (ids[_START],), ids[_END])


def read_vocabulary(file: Path) -> str:
    """Unpack a vocabulary of CLIP's kind. Raise ModelError if it is too long."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        text = opened.read(LONGEST_VOCABULARY + 1)
    if len(text) > LONGEST_VOCABULARY:
        raise ModelError(f"{file} unpacks to more than {LONGEST_VOCABULARY:,} characters")
    return text


def _read_byte_pairs(file: Path) -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    """Return the ids of the pieces, and the ranks of the merges.

    The pieces are one character per byte, the same with the suffix of a word's end, the merges, SOS and EOT.
    """
    lines = read_vocabulary(file).split("\n")[1:]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    signs = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges = [tuple(line.split()) for line in lines[: _CLIP_VOCABULARY - 2 - 2 * len(signs)]]  # the last may be empty
    pieces = [*signs, *(sign + _WORD_END for sign in signs), *map("".join, merges), _START, _END]
    return {piece: i for i, piece in enumerate(pieces)}, {merge: i for i, merge in enumerate(merges)}


def load_hub_tokenizer(
    name: str, directory: Path | None, limit: int, *, normalizer: str = "whitespace", strip_end: bool = False
) -> TextTokenizer:
    """Load the tokenizer of a model.

    Args:
        name: its repository on the hub, for a model without a directory.
        directory: of a local model, which holds the tokenizer's files.
        strip_end: the model was trained with 0 in place of the end token (CLIPA).

    Raises:
        ModelError: its files are missing, cannot be fetched or are of an unknown kind.
        MissingExtraError: it has no tokenizer.json, and transformers is not installed.
    """
    file = _find(name, directory, TOKENIZER)
    if file is None and directory is not None and not any([*directory.glob("*.model"), *directory.glob("vocab*")]):
        raise ModelError(f"{directory} has no {TOKENIZER}; copy it from {name} on the hub")
    if file is None:
        tokenizer, start, end, pad = _by_transformers(str(directory or name))
    else:
        tokenizer, start, end, pad = _from_files(file, _find(name, directory, SETTINGS))
    if len(end) != 1:
        raise ModelError(f"a tokenizer whose texts end with {len(end)} control tokens is not supported")
    model = json.loads(tokenizer.to_str())["model"]
    unknown = {model.get("unk_id"), tokenizer.token_to_id(model.get("unk_token") or "")}
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special = (special - unknown) | {*start, *end}
    return TextTokenizer(
        tokenizer, limit, normalizer, tuple(start), 0 if strip_end else end[0], pad or 0, frozenset(special)
    )


def copy_from_hub(name: str, directory: Path, files: Sequence[str] = (TOKENIZER, SETTINGS)) -> None:
    """Copy the files that a repository on the hub has into a directory, by default those of its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        if (found := _find(name, None, file)) is not None:
            shutil.copyfile(found, directory / file)


def _find(name: str, directory: Path | None, file: str) -> Path | None:
    if directory is not None:
        return directory / file if (directory / file).is_file() else None
    return fetch(name, file)


def _from_files(file: Path, settings_file: Path | None) -> tuple[Tokenizer, list[int], list[int], int | None]:
    """Return the tokenizer, the control tokens in front of a text and behind it, and the padding."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file is not None else {}
    if settings.get("padding_side", "right") != "right":
        raise ModelError("a tokenizer that pads on the left is not supported")
    start, end = _ends(tokenizer)
    tokens = {kind: settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}  # a text, or an object with it
    ids = {
        kind: tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        for kind, token in tokens.items()
    }
    # Settings beside the file overrule its template, as transformers has it for Gemma's tokenizer.
    if settings.get("add_eos_token") and not end and ids["eos"] is not None:
        end = [ids["eos"]]
    if settings.get("add_bos_token") is False and start == [ids["bos"]]:
        start = []
    pads = (ids["pad"], *map(tokenizer.token_to_id, ("<pad>", "[PAD]")))
    return tokenizer, start, end, next((pad for pad in pads if pad is not None), None)


def _by_transformers(source: str) -> tuple[Tokenizer, list[int], list[int], int | None]:
    """Return the same of a tokenizer that transformers converts."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError(f"the tokenizer of {source}, which has no {TOKENIZER},", "hf") from None
    loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"the tokenizer of {source} has no fast form and is not supported")
    return (tokenizer, *_ends(tokenizer), loaded.pad_token_id)


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens that a text gets in front and behind."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ModelError("the tokenizer adds control tokens within a text, which is not supported")
