"""Loaded backbones: prompts, adapters, tokens and the content hash; what cannot be used
is one clear line each.
"""

import copy
import gzip
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from torch import nn

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.checkpoint import read_config
from dcar_core.model.config import (
    MODEL_CONFIG,
    LossConfig,
    ModelConfig,
    PromptConfig,
    ReweightConfig,
    plain_config,
)
from dcar_core.model.dcar import DCAR
from dcar_core.model.methods import (
    METHODS,
    comparable_methods,
    default_method,
    find_method,
    require_runnable,
)
from dcar_core.model.open_clip_source import vector_settings
from dcar_core.model.tokenizer import count_clip_tokens
from dcar_core.model.towers.image import NativeImage
from dcar_core.model.towers.text import NativeText
from dcar_core.util.errors import ModelError
from dcar_core.util.machine import WEIGHTS_FILE
from tests.support.files import write_json
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.tiny_models import small_timm_models, write_tiny_model

EXAMPLE = ROOT / "examples" / "emoji"
TEXTS = [
    "a red square",
    "x",
    "a much longer caption of a small green circle beside a wall",
]


def edit(model: Path, part: str, **values: Any) -> BackboneSource:
    config = json.loads((model / MODEL_CONFIG).read_text())
    place = config["model_cfg"] if part == "model_cfg" else config["model_cfg"][part]
    place |= values
    (model / MODEL_CONFIG).write_text(json.dumps(config))
    return BackboneSource(str(model))


def test_prompts_of_word_embeddings_equal_the_prefixed_sentence(
    backbone: Backbone,
) -> None:
    model = DCAR(backbone, ModelConfig(prompt=PromptConfig(image=False)))
    with torch.no_grad():
        prompted = model.encode_text(backbone.tokenize(TEXTS, model.prompt_tokens))
        written = F.normalize(
            backbone.encode_text(
                backbone.tokenize([f"a photo of a {t}" for t in TEXTS])
            ),
            dim=-1,
        )
    torch.testing.assert_close(prompted, written, rtol=1e-5, atol=1e-6)


def test_adapters_start_without_effect(backbone: Backbone) -> None:
    model = DCAR(backbone, find_method("block-adapters").config)
    tokens = backbone.tokenize(TEXTS)
    pixels = torch.randn(
        3,
        3,
        32,
        32,
        generator=torch.Generator().manual_seed(0),
    )
    assert model.text_is_frozen
    assert not model.image_is_frozen
    assert model.block_adapters is not None
    with torch.no_grad():
        stock = F.normalize(backbone.encode_image(pixels), dim=-1)
        torch.testing.assert_close(
            model.encode_image(pixels),
            stock,
            rtol=0,
            atol=1e-6,
        )
        model.block_adapters.up.normal_(std=0.2)
        assert not torch.allclose(model.encode_image(pixels), stock, atol=0.01)
        torch.testing.assert_close(
            model.encode_text(tokens), F.normalize(backbone.encode_text(tokens), dim=-1)
        )


def test_token_features_encode_each_token_alone(backbone: Backbone) -> None:
    tokens = backbone.tokenize(["a red square", "red"])
    found = backbone.lone_token_features(tokens)
    assert found.shape == (2, 5, backbone.embed_dim)
    torch.testing.assert_close(
        found[0, 2], backbone.encode_text(backbone.tokenize(["red"]))[0]
    )
    torch.testing.assert_close(found[0, 2], found[1, 1])


def test_texts_are_cut_to_the_context_before_their_end_token(
    backbone: Backbone,
) -> None:
    tokens = backbone.tokenize(["word " * 100], prompt_tokens=4)
    assert tokens.shape[1] == 28
    assert tokens[0, -1] == 49407
    texts = ["a " * n for n in (26, 27, 30, 31)]
    assert count_clip_tokens(texts) == [28, 29, 32, 33]
    assert list(map(backbone.text_tokenizer(0).exceeds_limit, texts)) == [
        False,
        False,
        False,
        True,
    ]
    assert list(map(backbone.text_tokenizer(4).exceeds_limit, texts)) == [
        False,
        True,
        True,
        True,
    ]
    with pytest.raises(ValueError, match=r"the context holds \(32\)"):
        backbone.encode_text(backbone.tokenize(["word " * 100]), torch.zeros(1, 4, 64))


