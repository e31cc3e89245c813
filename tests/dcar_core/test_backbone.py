"""Loaded backbones: prompts, adapters and tokens; models that cannot be used are one clear line each."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.checkpoint import read_config
from dcar_core.model.config import MODEL_CONFIG, ModelConfig, PromptConfig
from dcar_core.model.dcar import DCAR
from dcar_core.model.methods.registry import METHODS, comparable_methods, default_method, method, require_runnable
from dcar_core.model.text import tokenizer
from dcar_core.model.text.tokenizer import count_clip_tokens
from dcar_core.model.towers.image import NativeImage
from dcar_core.model.towers.text import NativeText
from dcar_core.util.errors import MissingExtraError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE
from tests.support.files import write_json
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "emoji"
TEXTS = ["a red square", "x", "a much longer caption of a small green circle beside a wall"]


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def edit(model: Path, part: str, **values: Any) -> BackboneSource:
    config = json.loads((model / MODEL_CONFIG).read_text())
    place = config["model_cfg"] if part == "model_cfg" else config["model_cfg"][part]
    place |= values
    (model / MODEL_CONFIG).write_text(json.dumps(config))
    return BackboneSource(str(model))


def test_prompts_of_word_embeddings_equal_the_prefixed_sentence(backbone: Backbone) -> None:
    model = DCAR(backbone, ModelConfig(prompt=PromptConfig(image=False)))
    with torch.no_grad():
        prompted = model.encode_text(backbone.tokenize(TEXTS, model.prompt_tokens))
        written = F.normalize(backbone.encode_text(backbone.tokenize([f"a photo of a {t}" for t in TEXTS])), dim=-1)
    torch.testing.assert_close(prompted, written, rtol=1e-5, atol=1e-6)


def test_adapters_start_without_effect(backbone: Backbone, pixels: torch.Tensor) -> None:
    model = DCAR(backbone, method("block-adapters"))
    tokens = backbone.tokenize(TEXTS)
    assert model.text_is_frozen
    assert not model.image_is_frozen
    assert model.block_adapters is not None
    with torch.no_grad():
        stock = F.normalize(backbone.encode_image(pixels), dim=-1)
        torch.testing.assert_close(model.encode_image(pixels), stock, rtol=0, atol=1e-6)
        model.block_adapters.up.normal_(std=0.2)
        assert not torch.allclose(model.encode_image(pixels), stock, atol=0.01)
        torch.testing.assert_close(model.encode_text(tokens), F.normalize(backbone.encode_text(tokens), dim=-1))
        plain = DCAR(backbone, method("clip-adapter"))
        torch.testing.assert_close(plain.encode_image(pixels), stock)
        torch.testing.assert_close(plain.encode_text(tokens), model.encode_text(tokens))


def test_token_features_encode_each_token_alone(backbone: Backbone) -> None:
    tokens = backbone.tokenize(["a red square", "red"])
    found = backbone.lone_token_features(tokens)
    assert found.shape == (2, 5, backbone.embed_dim)
    torch.testing.assert_close(found[0, 2], backbone.encode_text(backbone.tokenize(["red"]))[0])
    torch.testing.assert_close(found[0, 2], found[1, 1])


def test_texts_are_cut_to_the_context_before_their_end_token(backbone: Backbone) -> None:
    tokens = backbone.tokenize(["word " * 100], prompt_tokens=4)
    assert tokens.shape[1] == 28
    assert tokens[0, -1] == 49407
    texts = ["a " * n for n in (26, 27, 30, 31)]
    assert count_clip_tokens(texts) == [28, 29, 32, 33]
    assert list(map(backbone.text_tokenizer(0).exceeds_limit, texts)) == [False, False, False, True]
    assert list(map(backbone.text_tokenizer(4).exceeds_limit, texts)) == [False, True, True, True]
    with pytest.raises(ValueError, match="the context holds 32"):
        backbone.encode_text(backbone.tokenize(["word " * 100]), torch.zeros(1, 4, 64))


@pytest.mark.slow
def test_real_architecture_loads_bit_for_bit_from_both_kinds_of_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, str(tmp_path / "weights.safetensors"))
    for file in ("weights.pt", "weights.safetensors"):
        backbone = load_backbone(BackboneSource("ViT-S-32-alt", str(tmp_path / file)))
        loaded = backbone.clip.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        assert (backbone.text_width, backbone.vision_width, backbone.embed_dim) == (256, 384, 256)
        with torch.no_grad():
            tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["a dog"])
            torch.testing.assert_close(backbone.encode_text(tokens), clip.eval().encode_text(tokens), rtol=0, atol=0)


def test_bundled_fingerprints_are_unchanged() -> None:
    expected = "90377be1fcd8213dab5d265b23a72906ec3c91d8443c700b4e630155a2df0856"
    assert load_backbone(BackboneSource(str(EXAMPLE / "base"))).content_hash() == expected
    assert read_config(EXAMPLE / "twemoji" / "checkpoint")["backbone"]["sha256"] == expected


@pytest.mark.parametrize(
    ("model", "weights", "reason"),
    [
        ("{tiny}", "openai", "has weights of its own; leave out --pretrained openai"),
        ("ViT-Z", None, "no model is named 'ViT-Z'"),
        ("ViT-B-16-SigLIP3", "webli", "no model is named 'ViT-B-16-SigLIP3'; near it are .*ViT-B-16-SigLIP2.*"),
        ("{empty}", None, "has no open_clip_config"),
        ("ViT-B-32-quickgelu", None, r"random weights; give --pretrained a tag \(openai"),
        ("ViT-B-32", "weights.pkl", "pickle"),
    ],
)
def test_unknown_models_and_wrong_weights_are_refused(
    model: str, weights: str | None, reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        load_backbone(BackboneSource(model.format(tiny=tiny_model, empty=tmp_path), weights))


def test_files_of_weights_that_cannot_be_used_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    state = load_file(model / WEIGHTS_FILE)
    place = state["visual.positional_embedding"]
    (model / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelError, match="could not be loaded: Required pretrained weights"):
        load_backbone(BackboneSource(str(model)))
    save_file(state | {"visual.positional_embedding": place[:1].repeat(1 + 4 * 6, 1)}, model / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=r"^the model takes images of 32 x 48 pixels; they must be square$"):
        load_backbone(edit(model, "vision_cfg", image_size=[32, 48]))
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_backbone(BackboneSource("ViT-S-32-alt", str(tmp_path / "evil.pt")))
    save_file({"some.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w.safetensors are of another architecture than ViT-S-32-alt"):
        load_backbone(BackboneSource("ViT-S-32-alt", str(tmp_path / "w.safetensors")))
    weights = EXAMPLE / "base" / WEIGHTS_FILE
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in load_file(weights).items()}}, tmp_path / "w.pt"
    )
    monkeypatch.setattr(open_clip, "create_model", None)  # nothing may be created
    reason = r"of another architecture than RN50 \(positional_embedding is 32 x 192, not 77 x 512\); name the model"
    for file in (weights, tmp_path / "w.pt"):
        with pytest.raises(ModelError, match=reason):
            load_backbone(BackboneSource("RN50", str(file)))


def test_a_vocabulary_that_needs_transformers_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"has no tokenizer.json, needs .* pip install 'dcar\[hf\]'"):
        load_backbone(edit(model, "text_cfg", hf_tokenizer_name="google/mt5-base"))


@pytest.mark.parametrize(
    ("tower", "part", "level", "refused", "fault"),
    [
        (NativeText, "run", "features", "the towers of .* do not take; use the method clip-adapter", "ValueError"),
        (NativeImage, "pool", "text", "the image tower of .* does not have; use the method dcar-text", "ValueError"),
        (NativeImage, "project", "text", "use the method dcar-text", "features with prompts are not finite"),
    ],
)
def test_tower_that_fails_its_check_is_used_without_prompts(
    tower: Any, part: str, level: str, refused: str, fault: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    right, runs = getattr(tower, part), iter([1, 0])  # without prompts, then with them
    wrong = {
        "run": lambda self, *given: right(self, *given).flip(1),
        "pool": lambda self, x: right(self, x).roll(1, -1),
        "project": lambda self, x: right(self, x) / next(runs, 1),
    }
    monkeypatch.setattr(tower, part, wrong[part])
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    name = "text" if tower is NativeText else "image"
    assert backbone.level == level
    assert f"the {name} tower is used without prompts, since its proof failed: " in caplog.text
    assert fault in caplog.text
    clip, tokens, pixels = cast(Any, backbone.clip), backbone.tokenize(["a dog"]), torch.randn(2, 3, 32, 32)
    stock = clip.encode_text(torch.nn.functional.pad(tokens, (0, 32 - tokens.shape[1])))
    torch.testing.assert_close(backbone.encode_text(tokens), stock)
    torch.testing.assert_close(backbone.encode_image(pixels), clip.encode_image(pixels))
    with pytest.raises(ModelError, match=refused):
        DCAR(backbone, ModelConfig())
    DCAR(backbone, METHODS["clip-adapter"].config)


@pytest.mark.parametrize(
    ("method", "instead"),
    [("dcar", "dcar-text"), ("dcar+", r"dcar\+-text"), ("maple", "coop"), ("block-adapters", r"dcar\+-text")],
)
def test_image_prompts_on_an_unsupported_tower_suggest_the_text_method(method: str, instead: str) -> None:
    with pytest.raises(ModelError, match=f"which the image tower of RN50 does not have; use the method {instead}$"):
        require_runnable(METHODS[method].config, "text", "RN50", 76)
    with pytest.raises(ModelError, match=r"use the method clip-adapter$"):
        require_runnable(METHODS["block-adapters"].config, "features", "RN50", 76)


@pytest.mark.parametrize(
    ("level", "blocks", "method"),
    [
        ("full", 2, "query-prompts"),
        ("full", 1, "block-adapters+"),
        ("text", 0, "dcar+-text"),
        ("features", 0, "clip-adapter"),
    ],
)
def test_the_default_method_of_each_level_runs(level: str, blocks: int, method: str) -> None:
    backbone: Any = SimpleNamespace(level=level, image_tower=SimpleNamespace(pools_class_row=True, blocks=blocks))
    assert default_method(backbone) == method
    backbone.image_tower.pools_class_row = False
    assert default_method(backbone) == ("block-adapters+" if level == "full" else method)
    for name in (method, *comparable_methods(backbone)):
        require_runnable(METHODS[name].config, level, "a model", 76)


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}, "sets trust_remote_code in tokenizer_kwargs"),
        ("text_cfg", {"tokenizer_kwargs": {"reduction_mask": "syntax"}}, "sets reduction_mask in tokenizer_kwargs"),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "../bpe.txt.gz"}}, "must be a file in the model directory"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "no"}}, "sets clean 'no'; known are"),
        ("text_cfg", {"hf_tokenizer_name": "../../etc"}, "is not the name of a model"),
        ("text_cfg", {"hf_model_name": "/tmp/evil"}, "is not the name of a model"),
        ("text_cfg", {"tokenizer_mode": "clips"}, "sets tokenizer_mode"),
        ("text_cfg", {"width": 10**9}, "has width 1000000000 in text_cfg, which is too large"),
        ("text_cfg", {"layers": "4"}, "has layers '4' in text_cfg; it must be of the type int"),
        ("text_cfg", {"context_length": "32"}, "it must be of the type int"),
        ("text_cfg", {"context_length": 48}, r"\(positional_embedding is 32 x 64, not 48 x 64\)"),
        ("text_cfg", {"hf_tokenizer_name": "google/mt5-base"}, "has no tokenizer.json; copy it from google/mt5-base"),
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/repo"}, "is not the name of a model"),
        ("vision_cfg", {"timm_model_name": "evil/repo"}, "is not the name of a model"),
        ("vision_cfg", {"no_such_setting": 1}, "sets no_such_setting in vision_cfg"),
        ("vision_cfg", {"width": 64.5}, "it must be of the type int"),
        ("vision_cfg", {"image_size": "32"}, "it must be of the type int"),
        ("vision_cfg", {"image_size": 64}, r"\(visual.positional_embedding is 17 x 64, not 65 x 64\)"),
        ("model_cfg", {"cast_dtype": "float16"}, "sets cast_dtype in model_cfg"),
        ("model_cfg", {"embed_dim": 4_000_000}, "which is too large"),
        *(("model_cfg", {"embed_dim": value}, "must be a whole number above 0") for value in (0, "x", None, True, 2.5)),
    ],
)
def test_a_configuration_sets_only_what_is_allowed_and_fits(
    model: Path, part: str, values: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "create_model", None)  # nothing may be created
    with pytest.raises(ModelError, match=reason):
        load_backbone(edit(model, part, **values))


def test_the_configuration_of_a_hub_model_is_checked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    file = write_json(tmp_path / MODEL_CONFIG, {"model_cfg": config})
    monkeypatch.setattr("dcar_core.model.open_clip_source.fetch", lambda *_: file)
    monkeypatch.setattr(open_clip, "create_model", None)  # nothing may be created
    with pytest.raises(ModelError, match="sets trust_remote_code in tokenizer_kwargs, which a model may not set"):
        load_backbone(BackboneSource("hf-hub:a/model"))


def test_a_vocabulary_that_unpacks_to_too_much_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "LONGEST_VOCABULARY", 1 << 16)
    with gzip.open(model / "bpe.txt.gz", "wb") as file:
        file.write(b"#version\n" + b"a" * (1 << 16))
    source = edit(model, "text_cfg", tokenizer_kwargs={"bpe_path": "bpe.txt.gz"}, vocab_size=600)
    with pytest.raises(ModelError, match=r"bpe\.txt\.gz unpacks to more than 65,536 characters"):
        load_backbone(source)


def test_a_tokenizer_that_panics_is_an_error_of_the_model(tmp_path: Path) -> None:
    """The library gives up on a regular expression that takes exponential time by a panic, which is no Exception."""
    words = Tokenizer(models.BPE(vocab={"a": 0, "x": 1, "<s>": 2}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    words.post_processor = processors.TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 2)])
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load_hub_tokenizer("a/name", tmp_path, 77)
    assert loaded(["a"]).tolist() == [[2, 0, 2]]
    with pytest.raises(ModelError, match=r"the model's tokenizer fails on a text: .*retry-limit"):
        loaded(["x" * 40])
