"""The content hash changes with the files of a model directory; see test_settings_hash.py for every setting."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from tests.support.parts import needs
from tests.support.tiny_clips import small_timm_models
from tests.support.tiny_models import write_tiny_model

SIGLIP2, PE_CORE, CLIPA = "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "ViT-L-14-CLIPA"
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


def test_it_keeps_where_nothing_decides_on_vectors(models: Callable[[str], tuple[Path, str]], tmp_path: Path) -> None:
    path, before = models(SIGLIP2)

    def rename(content: dict[str, Any]) -> None:
        content["model_cfg"]["vision_cfg"] |= {"timm_drop": 0.1, "timm_model_pretrained": True}
        content["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "another/mirror"}

    assert changed(path, tmp_path / "copy", MODEL_CONFIG, rename) == before


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