def test_bundled_fingerprints_are_unchanged() -> None:
    expected = "90377be1fcd8213dab5d265b23a72906ec3c91d8443c700b4e630155a2df0856"
    assert (
        load_backbone(BackboneSource(str(EXAMPLE / "base"))).content_hash() == expected
    )
    assert (
        read_config(EXAMPLE / "twemoji" / "checkpoint")["backbone"]["sha256"]
        == expected
    )


@pytest.mark.parametrize(
    ("model", "weights", "reason"),
    [
        ("{tiny}", "openai", "has weights of its own; leave out --pretrained openai"),
        (
            "ViT-Z",
            None,
            (
                "there is no model 'ViT-Z', built in or as a directory; `dcar models`"
                " lists the names"
            ),
        ),
        ("{empty}", None, "has no open_clip_config"),
        (
            "ViT-B-32-quickgelu",
            None,
            r"random weights; give --pretrained a tag \(openai",
        ),
        ("ViT-B-32", "weights.pt", "is not a known tag or valid file path"),
    ],
)
def test_unknown_models_and_wrong_weights_are_refused(
    model: str,
    weights: str | None,
    reason: str,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=reason):
        load_backbone(
            BackboneSource(model.format(tiny=tiny_model, empty=tmp_path), weights)
        )


def test_unusable_files_of_weights_are_refused(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((model / MODEL_CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "Tiny",
        config | {"text_cfg": config["text_cfg"]},
    )

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    weights = load_file(model / WEIGHTS_FILE)
    for name, content, reason in (
        ("evil.pt", {"x": Evil()}, "could not be loaded"),
        (
            "other.pt",
            {"some.weight": torch.zeros(3)},
            "could not be loaded: Error.* in loading state_dict for CLIP",
        ),
        (
            "resized.pt",
            weights | {"visual.positional_embedding": torch.zeros(5, 64)},
            "do not fit Tiny: visual.posit",
        ),
        (
            "nan.pt",
            weights | {"visual.proj": torch.full((64, 32), torch.nan)},
            "features differ .* by nan",
        ),
        (
            "right.pt",
            {
                "state_dict": {
                    f"module.{name}": value for name, value in weights.items()
                }
            },
            "",
        ),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ModelError, match=reason) if reason else nullcontext():
            load_backbone(BackboneSource("Tiny", str(tmp_path / name)))
    (model / WEIGHTS_FILE).unlink()
    with pytest.raises(
        ModelError, match="could not be loaded: Required pretrained weights"
    ):
        load_backbone(BackboneSource(str(model)))
    save_file(
        weights | {"visual.positional_embedding": torch.zeros(1 + 4 * 6, 64)},
        model / WEIGHTS_FILE,
    )
    with pytest.raises(
        ModelError,
        match=r"^the model takes images of 32 x 48 pixels; they must be square$",
    ):
        load_backbone(edit(model, "vision_cfg", image_size=[32, 48]))


@pytest.mark.parametrize(
    ("tower", "part"), [(NativeText, "run"), (NativeImage, "pool")]
)
def test_towers_that_give_other_features_than_the_model_are_refused(
    tower: Any,
    part: str,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(tower, part)
    monkeypatch.setattr(
        tower, part, lambda self, *given: right(self, *given).roll(1, -1)
    )
    with pytest.raises(
        ModelError,
        match="not supported with this release of open_clip: features differ",
    ):
        load_backbone(BackboneSource(str(tiny_model)))


def test_a_method_that_the_towers_cannot_run_is_refused() -> None:
    backbone: Any = SimpleNamespace(level="text", source=BackboneSource("RN50"))
    configs = [
        METHODS[name].config for name in ("dcar", "dcar+", "maple", "block-adapters")
    ]
    configs.append(plain_config("late", loss=LossConfig(late=0.5)))
    configs.append(
        plain_config("patches", reweight=ReweightConfig(image_feature="patches"))
    )
    for config in configs:
        with pytest.raises(
            ModelError,
            match=(
                r"image tower of RN50 does not have; use coop, dcar-text or"
                r" dcar\+-text$"
            ),
        ):
            require_runnable(config, backbone)


@pytest.mark.parametrize(
    ("level", "blocks", "method"),
    [
        ("full", 2, "query-prompts"),
        ("full", 1, "block-adapters+"),
        ("text", 0, "dcar+-text"),
    ],
)
def test_the_default_method_of_each_level_runs(
    level: str,
    blocks: int,
    method: str,
) -> None:
    backbone: Any = SimpleNamespace(
        level=level,
        image_tower=SimpleNamespace(pools_class_row=True, blocks=blocks),
        source=BackboneSource("a model"),
        context_length=77,
        layout=SimpleNamespace(start=1),
    )
    assert default_method(backbone) == method
    for name in (method, *comparable_methods(backbone)):
        require_runnable(METHODS[name].config, backbone)
    backbone.image_tower.pools_class_row = False
    assert default_method(backbone) == "block-adapters+" if level == "full" else method


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        (
            "text_cfg",
            {"tokenizer_kwargs": {"trust_remote_code": True}},
            "sets trust_remote_code in tokenizer_kwargs",
        ),
        (
            "text_cfg",
            {"tokenizer_kwargs": {"bpe_path": "../bpe.txt.gz"}},
            "must be a file in the model directory",
        ),
        (
            "text_cfg",
            {"tokenizer_kwargs": {"clean": "no"}},
            "sets clean 'no'; known are",
        ),
        ("text_cfg", {"hf_tokenizer_name": "../../etc"}, "is not the name of a model"),
        ("text_cfg", {"hf_model_name": "/tmp/evil"}, "is not the name of a model"),
        ("text_cfg", {"tokenizer_mode": "clips"}, "sets tokenizer_mode"),
        (
            "text_cfg",
            {"hf_tokenizer_name": "google/mt5-base"},
            "has no tokenizer.json, and no other",
        ),
        (
            "vision_cfg",
            {"timm_model_name": "hf-hub:evil/repo"},
            "is not the name of a model",
        ),
        ("vision_cfg", {"no_such_setting": 1}, "sets no_such_setting in vision_cfg"),
        ("model_cfg", {"cast_dtype": "float16"}, "sets cast_dtype in model_cfg"),
    ],
)
def test_a_configuration_sets_only_what_is_allowed_and_fits(
    model: Path,
    part: str,
    values: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_clip, "create_model", None)  # nothing may be created
    with pytest.raises(ModelError, match=reason):
        load_backbone(edit(model, part, **values))


def test_the_configuration_of_a_hub_model_is_checked_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    file = write_json(tmp_path / MODEL_CONFIG, {"model_cfg": config})
    monkeypatch.setattr("dcar_core.model.open_clip_source.fetch", lambda *_: file)
    monkeypatch.setattr(open_clip, "create_model", None)  # nothing may be created
    with pytest.raises(
        ModelError,
        match="sets trust_remote_code in tokenizer_kwargs, which a model may not set",
    ):
        load_backbone(BackboneSource("hf-hub:a/model"))


SIGLIP2 = "ViT-B-16-SigLIP2"
XLM = "xlm-roberta-base-ViT-B-32"
PLAIN = "ViT-B-32"
# Of training alone, or names of what is identified by its content.
WITHOUT_EFFECT = {
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "output_tokens",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "hf_model_name",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
}


def test_every_setting_that_may_change_a_vector_is_in_the_hash() -> None:
    config = open_clip.get_model_config(PLAIN)
    clip = nn.Identity()
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
    with small_timm_models():
        return load_backbone(BackboneSource(str(model))).content_hash()


CHANGES: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    (SIGLIP2, "tokenizer.json", lambda c: c["model"]["merges"].pop()),
    (SIGLIP2, "tokenizer_config.json", lambda c: c.update(pad_token="<eos>")),
    (XLM, "xlm-roberta/config.json", lambda c: c.update(num_attention_heads=4)),
    (
        PLAIN,
        MODEL_CONFIG,
        lambda c: c["model_cfg"]["text_cfg"]["tokenizer_kwargs"].update(
            clean="whitespace"
        ),
    ),
    (
        PLAIN,
        MODEL_CONFIG,
        lambda c: c["model_cfg"]["text_cfg"]["tokenizer_kwargs"].update(
            bpe_path="other.txt.gz"
        ),
    ),
    (
        PLAIN,
        MODEL_CONFIG,
        lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg"),
    ),
    (PLAIN, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(mean=[0.4, 0.5, 0.5])),
]


@pytest.mark.parametrize("name", [SIGLIP2, PLAIN, pytest.param(XLM, marks=needs("hf"))])
def test_each_change_of_a_file_beside_the_weights_has_a_hash_of_its_own(
    name: str, tmp_path: Path
) -> None:
    with small_timm_models():
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
