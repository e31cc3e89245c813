"""Models that cannot be used: one clear line each, before anything is allocated or run."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import CONFIG, WEIGHTS, copy_checkpoint, load_checkpoint, read_config
from dcar_core.model.config import MODEL_CONFIG, ModelConfig
from dcar_core.model.dcar import DCAR
from dcar_core.model.methods.registry import METHODS, comparable_methods, default_method, require_runnable
from dcar_core.model.text import hub_tokenizer, tokenizer
from dcar_core.model.towers.image import NativeImage
from dcar_core.model.towers.text import NativeText
from dcar_core.util.errors import CheckpointError, MissingExtraError, ModelError
from tests.support.files import write_json

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji"


def edit(model: Path, part: str, **values: Any) -> BackboneSource:
    config = json.loads((model / MODEL_CONFIG).read_text())
    place = config["model_cfg"] if part == "model_cfg" else config["model_cfg"][part]
    place |= values
    (model / MODEL_CONFIG).write_text(json.dumps(config))
    return BackboneSource(str(model))


def test_bundled_fingerprints_are_unchanged() -> None:
    expected = "f7d9a15330fa66b50daef7417d917d478c3d53533c3d011ad9577823a3571119"
    assert load_backbone(BackboneSource(str(EXAMPLE / "base"))).content_hash() == expected
    assert read_config(EXAMPLE / "twemoji" / "checkpoint")["backbone"]["sha256"] == expected


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file({"some.weight": torch.zeros(3)}, str(tmp_path / "w.safetensors"))
    with pytest.raises(ModelError, match=r"w.safetensors are of another architecture than ViT-S-32-alt"):
        load_backbone(BackboneSource("ViT-S-32-alt", str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_another_model_are_refused_before_it_is_created(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = EXAMPLE / "base" / "open_clip_model.safetensors"
    if suffix == ".pt":
        state = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
        weights = tmp_path / "weights.pt"
        torch.save({"state_dict": state}, weights)
    monkeypatch.setattr(open_clip, "create_model", None)
    reason = r"of another architecture than RN50 \(positional_embedding is 32 x 192, not 77 x 512\); name the model"
    with pytest.raises(ModelError, match=reason):
        load_backbone(BackboneSource("RN50", str(weights)))


def test_directory_without_weights_is_refused(model: Path) -> None:
    (model / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded: Required pretrained weights"):
        load_backbone(BackboneSource(str(model)))


def test_a_model_of_images_that_are_not_square_is_refused(model: Path) -> None:
    source = edit(model, "vision_cfg", image_size=[32, 48])
    weights = model / "open_clip_model.safetensors"
    state = load_file(weights)
    place = state["visual.positional_embedding"]
    save_file(state | {"visual.positional_embedding": place[:1].repeat(1 + 4 * 6, 1)}, str(weights))
    with pytest.raises(ModelError, match=r"^the model takes images of 32 x 48 pixels; they must be square$"):
        load_backbone(source)


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
    [
        ("dcar", "dcar-text"),
        ("dcar+", r"dcar\+-text"),
        ("maple", "coop"),
        ("dcar-patches", "dcar-text"),
        ("block-adapters", r"dcar\+-text"),
    ],
)
def test_image_prompts_on_an_unsupported_tower_suggest_the_text_method(method: str, instead: str) -> None:
    with pytest.raises(ModelError, match=f"which the image tower of RN50 does not have; use the method {instead}$"):
        require_runnable(METHODS[method].config, "text", "RN50", 76)
    for name in ("clip", "coop", "clip-adapter", "dcar-text", "dcar+-text"):
        require_runnable(METHODS[name].config, "text", "RN50", 76)
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


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        ("prompt", {"length": "four"}, "prompt.length: Input should be a valid integer"),
        ("prompt", {"size": 1}, "prompt.size: Unexpected keyword argument"),
        ("prompt", {"text": 2}, "prompt.text: Input should be a valid boolean"),
        ("adapter", {"blocks": 2.5}, "adapter.blocks: Input should be a valid integer"),
        ("adapter", {"blocks": 5000}, "adapter.blocks: Input should be less than or equal to 4096"),
        ("reweight", {"strength": [0.5]}, "reweight.strength.float: Input should be a valid number"),
        ("reweight", {"query": ["none"]}, "reweight.query: Input should be 'none' or 'predicted'"),
        ("loss", None, "loss: Input should be a dictionary or an instance of LossConfig"),
        ("prompt", {"length": 31}, "31 prompts do not fit into the 31 tokens"),
        ("prompt", {"length": 2_000_000}, "2000000 prompts do not fit"),
        ("prompt", {"depth": 2_000_000}, "prompts for 2000000 blocks"),
    ],
)
def test_a_checkpoint_with_impossible_settings_is_refused_before_anything_is_allocated(
    tiny_checkpoint: Path, tmp_path: Path, part: str, values: dict[str, Any] | None, reason: str
) -> None:
    copy_checkpoint(tiny_checkpoint, tmp_path / "wrong")
    content = read_config(tmp_path / "wrong")
    content["model"][part] = content["model"][part] | values if values else values
    (tmp_path / "wrong" / CONFIG).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(tmp_path / "wrong")


def test_weights_that_are_not_finite_are_reported_as_such(model: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy_checkpoint(tiny_checkpoint, tmp_path / "trained")
    for file, error in (
        (model / "open_clip_model.safetensors", ModelError),
        (tmp_path / "trained" / WEIGHTS, CheckpointError),
    ):
        weights = load_file(file)
        name = max(weights, key=lambda each: weights[each].numel())
        weights[name].view(-1)[0] = float("nan")
        save_file(weights, file)
        with pytest.raises(error, match=f"{file.name} .*not finite, in {name}"):
            Encoder.load(file.parent, device="cpu", runtime="auto")


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
    loaded = hub_tokenizer.load_hub_tokenizer("a/name", tmp_path, 77)
    assert loaded(["a"]).tolist() == [[2, 0, 2]]
    with pytest.raises(ModelError, match=r"the model's tokenizer fails on a text: .*retry-limit"):
        loaded(["x" * 40])
