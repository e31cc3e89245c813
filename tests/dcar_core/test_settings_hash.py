"""The content hash: in every configuration of open_clip each setting that changes a vector, and files beside it."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.open_clip_source import load_tokenizer, tower_settings
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.settings_hash import vector_settings
from tests.support import tiny_clips
from tests.support.config_changes import PARTS, WITHOUT_EFFECT, changed_settings
from tests.support.parts import needs
from tests.support.tiny_clips import VOCABULARY, every_model, image_size, shake, small_timm_models, tiny_config
from tests.support.tiny_models import kind_of_tokenizer, write_tiny_model, write_tokenizer

NAMES = sorted(open_clip.list_models())
QUICK = {"ViT-B-32", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "ViT-L-14-CLIPA", "coca_ViT-B-32"}
TEXTS = ["Two Dogs, run  across_it", 40 * "a red square "]


class Findings(NamedTuple):
    """Settings of one tower. decisive: they change a vector and keep the weights. hidden: so, but not the hash.

    idle: they change no vector and must not change the hash, but do.
    """

    decisive: set[str]
    hidden: set[str]
    idle: set[str]


class Half:
    """One tower of a shrunk model with everything that its vectors depend on; the weights are those of `state`."""

    def __init__(self, name: str, config: dict[str, Any], part: str, vocabulary: Path | None) -> None:
        given = {key: value for key, value in config.items() if key != "custom_text"}
        self.clip = open_clip.create_model(name, load_weights=False, **json.loads(json.dumps(given))).eval()
        self._part, self._config = part, config
        self._tokenizer, identity = load_tokenizer(config, vocabulary)
        self.sealed = vector_settings(self.clip, tower_settings(config), identity)

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


found: dict[str, Findings] = {}  # by what a tower's vectors depend on, which many configurations share


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
    if key not in found:
        with torch.no_grad():
            found[key] = _findings(name, config, part, vocabulary)
    return found[key]


def _findings(name: str, config: dict[str, Any], part: str, vocabulary: Path | None) -> Findings:
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


def test_every_preprocessing_of_a_pretrained_model_is_in_the_hash() -> None:
    """Its settings are those that open_clip keeps beside the names of weights, at a small size."""
    configs = {
        json.dumps({**open_clip.transform.PreprocessCfg().__dict__, **tag, "size": 32}, sort_keys=True)
        for name in NAMES
        for pretrained in open_clip.list_pretrained_tags_by_model(name)
        for tag in [_preprocessing(name, pretrained)]
    }
    assert len(configs) > 3
    values: dict[str, list[Any]] = {
        "size": [24], "mean": [[0.1, 0.5, 0.5]], "std": [[0.5, 0.5, 0.1]], "interpolation": ["bilinear", "bicubic"],
        "resize_mode": ["shortest", "squash", "longest"], "fill_color": [0, 255], "mode": ["RGB"],
    }  # fmt: skip
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    for config in map(json.loads, configs):
        usual, decisive = Preprocess.from_open_clip(config), set[str]()
        pixels = usual.normalize(usual(picture)[None])
        for key, others in values.items():
            for value in others:
                changed = Preprocess.from_open_clip(config | {key: value})
                if not np.array_equal(changed.normalize(changed(picture)[None]), pixels):
                    decisive.add(key)
                    assert changed.to_dict() != usual.to_dict(), key
        assert {"size", "mean", "std", "interpolation", "resize_mode"} <= decisive <= values.keys() - {"mode"}


def _preprocessing(name: str, pretrained: str) -> dict[str, Any]:
    known = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    return {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}


SIGLIP2, PE_CORE, CLIPA = "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "ViT-L-14-CLIPA"
WORLDWIDE, XLM = "ViT-L-14-worldwide", "xlm-roberta-base-ViT-B-32"


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
        (SIGLIP2, "tokenizer.json", lambda c: c["model"].update(fuse_unk=False)),
        (SIGLIP2, "tokenizer.json", lambda c: c["model"].update(dropout=0.5)),
        (SIGLIP2, "tokenizer.json", lambda c: c["added_tokens"][0].update(lstrip=True)),
        (CLIPA, "tokenizer.json", lambda c: c["model"].update(continuing_subword_prefix="")),
        (CLIPA, "tokenizer.json", lambda c: c["model"].update(max_input_chars_per_word=3)),
        (SIGLIP2, "tokenizer_config.json", lambda c: c.update(pad_token="<eos>")),
        (CLIPA, "tokenizer.json", lambda c: c["normalizer"].update(lowercase=False)),
        pytest.param(XLM, "xlm-roberta/config.json", lambda c: c.update(num_attention_heads=4), marks=needs("hf")),
        pytest.param(XLM, "xlm-roberta/config.json", lambda c: c.update(layer_norm_eps=1e-3), marks=needs("hf")),
        pytest.param(XLM, "xlm-roberta/config.json", lambda c: c.update(is_decoder=True), marks=needs("hf")),
        (SIGLIP2, MODEL_CONFIG, lambda c: c["model_cfg"]["text_cfg"].update(heads=4)),
        (PE_CORE, MODEL_CONFIG, lambda c: c["preprocess_cfg"].update(mean=[0.4, 0.5, 0.5])),
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
    path, before = models(name)
    assert changed(path, tmp_path / "copy", file, change) != before


def test_it_knows_which_tower_has_an_unusual_setting(tmp_path: Path) -> None:
    path = write_tiny_model("ViT-B-32", tmp_path / "model")
    with gzip.open(path / "other.txt.gz", "wt") as file:  # other merges
        file.write("version\n" + "c a\nca t</w>\n" * 2)

    def setting(part: str, **values: Any) -> str:
        copy = tmp_path / f"{part} {values}"
        return changed(path, copy, MODEL_CONFIG, lambda content: content["model_cfg"][part].update(values))

    settings: list[dict[str, Any]] = [{"act_kwargs": {"approximate": "tanh"}}, {"norm_kwargs": {"eps": 1e-3}}]
    hashes = {setting(part, **each) for part in ("vision_cfg", "text_cfg") for each in settings}
    for each in ({"bpe_path": "bpe.txt.gz", "clean": "whitespace"}, {"bpe_path": "other.txt.gz"}):
        hashes.add(setting("text_cfg", tokenizer_kwargs=each))
    hashes.add(setting("vision_cfg", pool_type="avg"))
    assert len(hashes | {content_hash(path)}) == 8
