"""The content hash covers every setting that may change a vector, and the files beside the weights."""

import copy
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import nn

from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.open_clip_source import vector_settings
from tests.support.parts import needs
from tests.support.tiny_clips import small_timm_models
from tests.support.tiny_models import write_tiny_model

SIGLIP2, PE_CORE = "ViT-B-16-SigLIP2", "PE-Core-T-16-384"
XLM, PLAIN = "xlm-roberta-base-ViT-B-32", "ViT-B-32"
# Of training alone, or names of what is identified by its content.
WITHOUT_EFFECT = {
    "patch_dropout", "timm_drop", "timm_drop_path", "output_tokens", "timm_model_pretrained", "hf_model_pretrained",
    "hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_timm_models():
        yield


def test_every_setting_that_may_change_a_vector_is_in_the_hash() -> None:
    config, clip = open_clip.get_model_config(PLAIN), nn.Identity()
    usual = vector_settings(clip, config, "a tokenizer")
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        for field in fields(kind):
            changed = copy.deepcopy(config)
            changed[part][field.name] = "another"
            is_in_hash = vector_settings(clip, changed, "a tokenizer") != usual
            assert is_in_hash == (field.name not in WITHOUT_EFFECT), field.name
    others = [
        vector_settings(clip, config, "another"),
        vector_settings(open_clip.model.QuickGELU(), config, "a tokenizer"),
    ]
    clip.text = SimpleNamespace(config=SimpleNamespace(num_attention_heads=3))  # type: ignore[assignment]
    others.append(vector_settings(clip, config, "a tokenizer"))
    assert len({usual, *others}) == 4


def content_hash(model: Path) -> str:
    return load_backbone(BackboneSource(str(model))).content_hash()


CHANGES: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    (SIGLIP2, "tokenizer.json", lambda c: c["model"]["merges"].pop()),
    (SIGLIP2, "tokenizer_config.json", lambda c: c.update(pad_token="<eos>")),
    (XLM, "xlm-roberta/config.json", lambda c: c.update(num_attention_heads=4)),
    (PE_CORE, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(mean=[0.4, 0.5, 0.5])),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"]["tokenizer_kwargs"].update(clean="whitespace")),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"]["tokenizer_kwargs"].update(bpe_path="other.txt.gz")),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg")),
]


@pytest.mark.parametrize("name", [SIGLIP2, PE_CORE, PLAIN, pytest.param(XLM, marks=needs("hf"))])
def test_each_change_of_a_file_beside_the_weights_has_a_hash_of_its_own(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(name, tmp_path / "model")
    with gzip.open(path / "other.txt.gz", "wt") as merges:
        merges.write("version\n" + "c a\nca t</w>\n" * 2)
    changes = [(path / file, change) for of, file, change in CHANGES if of == name]
    hashes = {content_hash(path)}
    for file, change in changes:
        original = file.read_text()
        content = json.loads(original)
        change(content)
        file.write_text(json.dumps(content))
        hashes.add(content_hash(path))
        file.write_text(original)
    assert len(hashes) == len(changes) + 1
