"""The content hash changes with every setting that decides on vectors, in every family, and with no other."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from tests.support.tiny_clips import small_timm_models
from tests.support.tiny_models import write_tiny_model

SIGLIP2, PE_CORE, CLIPA, COCA = "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "ViT-L-14-CLIPA", "coca_ViT-B-32"
WORLDWIDE, XLM = "ViT-L-14-worldwide", "xlm-roberta-base-ViT-B-32"


@pytest.fixture(scope="module", autouse=True)
def _small_models() -> Iterator[None]:
    with small_timm_models():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Model directories by name, each with its content hash."""
    made: dict[str, tuple[Path, str]] = {}

    def model(name: str) -> tuple[Path, str]:
        if name not in made:
            path = write_tiny_model(name, tmp_path_factory.mktemp("models") / name)
            made[name] = path, content_hash(path)
        return made[name]

    return model


def content_hash(model: Path) -> str:
    backbone: Backbone = load_backbone(BackboneSource(str(model)))
    return backbone.content_hash()


def changed(model: Path, copy: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> str:
    """The content hash of a copy with a change in one of its JSON files."""
    shutil.copytree(model, copy)
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return content_hash(copy)


def setting(part: str, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model_cfg"][part].update(values)


@pytest.mark.parametrize(
    ("name", "part", "values"),
    [
        (SIGLIP2, "text_cfg", {"heads": 4}),
        (SIGLIP2, "text_cfg", {"pool_type": "argmax"}),
        (SIGLIP2, "text_cfg", {"no_causal_mask": False}),
        (SIGLIP2, "text_cfg", {"norm_kwargs": {"eps": 1e-3}}),
        (SIGLIP2, "text_cfg", {"act_kwargs": {}}),
        (SIGLIP2, "text_cfg", {"tokenizer_kwargs": {"clean": "whitespace"}}),
        (PE_CORE, "vision_cfg", {"timm_model_name": "vit_pe_core_small_patch16_384"}),
        (PE_CORE, "text_cfg", {"no_causal_mask": True}),
        (CLIPA, "vision_cfg", {"pool_type": "tok"}),
        (CLIPA, "vision_cfg", {"final_ln_after_pool": False}),
        (CLIPA, "vision_cfg", {"head_width": 8}),
        (CLIPA, "text_cfg", {"tokenizer_kwargs": {"strip_sep_token": False}}),
        (COCA, "vision_cfg", {"attn_pooler_heads": 4}),
        (COCA, "text_cfg", {"pad_id": 1}),
        (WORLDWIDE, "text_cfg", {"eos_id": 2}),
        (WORLDWIDE, "text_cfg", {"pool_type": "argmax"}),
        (XLM, "text_cfg", {"hf_pooler_type": "cls_last_hidden_state_pooler"}),
    ],
    ids=str,
)
def test_a_setting_of_a_tower_changes_it(
    name: str, part: str, values: dict[str, Any], models: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    if name == XLM:
        pytest.importorskip("transformers", reason="needs the extra [hf]")
    path, before = models(name)
    assert changed(path, tmp_path / "copy", MODEL_CONFIG, setting(part, **values)) != before


def swap_words(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = (next(i for i, (piece, _) in enumerate(vocabulary) if piece == word) for word in ("▁red", "▁dogs"))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        (WORLDWIDE, "tokenizer.json", swap_words),
        (WORLDWIDE, "tokenizer.json", lambda c: c["model"]["vocab"][-1].__setitem__(1, -9.0)),
        (WORLDWIDE, "tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
        (WORLDWIDE, "tokenizer.json", lambda c: c["pre_tokenizer"].update(prepend_scheme="never")),
        (SIGLIP2, "tokenizer.json", lambda c: c["model"]["merges"].pop()),
        (SIGLIP2, "tokenizer.json", lambda c: c["model"].update(byte_fallback=False)),
        (SIGLIP2, "tokenizer_config.json", lambda c: c.update(pad_token="<eos>")),
        (CLIPA, "tokenizer.json", lambda c: c["normalizer"].update(lowercase=False)),
        (XLM, "xlm-roberta/config.json", lambda c: c.update(num_attention_heads=4)),
        (XLM, "xlm-roberta/config.json", lambda c: c.update(layer_norm_eps=1e-3)),
        (PE_CORE, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(mean=[0.4, 0.5, 0.5])),
        (PE_CORE, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(resize_mode="shortest")),
        (PE_CORE, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(interpolation="bilinear")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_beside_the_weights_changes_it(
    name: str,
    file: str,
    change: Callable[[dict[str, Any]], Any],
    models: Callable[[str], tuple[Path, str]],
    tmp_path: Path,
) -> None:
    if name == XLM:
        pytest.importorskip("transformers", reason="needs the extra [hf]")
    path, before = models(name)
    assert changed(path, tmp_path / "copy", file, change) != before


@pytest.mark.parametrize(
    ("name", "part", "values"),
    [
        (SIGLIP2, "vision_cfg", {"timm_drop": 0.1, "timm_model_pretrained": True}),
        (SIGLIP2, "text_cfg", {"hf_tokenizer_name": "another/mirror"}),
        (CLIPA, "vision_cfg", {"patch_dropout": 0.5}),
        (COCA, "multimodal_cfg", {"heads": 4}),
    ],
    ids=str,
)
def test_a_setting_of_training_or_a_name_does_not(
    name: str, part: str, values: dict[str, Any], models: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    path, before = models(name)
    assert changed(path, tmp_path / "copy", MODEL_CONFIG, setting(part, **values)) == before
