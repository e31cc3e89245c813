"""Tokenizers of the Hugging Face kind, from `tokenizer.json` and its settings beside it.

- The file is read by the library `tokenizers`; transformers is needed only where a model has no such file.
- Nothing of a model's directory is executed: code that a tokenizer brings along is never loaded.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dcar_core.model.text.tokenizer import TextTokenizer
from dcar_core.util.errors import MissingExtraError, ModelError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


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
    if file is not None:
        settings_file = _find(name, directory, SETTINGS)
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file is not None else {}
        return _from_file(Tokenizer.from_file(str(file)), settings, limit, normalizer, strip_end)
    if directory is not None and not any(directory.glob("*.model")) and not any(directory.glob("vocab*")):
        raise ModelError(f"{directory} has no {TOKENIZER}; copy it from {name} on the hub")
    return _from_transformers(str(directory or name), limit, normalizer, strip_end)


def _find(name: str, directory: Path | None, file: str) -> Path | None:
    if directory is not None:
        return directory / file if (directory / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError:  # the hub is out of reach
        raise
    except EntryNotFoundError:
        return None


def _from_file(
    tokenizer: Tokenizer, settings: dict[str, Any], limit: int, normalizer: str, strip_end: bool
) -> TextTokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    start, end = _ends(tokenizer)
    tokens = {kind: _token(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "pad")}
    found = {kind: tokenizer.token_to_id(token) for kind, token in tokens.items() if token is not None}
    ids = {kind: number for kind, number in found.items() if number is not None}
    # Settings beside the file overrule its template, as transformers has it for Gemma's tokenizer.
    if settings.get("add_eos_token") and not end and "eos" in ids:
        end = [ids["eos"]]
    if settings.get("add_bos_token") is False and start == [ids.get("bos")]:
        start = []
    if len(end) != 1:
        raise ModelError(f"a tokenizer whose texts end with {len(end)} control tokens is not supported")
    if settings.get("padding_side", "right") != "right":
        raise ModelError("a tokenizer that pads on the left is not supported")
    return _built(tokenizer, start, end[0], ids.get("pad"), limit, normalizer, strip_end)


def _from_transformers(source: str, limit: int, normalizer: str, strip_end: bool) -> TextTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError(f"the tokenizer of {source}, which has no {TOKENIZER},", "hf") from None
    loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"the tokenizer of {source} has no fast form and is not supported")
    start, end = _ends(tokenizer)
    if len(end) != 1:
        raise ModelError(f"a tokenizer whose texts end with {len(end)} control tokens is not supported")
    return _built(tokenizer, start, end[0], loaded.pad_token_id, limit, normalizer, strip_end)


def _built(
    tokenizer: Tokenizer, start: list[int], end: int, pad: int | None, limit: int, normalizer: str, strip_end: bool
) -> TextTokenizer:
    model = json.loads(tokenizer.to_str())["model"]
    unknown = {model.get("unk_id"), tokenizer.token_to_id(model.get("unk_token") or "")}
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special = (special - unknown) | {*start, end}
    return TextTokenizer(
        tokenizer, limit, normalizer, tuple(start), 0 if strip_end else end, 0 if pad is None else pad,
        frozenset(special),
    )  # fmt: skip


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens that a text gets in front and behind."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ModelError("the tokenizer adds control tokens within a text, which is not supported")


def _token(value: Any) -> str | None:
    """A control token as the settings have it: its text, or an object with its text."""
    return value.get("content") if isinstance(value, dict) else value
