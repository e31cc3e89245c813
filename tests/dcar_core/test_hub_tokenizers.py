"""Vocabularies of the Hugging Face kinds give the ids of open_clip's own tokenizers, which transformers runs."""

import json
from pathlib import Path

import open_clip
import pytest

from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.text.hub_tokenizer import copy_from_hub, load_hub_tokenizer
from dcar_core.util.errors import ModelError
from tests.support.parts import needs
from tests.support.tiny_models import Kind, write_tiny_model, write_tokenizer

TEXTS = [
    "",
    "a red square",
    "A  Red,   square and\ta green circle!",
    "two brown dogs run across the wet lawn with one yellow ball " * 3,
    "schönes niño œuvre 12 34567 ½ ﬁ",
    "crying cat 😿 日本",
    "it's not blue_green (really)",
    "▁ ▁a",
]


@needs("hf")
@pytest.mark.parametrize(
    ("kind", "clean", "strip_end"),
    [
        ("t5", "canonicalize", False),  # SigLIP
        ("t5", "whitespace", False),  # mT5
        ("gemma", "canonicalize", False),  # SigLIP 2
        ("xlm", "whitespace", False),  # XLM-RoBERTa, XLM-V
        ("bert", "whitespace", True),  # CLIPA
    ],
)
def test_ids_are_those_of_open_clip(kind: Kind, clean: str, strip_end: bool, tmp_path: Path) -> None:
    import transformers

    write_tokenizer(kind, tmp_path)
    saved = tmp_path / "saved"  # the files as transformers' class for this kind writes them
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(saved)
    stock = open_clip.tokenizer.HFTokenizer(str(saved), 24, clean=clean, strip_sep_token=strip_end)
    found = load_hub_tokenizer("a/name", saved, 24, normalizer=clean, strip_end=strip_end)
    for text in TEXTS:
        ids = found([text])[0].tolist()
        assert [*ids, *[found.pad_id] * (24 - len(ids))] == stock([text])[0].tolist(), text


def test_a_copy_from_the_hub_is_the_same_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, copy = tmp_path / "hub", tmp_path / "copy"
    hub.mkdir()
    copy.mkdir()
    write_tokenizer("gemma", hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(hub / file))
    copy_from_hub("a/name", copy)
    assert load_hub_tokenizer("a/name", copy, 24).identity() == load_hub_tokenizer("a/name", None, 24).identity()


def test_settings_overrule_the_control_tokens_of_the_file(tmp_path: Path) -> None:
    write_tokenizer("gemma", tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["single"] = [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
    ]  # fmt: skip
    content["post_processor"]["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}
    file.write_text(json.dumps(content))
    tokenizer = load_hub_tokenizer("a/name", tmp_path, 24)
    assert (tokenizer.start_ids, tokenizer.end_id, tokenizer.pad_id) == ((), 1, 0)


@pytest.mark.parametrize("settings", [None, {"model_max_length": 512}])
@pytest.mark.parametrize(("kind", "pad_id"), [("t5", 0), ("gemma", 0), ("xlm", 1), ("bert", 0), ("nllb", 1)])
def test_padding_is_found_where_the_settings_do_not_name_it(
    kind: Kind, pad_id: int, settings: dict[str, int] | None, tmp_path: Path
) -> None:
    write_tokenizer(kind, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_hub_tokenizer("a/name", tmp_path, 24).pad_id == pad_id


@needs("hf")
def test_a_tokenizer_that_pads_with_a_token_the_tower_reads_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model("xlm-roberta-base-ViT-B-32", tmp_path / "model")
    (model / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<s>"}))
    with pytest.raises(ModelError, match="the tokenizer pads with token 0, but the text tower masks token 1"):
        load_backbone(BackboneSource(str(model)))


@pytest.mark.parametrize("kind", ["t5", "gemma", "xlm", "bert", "nllb"])
def test_no_text_places_a_control_token(kind: Kind, tmp_path: Path) -> None:
    write_tokenizer(kind, tmp_path)
    tokenizer = load_hub_tokenizer("a/name", tmp_path, 64)
    plain = tokenizer.caption_ids("a red square")
    for token in ("</s>", "<s>", "<eos>", "<bos>", "<pad>", "<mask>", "[SEP]", "[CLS]", "[MASK]"):
        ids = tokenizer.caption_ids(f"a {token} red square")
        assert not {*tokenizer.start_ids, tokenizer.end_id} & set(ids), token
        if tokenizer.tokenizer.token_to_id(token) is not None:
            assert [each for each in ids if each in plain][-2:] == plain[-2:]
