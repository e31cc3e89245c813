"""`Encoder`: vectors, fingerprints, checkpoints that move, and input that is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import (
    compute_fingerprint,
    copy_checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
    save_zero_shot,
)
from dcar_core.model.config import AdapterConfig, LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.model.dcar import DCAR
from dcar_core.util.errors import CheckpointError, ImageError, ModelError


def test_vectors_are_normalised_and_independent_of_the_batch(tiny_checkpoint: Path, tiny_gallery: Path) -> None:
    encoder = Encoder.load(tiny_checkpoint)
    texts = ["a red square", "circle", "a long caption that goes on for a while, then ends", ""]
    together = encoder.encode_text(texts)
    assert together.shape == (4, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    alone = np.concatenate([encoder.encode_text([t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    paths = sorted(tiny_gallery.glob("circle/*.png"))
    by_path = encoder.encode_images(paths)
    np.testing.assert_allclose(np.linalg.norm(by_path, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(by_path, encoder.encode_images([p.read_bytes() for p in paths], batch_size=2), atol=1e-6)
    np.testing.assert_allclose(by_path, encoder.encode_images([Image.open(p) for p in paths]), atol=1e-6)
    assert encoder.encode_text([]).shape == (0, 32)


def test_preprocess_equals_open_clips_transform(tiny_model: Path) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    rng = np.random.default_rng(0)
    preprocess = Encoder.load(tiny_model).preprocess
    for height, width in ((57, 83), (64, 70), (70, 64)):  # of 35 pixels, 32 are cut out from the second on
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for mode in ("squash", "shortest", "longest"):
            for interpolation in ("bicubic", "bilinear"):
                config = PreprocessCfg(32, "RGB", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), interpolation, mode, 114)
                ours = type(preprocess).from_open_clip(asdict(config))
                theirs = image_transform_v2(config, is_train=False)(picture)
                np.testing.assert_allclose(ours.normalize(ours(picture)[None])[0], theirs.numpy(), atol=2e-6)
    line = type(preprocess)(32, preprocess.mean, preprocess.std, resize="longest")(Image.new("RGB", (200, 1), "white"))
    assert (line.reshape(3, -1) == 255).sum() == 3 * 32  # a side never rounds to nothing


def test_fingerprint_covers_vectors_and_nothing_else() -> None:
    weights = {"prompts.text": np.zeros((1, 4, 8), np.float32)}
    fingerprint = compute_fingerprint("backbone", ModelConfig(), weights)
    loss, options = LossConfig(category=0.1, anchor=2.0), ReweightConfig(token_feature="alone", image_feature="patches")
    assert compute_fingerprint("backbone", ModelConfig(loss=loss, reweight=options), weights) == fingerprint
    others = [
        compute_fingerprint("another", ModelConfig(), weights),
        compute_fingerprint("backbone", ModelConfig(prompt=PromptConfig(image=False)), weights),
        compute_fingerprint("backbone", ModelConfig(reweight=ReweightConfig(high=3.0)), weights),
        compute_fingerprint("backbone", ModelConfig(adapter=AdapterConfig(text=True)), weights),
        compute_fingerprint("backbone", ModelConfig(), {"prompts.text": np.ones((1, 4, 8), np.float32)}),
        compute_fingerprint("backbone", ModelConfig(), {"prompts.text": np.zeros((2, 2, 8), np.float32)}),
    ]
    assert len({fingerprint, *others}) == 7


@pytest.mark.slow
def test_checkpoint_can_move_together_with_its_backbone(tiny_model: Path, tmp_path: Path) -> None:
    """A model's directory and a file of weights are both found from where the checkpoint is."""
    here, there = tmp_path / "here", tmp_path / "there"
    base = Path(shutil.copytree(tiny_model, here / "base"))
    model = DCAR(load_backbone(BackboneSource(str(base))), ModelConfig())
    fingerprint = save_checkpoint(model, here / "checkpoint")
    model.backbone.source = BackboneSource("ViT-B-32", str(base / "open_clip_model.safetensors"))
    save_checkpoint(model, here / "named")
    here.rename(there)
    assert load_checkpoint(there / "checkpoint")[1] == fingerprint
    copy_checkpoint(there / "named", tmp_path / "copy")
    weights = read_config(tmp_path / "copy")["backbone"]["pretrained"]
    assert Path(weights) == (there / "base" / "open_clip_model.safetensors").resolve()


