"""The content hash: in every configuration of open_clip each setting that changes a vector, and files beside it."""

import copy
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.open_clip_source import builtin_models, load_tokenizer, vector_settings
from tests.support import tiny_clips
from tests.support.parts import needs
from tests.support.tiny_clips import VOCABULARY, every_model, image_size, shake, small_timm_models, tiny_config
from tests.support.tiny_models import kind_of_tokenizer, write_tiny_model, write_tokenizer

QUICK = {"ViT-B-32", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "ViT-L-14-CLIPA", "coca_ViT-B-32"}
TEXTS = ["Two Dogs, run  across_it", 40 * "a red square "]
PARTS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
# Of training alone, or names of what is identified by its content.
WITHOUT_EFFECT = {"patch_dropout", "timm_drop", "timm_drop_path", "output_tokens", "hf_tokenizer_name"}
# They fetch weights, name a folder, or are refused.
NOT_TRIED = {"timm_model_pretrained", "hf_model_pretrained", "hf_model_name", "tokenizer_mode"}


def changed_settings(config: dict[str, Any], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of a setting of a tower, and the configuration with a value that other configurations have."""
    yield "quick_gelu", config | {"quick_gelu": not config.get("quick_gelu", False)}
    for field in fields(PARTS[part]):
        if field.name not in NOT_TRIED and is_read(field.name, config[part]):
            for value in other_values(part, field.name, config[part].get(field.name, field.default)):
                changed = copy.deepcopy(config)
                changed[part][field.name] = value
                yield field.name, changed


def is_read(key: str, values: dict[str, Any]) -> bool:
    """Return False for settings of another kind of tower."""
    if "timm_model_name" in values:
        return key.startswith("timm_")
    if "hf_model_name" in values:
        return key.startswith(("hf_", "tokenizer_")) or key == "context_length"
    return not key.startswith(("timm_", "hf_p"))


def other_values(part: str, key: str, value: Any) -> list[Any]:
    if key == "hf_tokenizer_name":
        return ["another/mirror"] if value else []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [2 * value or (1 if isinstance(value, int) else 0.1)]
    now, used = json.dumps(value), used_values(part, key)
    return [json.loads(each) for each in [*filter(now.__lt__, used), *filter(now.__gt__, used)][:2]]


@cache
def used_values(part: str, key: str) -> list[str]:
    """Return all values of a setting in built-in configurations, as JSON."""
    default = next(field.default for field in fields(PARTS[part]) if field.name == key)
    return sorted({json.dumps(config[part].get(key, default)) for config, _ in builtin_models().values()})


@dataclass
class Findings:
    """Settings of one tower that change a vector and keep the weights; those that the hash lacks; and needless ones."""

    decisive: set[str]
    hidden: set[str]
    idle: set[str]


class Half:
    """One tower of a shrunk model with everything that its vectors depend on."""

    def __init__(self, name: str, config: dict[str, Any], part: str, vocabulary: Path | None) -> None:
        given = {key: value for key, value in config.items() if key != "custom_text"}
        self.clip = open_clip.create_model(name, load_weights=False, **json.loads(json.dumps(given))).eval()
        self._part, self._config = part, config
        self._tokenizer, identity = load_tokenizer(config, vocabulary)
        self.sealed = vector_settings(self.clip, config, identity)

    def vectors(self) -> tuple[Tensor, list[Any]]:
        """Return the features of some inputs, and the token ids of some texts."""
        generator = torch.Generator().manual_seed(1)
        if self._part == "vision_cfg":
            side = image_size(self._config)
            pixels = torch.randn(1, 3, side, side, generator=generator)
            return self.clip.encode_image(pixels, normalize=False), []
        length = int(self._config["text_cfg"].get("context_length", 77))
        tokens = torch.randint(5, VOCABULARY - 5, (3, length), generator=generator)
        for i, row in enumerate(tokens):  # control tokens of every vocabulary, and padding
            row[:5], row[5 + i :], row[-1] = torch.tensor([0, 2, 4, 2, VOCABULARY - 1]), 0, i
        return self.clip.encode_text(tokens, normalize=False), [self._tokenizer(TEXTS).tolist(), self._tokenizer.layout]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_timm_models(), mock.patch.object(tiny_clips, "LAYERS", 1):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


known: dict[str, Findings] = {}  # by what a tower's vectors depend on, which many configurations share


def findings(name: str, part: str, directory: Path) -> Findings:
    config = open_clip.get_model_config(name) | tiny_config(name, directory)
    vocabulary = config["text_cfg"].get("hf_tokenizer_name")
    if vocabulary:
        kind = kind_of_tokenizer(vocabulary)
        vocabulary = directory / f"vocabulary of {kind}"
        if not vocabulary.is_dir():
            vocabulary.mkdir()
            write_tokenizer(kind, vocabulary)
    other = {"vision_cfg": "text_cfg", "text_cfg": "vision_cfg"}[part]
    own = {key: value for key, value in config[part].items() if key != "hf_tokenizer_name"}
    family = sorted({"timm_model_name", "hf_model_name", "multimodal_cfg"} & {*config[other], *config})
    layers = isinstance(config[other].get("layers"), list)
    whole = [part, own, str(vocabulary), family, layers, config.get("quick_gelu"), config.get("custom_text")]
    key = json.dumps(whole, sort_keys=True)
    if key not in known:
        with torch.no_grad():
            known[key] = compute_findings(name, config, part, vocabulary)
    return known[key]


def compute_findings(name: str, config: dict[str, Any], part: str, vocabulary: Path | None) -> Findings:
    usual = Half(name, config, part, vocabulary)
    shake(usual.clip)
    weights, (features, ids) = usual.clip.state_dict(), usual.vectors()
    result = Findings(set(), set(), set())
    for setting, changed in changed_settings(config, part):
        try:
            half = Half(name, changed, part, vocabulary)
            half.clip.load_state_dict(weights)
            changed_features, changed_ids = half.vectors()
            is_decisive = not torch.equal(changed_features, features) or changed_ids != ids
        except Exception:  # no such model, or one of other weights
            continue
        is_in_hash = half.sealed != usual.sealed
        if is_decisive:
            result.decisive.add(setting)
        if is_decisive and not is_in_hash:
            result.hidden.add(setting)
        if setting in WITHOUT_EFFECT and (is_decisive or is_in_hash):
            result.idle.add(setting)
    return result


@pytest.mark.parametrize("name", every_model(QUICK))
def test_a_setting_that_changes_a_vector_changes_the_hash(name: str, directory: Path) -> None:
    towers = [findings(name, part, directory) for part in PARTS]
    assert [tower.hidden for tower in towers] == [set(), set()]
    assert [tower.idle for tower in towers] == [set(), set()]
    assert len({"tokenizer_kwargs"}.union(*(tower.decisive for tower in towers))) >= 3, "the changes are seen"


SIGLIP2, PE_CORE, CLIPA = "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "ViT-L-14-CLIPA"
WORLDWIDE, XLM, PLAIN = "ViT-L-14-worldwide", "xlm-roberta-base-ViT-B-32", "ViT-B-32"


def content_hash(model: Path) -> str:
    backbone: Backbone = load_backbone(BackboneSource(str(model)))
    return backbone.content_hash()


def swap_words(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = (next(i for i, (piece, _) in enumerate(vocabulary) if piece == word) for word in ("▁red", "▁dogs"))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def set_config(part: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model_cfg"][part].update(values)


CHANGES: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    (WORLDWIDE, "tokenizer.json", swap_words),
    (WORLDWIDE, "tokenizer.json", lambda c: c["model"]["vocab"][-1].__setitem__(1, -9.0)),
    (WORLDWIDE, "tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
    (WORLDWIDE, "tokenizer.json", lambda c: c["pre_tokenizer"].update(prepend_scheme="never")),
    (SIGLIP2, "tokenizer.json", lambda c: c["model"]["merges"].pop()),
    (SIGLIP2, "tokenizer.json", lambda c: c["model"].update(byte_fallback=False)),
    (SIGLIP2, "tokenizer.json", lambda c: c["model"].update(fuse_unk=False)),
    (SIGLIP2, "tokenizer.json", lambda c: c["model"].update(dropout=0.5)),
    (SIGLIP2, "tokenizer.json", lambda c: c["added_tokens"][0].update(lstrip=True)),
    (SIGLIP2, "tokenizer_config.json", lambda c: c.update(pad_token="<eos>")),
    (SIGLIP2, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"].update(heads=4)),
    (CLIPA, "tokenizer.json", lambda c: c["model"].update(continuing_subword_prefix="")),
    (CLIPA, "tokenizer.json", lambda c: c["model"].update(max_input_chars_per_word=3)),
    (CLIPA, "tokenizer.json", lambda c: c["normalizer"].update(lowercase=False)),
    (XLM, "xlm-roberta/config.json", lambda c: c.update(num_attention_heads=4)),
    (XLM, "xlm-roberta/config.json", lambda c: c.update(layer_norm_eps=1e-3)),
    (XLM, "xlm-roberta/config.json", lambda c: c.update(is_decoder=True)),
    (PE_CORE, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(mean=[0.4, 0.5, 0.5])),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"]["tokenizer_kwargs"].update(clean="whitespace")),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"]["tokenizer_kwargs"].update(bpe_path="other.txt.gz")),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"].update(act_kwargs={"approximate": "tanh"})),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["vision_cfg"].update(act_kwargs={"approximate": "tanh"})),
    (PLAIN, MODEL_CONFIG, lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg")),
]


@pytest.mark.parametrize("name", [WORLDWIDE, SIGLIP2, CLIPA, PE_CORE, PLAIN, pytest.param(XLM, marks=needs("hf"))])
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
