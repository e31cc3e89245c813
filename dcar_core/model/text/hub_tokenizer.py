"""Tokenizers of the Hugging Face kind, from `tokenizer.json` and its settings beside it.

- The file is read by the library `tokenizers`; transformers is needed only where a model has no such file.
- Nothing of a model's directory is executed: code that a tokenizer brings along is never loaded.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dcar_core.model.hub import fetch
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