def test_broken_checkpoints_are_refused_with_the_reason(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs config\.json"):
        load_checkpoint(tmp_path)
    copy_checkpoint(tiny_checkpoint, tmp_path)
    good = (tmp_path / "config.json").read_text()
    content = json.loads(good)
    incomplete, model = "has no valid model, backbone, fingerprint or training", content["model"]
    tuning = {"scope": "attention", "rank": 10**15}
    for changed, message in (
        (good.replace('"depth": 1', '"depth": 2'), "does not fit"),
        (good.replace('"sha256": "', '"sha256": "0'), "trained on another backbone"),
        (good.replace('"query": "none"', '"query": "predicted"'), "are of different trainings"),
        (good.replace('"format": 1', '"format": 2'), "is not format 1; train again"),
        ('{"format": 1}', incomplete),
        ({"fingerprint": None}, incomplete),
        ({"training": [1]}, incomplete),
        (f'{{"format": 1, "model": {"[" * 200_000}{"]" * 200_000}}}', "is not JSON: nested too deeply"),
        ({"backbone": {**content["backbone"], "model": 5}}, incomplete),
        ({"model": {**model, "adapter": {**model.get("adapter", {}), "blocks": 10**15}}}, "blocks: Input should be"),
        ({"model": {**model, "fine_tune": tuning}}, "fine_tune: Unexpected keyword argument"),
    ):
        text = changed if isinstance(changed, str) else json.dumps(content | changed)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(good)
    (tmp_path / "trainables.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_only_trainables_are_saved(tiny_checkpoint: Path) -> None:
    from safetensors.torch import load_file

    names = set(load_file(str(tiny_checkpoint / "trainables.safetensors")))
    assert "prompts.text" in names
    assert not any(name.startswith("backbone") for name in names)


def test_query_weights_come_from_the_text_alone(tiny_model: Path) -> None:
    model = DCAR(load_backbone(BackboneSource(str(tiny_model))), ModelConfig().with_query_weights("predicted"))
    assert model.head is not None
    tokens = model.backbone.tokenize(["a red square"], model.prompt_tokens)
    with torch.no_grad():
        untrained = model.encode_query(tokens)
        torch.testing.assert_close(untrained, model.encode_text(tokens))
        model.head.linear.weight.normal_()
        weights = model.predicted_weights(tokens)
        assert weights is not None
        assert weights[0, 0] == weights[0, -1] == 1  # SOS and EOT
        torch.testing.assert_close(model.encode_query(tokens), model.encode_text(tokens, weights))
        assert not torch.allclose(model.encode_query(tokens), untrained, atol=1e-4)


def test_a_missing_device_is_named() -> None:
    with pytest.raises(ModelError, match="no device 'cuda:99'"):
        Encoder.load("unused", device="cuda:99")


def test_single_text_or_image_instead_of_a_list_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_checkpoint, device="cpu")
    for texts in ("crying cat", (each for each in ["crying cat"]), [None], ["crying cat", 3]):
        with pytest.raises(TypeError, match="list of texts"):
            encoder.encode_text(texts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not ndarray"):
        encoder.encode_images([np.zeros((8, 8, 3), np.uint8)])  # type: ignore[list-item]
    for picture in ("a.png", Path("a.png"), b"bytes", Image.new("RGB", (8, 8))):
        with pytest.raises(TypeError, match="list of images"):
            encoder.encode_images(picture)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        encoder.encode_images([Image.new("RGB", (8, 8)), tmp_path / "nowhere.png"])


def test_zero_shot_checkpoint_gives_the_models_vectors(tiny_model: Path, tiny_gallery: Path, tmp_path: Path) -> None:
    given = ["zero-shot", "--model", str(tiny_model), "--out", str(tmp_path / "clip")]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.output.startswith(f"{tmp_path / 'clip'}: {tiny_model} unadapted, fingerprint ")
    encoder, backbone = Encoder.load(tmp_path / "clip"), load_backbone(BackboneSource(str(tiny_model)))
    assert encoder.fingerprint.startswith(done.output.split()[-1])
    texts = ["a red circle", "a blue square"]
    plain = backbone.encode_text(backbone.tokenize(texts)).detach().numpy()
    plain /= np.linalg.norm(plain, axis=-1, keepdims=True)
    np.testing.assert_allclose(encoder.encode_text(texts), plain, atol=1e-5)
    again = CliRunner().invoke(app, given, catch_exceptions=False)
    assert again.output == done.output, "the same once more"


def test_trained_checkpoint_is_not_overwritten(tiny_model: Path, tiny_checkpoint: Path) -> None:
    before = (tiny_checkpoint / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a trained checkpoint of dcar; name another --out"):
        save_zero_shot(load_backbone(BackboneSource(str(tiny_model))), tiny_checkpoint)
    assert (tiny_checkpoint / "config.json").read_bytes() == before


def test_model_instead_of_a_checkpoint_names_the_command(tiny_model: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"it is a model: `dcar zero-shot --model \S+ --out DIR` makes a checkpoint of it"
    ):
        read_config(tiny_model)
    with pytest.raises(CheckpointError, match=r"as `dcar train --out` writes them$"):
        read_config(tiny_model.parent)
