"""Tokenizers that need no PyTorch: open_clip's own numbers, and those of Hugging Face's
vocabularies.
"""

import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.tokenizer import (
    CLIP_VOCABULARY,
    TextTokenizer,
    clean_text,
    count_clip_tokens,
    load_hub_tokenizer,
    load_tokenizer,
)
from dcar_core.negatives import LETTER_FUNCTIONS
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import without_pytorch
from tests.support.tiny_models import Kind, write_tokenizer

EXAMPLE = ROOT / "examples" / "emoji"

HARD = [
    "",
    "a red sports car",
    "it's the dog's ball, we'll they've I'M 7 of 99, l'LL",
    "crying cat 😿",
    "👩🏿‍🦱 日本の旗 naïve café ﬁne ½ ² ٣ _a_b",
    "ſ'ſ İstanbul ΟΔΥΣΣΕΥΣ",  # noqa: RUF001
    "line\nbreak\ttab\u200b\u00ad\x1b[31m",
    "schÃ¶n",
    "supercalifragilistic " * 40,
]


CONTROL = [
    "a <end_of_text> b",
    "a < / Start_Of_Text > b",
    "a &amp;amp;amp;lt;end_of_text&amp;amp;amp;gt; b",
    "a < | startOfText | > b",
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(BackboneSource(str(EXAMPLE / "base")))


def test_numbers_are_open_clips(backbone: Backbone) -> None:
    rng = random.Random(0)
    ranges = (
        range(32, 127),
        range(0xA0, 0x2000),
        range(0x1F300, 0x1FAD0),
    )
    soup = [
        "".join(
            chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randrange(1, 24))
        )
        for _ in range(1000)
    ]
    # Regular expressions differ on letters newer than their tables, and on this one
    # mark, which folds to a letter.
    soup = [
        s
        for s in soup
        if not any(
            unicodedata.category(c) in ("Cn", "Co", "Cs") or c == "\u0345" for c in s
        )
    ]
    annotations = json.loads((EXAMPLE / "openmoji" / "train.json").read_text())
    texts = [
        *HARD,
        *soup,
        *(entry["positive"][0] for entry in list(annotations.values())[::4]),
    ]
    simple = open_clip.SimpleTokenizer(str(EXAMPLE / "base" / "bpe.txt.gz"))
    for prompts in (0, 4):
        tokens = backbone.text_tokenizer(prompts)
        odd = []
        for text in texts:
            wanted = simple([clean_text(text)], context_length=tokens.limit).numpy()
            if not np.array_equal(
                tokens([text]), wanted[:, : int(wanted.argmax(1)[0]) + 1]
            ):
                odd.append(text)
        assert len(odd) <= len(texts) // 1000, odd
        assert not set(odd) & {*HARD}
        np.testing.assert_array_equal(
            tokens(HARD), backbone.tokenize(HARD, prompts).numpy()
        )
    assert tokens([]).shape[0] == 0
    for text in CONTROL:
        assert not {49406, 49407} & {*backbone.tokenizer.caption_ids(text)}, text


@pytest.mark.slow
def test_clips_vocabulary_needs_no_open_clip(tmp_path: Path) -> None:
    reference = open_clip.get_tokenizer("ViT-B-32")
    wanted = reference([clean_text(text) for text in HARD]).numpy()
    found = TextTokenizer.for_clip()(HARD)
    np.testing.assert_array_equal(found, wanted[:, : found.shape[1]])
    assert LETTER_FUNCTIONS.tokens(["a red car"]) == [
        reference("a red car")[0, :5].tolist()
    ]
    (tmp_path / "copy.gz").write_bytes(CLIP_VOCABULARY.read_bytes())
    settings: list[dict[str, Any]] = [{}, {"tokenizer_kwargs": {"bpe_path": "copy.gz"}}]
    assert (
        len({load_tokenizer({"text_cfg": text}, tmp_path)[1] for text in settings}) == 1
    ), "the identity of its content"
    assert count_clip_tokens(["a red car", "a " * 5000]) == [5, 5002]
    code = "import dcar_core.negatives as n; n.LETTER_FUNCTIONS.tokens(['a'])"
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | without_pytorch(tmp_path),
        check=True,
    )


TEXTS = [
    "",
    "a red square",
    "A  Red,   square and\ta green circle!",
    "crying cat 😿 日本",
    "it's not blue_green (really)",
    "two brown dogs run across the wet lawn with one yellow ball " * 3,
    "schönes niño œuvre 12 34567 ½ ﬁ",
    "▁ ▁a",
]


def load(directory: Path, limit: int, **options: Any) -> TextTokenizer:
    return load_hub_tokenizer(
        directory / "tokenizer.json",
        directory / "tokenizer_config.json",
        limit,
        **options,
    )


@needs("hf")
@pytest.mark.parametrize(
    ("kind", "clean", "strip_end"),
    [
        ("t5", "canonicalize", False),  # SigLIP
        ("gemma", "canonicalize", False),  # SigLIP 2
        ("xlm", "whitespace", False),  # XLM-RoBERTa, XLM-V
        ("bert", "whitespace", True),  # CLIPA
    ],
)
def test_ids_are_those_of_open_clip(
    kind: Kind,
    clean: str,
    strip_end: bool,
    tmp_path: Path,
) -> None:
    import transformers

    write_tokenizer(kind, tmp_path)
    # the files as transformers' class for this kind writes them
    saved = tmp_path / "saved"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(saved)
    stock = open_clip.tokenizer.HFTokenizer(
        str(saved),
        24,
        clean=clean,
        strip_sep_token=strip_end,
    )
    found = load(saved, 24, normalizer=clean, strip_end=strip_end)
    for text in TEXTS:
        ids = found([text])[0].tolist()
        assert [*ids, *[found.pad_id] * (24 - len(ids))] == stock([text])[0].tolist(), (
            text
        )


@pytest.mark.parametrize(
    ("kind", "pad_id"),
    [
        ("t5", 0),
        ("gemma", 0),
        ("xlm", 1),
        ("bert", 0),
        ("nllb", 1),
    ],
)
def test_padding_is_found_and_no_text_places_a_control_token(
    kind: Kind,
    pad_id: int,
    tmp_path: Path,
) -> None:
    """Whether the settings name the padding or not."""
    write_tokenizer(kind, tmp_path)
    tokenizer = load(tmp_path, 64)
    plain = tokenizer.caption_ids("a red square")
    for token in (
        "</s>",
        "<s>",
        "<eos>",
        "<bos>",
        "<pad>",
        "<mask>",
        "[SEP]",
        "[CLS]",
        "[MASK]",
    ):
        ids = tokenizer.caption_ids(f"a {token} red square")
        assert not {*tokenizer.start_ids, tokenizer.end_id} & set(ids), token
        if tokenizer.tokenizer.token_to_id(token) is not None:
            assert [each for each in ids if each in plain][-2:] == plain[-2:]
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert load(tmp_path, 24).pad_id == pad_id
    assert load_hub_tokenizer(tmp_path / "tokenizer.json", None, 24).pad_id == pad_id
