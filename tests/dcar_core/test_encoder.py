"""`Encoder`: vectors, fingerprints, checkpoints, mixed batches, mapped weights, and
input that is refused.
"""

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from dcar_core import Encoder
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.checkpoint import (
    CONFIG,
    WEIGHTS,
    compute_fingerprint,
    copy_checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
    save_zero_shot,
)
from dcar_core.model.config import (
    AdapterConfig,
    LossConfig,
    ModelConfig,
    PromptConfig,
    ReweightConfig,
)
from dcar_core.model.dcar import DCAR
from dcar_core.util.errors import CheckpointError, ImageError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE, release_pages
from tests.support.random_clip import MODEL, write_model


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return Encoder.load(tiny_checkpoint, device="cpu")


def test_vectors_are_normalised_and_independent_of_the_batch(
    encoder: Encoder, tiny_gallery: Path
) -> None:
    texts = [
        "a red square",
        "circle",
        "a long caption that goes on for a while, then ends",
        "",
    ]
    together = encoder.encode_text(texts)
    assert together.shape == (4, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    alone = np.concatenate([encoder.encode_text([t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    paths = sorted(tiny_gallery.glob("circle/*.png"))
    by_path = encoder.encode_images(paths)
    np.testing.assert_allclose(np.linalg.norm(by_path, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        by_path,
        encoder.encode_images([p.read_bytes() for p in paths], batch_size=2),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        by_path,
        encoder.encode_images([Image.open(p) for p in paths]),
        atol=1e-6,
    )
    assert encoder.encode_text([]).shape == (0, 32)


def test_fingerprint_covers_vectors_and_nothing_else() -> None:
    weights = {"prompts.text": np.zeros((1, 4, 8), np.float32)}
    fingerprint = compute_fingerprint("backbone", ModelConfig(), weights)
    loss = LossConfig(category=0.1, anchor=2.0)
    options = ReweightConfig(token_feature="alone", image_feature="patches")
    assert (
        compute_fingerprint(
            "backbone",
            ModelConfig(loss=loss, reweight=options),
            weights,
        )
        == fingerprint
    )
    others = [
        compute_fingerprint("another", ModelConfig(), weights),
        compute_fingerprint(
            "backbone",
            ModelConfig(prompt=PromptConfig(image=False)),
            weights,
        ),
        compute_fingerprint(
            "backbone",
            ModelConfig(reweight=ReweightConfig(high=3.0)),
            weights,
        ),
        compute_fingerprint(
            "backbone",
            ModelConfig(adapter=AdapterConfig(text=True)),
            weights,
        ),
        compute_fingerprint(
            "backbone",
            ModelConfig(),
            {"prompts.text": np.ones((1, 4, 8), np.float32)},
        ),
        compute_fingerprint(
            "backbone",
            ModelConfig(),
            {"prompts.text": np.zeros((2, 2, 8), np.float32)},
        ),
    ]
    assert len({fingerprint, *others}) == 7


@pytest.mark.slow
def test_checkpoint_can_move_together_with_its_backbone(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A model's directory and a file of weights are both found from where the
    checkpoint is.
    """
    here = tmp_path / "here"
    there = tmp_path / "there"
    base = Path(shutil.copytree(tiny_model, here / "base"))
    model = DCAR(load_backbone(BackboneSource(str(base))), ModelConfig())
    fingerprint = save_checkpoint(model, here / "checkpoint")
    model.backbone.source = BackboneSource(
        "ViT-B-32", str(base / "open_clip_model.safetensors")
    )
    save_checkpoint(model, here / "named")
    here.rename(there)
    assert load_checkpoint(there / "checkpoint")[1] == fingerprint
    copy_checkpoint(there / "named", tmp_path / "copy")
    weights = read_config(tmp_path / "copy")["backbone"]["pretrained"]
    assert Path(weights) == (there / "base" / "open_clip_model.safetensors").resolve()


def test_broken_checkpoints_are_refused_with_the_reason(
    tiny_checkpoint: Path,
    tiny_model: Path,
    tmp_path: Path,
    backbone: Backbone,
) -> None:
    with pytest.raises(CheckpointError, match=r"needs config\.json"):
        load_checkpoint(tmp_path)
    copy_checkpoint(tiny_checkpoint, tmp_path)
    assert all(
        not name.startswith("backbone") for name in load_file(tmp_path / WEIGHTS)
    )
    good = (tmp_path / CONFIG).read_text()
    content = json.loads(good)
    incomplete = "is not complete, or not of format 1; copy it again"
    model = content["model"]

    def part(name: str, **values: object) -> dict[str, object]:
        return {"model": {**model, name: {**model[name], **values}}}

    cases: list[tuple[str | dict[str, object], str]] = [
        (good.replace('"depth": 1', '"depth": 2'), "are of different trainings"),
        (good.replace('"sha256": "', '"sha256": "0'), "trained on another backbone"),
        (
            good.replace('"query": "none"', '"query": "predicted"'),
            "are of different trainings",
        ),
        (good.replace('"format": 1', '"format": 2'), incomplete),
        ('{"format": 1}', incomplete),
        (
            f'{{"format": 1, "model": {"[" * 200_000}{"]" * 200_000}}}',
            "is not JSON: nested too deeply",
        ),
        ({"backbone": {**content["backbone"], "model": 5}}, incomplete),
        (
            {"model": {**model, "fine_tune": {"rank": 10**15}}},
            "this release: .*fine_tune: Unexpected .*; train again",
        ),
        (
            part("prompt", length="four"),
            "prompt.length: Input should be a valid integer",
        ),
        (
            part("adapter", blocks=5000),
            "adapter.blocks: Input should be less than or equal to 4096",
        ),
        (
            part("prompt", depth=2_000_000),
            "prompt.depth: Input should be less than or equal to 128",
        ),
        (part("prompt", length=31), "are of different trainings"),
    ]
    for changed, message in cases:
        (tmp_path / CONFIG).write_text(
            changed if isinstance(changed, str) else json.dumps(content | changed)
        )
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
    (tmp_path / CONFIG).write_text(good)
    (tmp_path / WEIGHTS).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"as `dcar train` and `dcar zero-shot` write$"
    ):
        read_config(tiny_model)
    with pytest.raises(
        CheckpointError, match=r"holds a trained checkpoint; name another --out"
    ):
        save_zero_shot(backbone.source, tmp_path)
    assert (tmp_path / CONFIG).read_text() == good


def test_query_weights_come_from_the_text_alone(backbone: Backbone) -> None:
    model = DCAR(backbone, ModelConfig(reweight=ReweightConfig(query="predicted")))
    assert model.head is not None
    tokens = backbone.tokenize(["a red square"], model.prompt_tokens)
    with torch.no_grad():
        untrained = model.encode_query(tokens)
        torch.testing.assert_close(untrained, model.encode_text(tokens))
        model.head.linear.weight.normal_()
        weights = model.predicted_weights(tokens)
        assert weights is not None
        assert weights[0, 0] == weights[0, -1] == 1  # SOS and EOT
        torch.testing.assert_close(
            model.encode_query(tokens), model.encode_text(tokens, weights)
        )
        assert not torch.allclose(model.encode_query(tokens), untrained, atol=1e-4)


def test_input_that_is_no_list_of_texts_or_images_is_refused(
    encoder: Encoder, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        encoder.encode_text("crying cat")
    for picture in (
        "a.png",
        Path("a.png"),
        b"bytes",
        Image.new("RGB", (8, 8)),
    ):
        with pytest.raises(TypeError, match="list of images"):
            encoder.encode_images(picture)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        encoder.encode_images([Image.new("RGB", (8, 8)), tmp_path / "nowhere.png"])
    with pytest.raises(ModelError, match="no device 'cuda:99'"):
        Encoder.load("unused", device="cuda:99")


@pytest.mark.parametrize("reads_padding", [False, True])
def test_zero_shot_checkpoint_gives_the_models_vectors(
    reads_padding: bool, tmp_path: Path
) -> None:
    text = MODEL["text_cfg"] | {"no_causal_mask": reads_padding}
    backbone = load_backbone(
        BackboneSource(
            str(write_model(tmp_path / "model", text_cfg=text, custom_text=True))
        )
    )
    first = save_zero_shot(backbone.source, tmp_path / "clip")
    again = save_zero_shot(backbone.source, tmp_path / "clip")
    encoder = Encoder.load(tmp_path / "clip")
    assert (
        first
        == again
        == encoder.fingerprint
        == Encoder.load(tmp_path / "model").fingerprint
    )
    texts = ["a red circle", "a blue square"]
    tokens = backbone.tokenize(texts)
    whole = F.pad(tokens, (0, text["context_length"] - tokens.shape[1]))
    plain = F.normalize(backbone.encode_text(whole), dim=-1)
    np.testing.assert_allclose(
        encoder.encode_text(texts),
        plain.detach().numpy(),
        atol=1e-5,
    )


TEXTS = (
    "a red square",
    "circle",
    "a rather long caption, with a comma in it",
    "x",
    "a blue cross on white",
)
MIXED = {
    "a": ModelConfig(),
    "b": ModelConfig(reweight=ReweightConfig(query="predicted")),
    "c": ModelConfig(adapter=AdapterConfig(text=True, image=True)),
    "deep": ModelConfig(prompt=PromptConfig(depth=2)),
    "short": ModelConfig(prompt=PromptConfig(length=2)),
    "coop": ModelConfig(prompt=PromptConfig(image=False)),
    "clip": ModelConfig(prompt=PromptConfig(length=0)),
    "d": ModelConfig(adapter=AdapterConfig(image=True, blocks=4)),
    "e": ModelConfig(adapter=AdapterConfig(image=True, blocks=4)),
}
SHAPES = ("deep", "short", "coop", "clip")


@pytest.fixture(scope="module")
def encoders(
    backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Encoder]:
    """Different in all that may differ, on one backbone."""
    root = tmp_path_factory.mktemp("mixed")
    for seed, (name, config) in enumerate(MIXED.items()):
        torch.manual_seed(seed)
        model = DCAR(backbone, config)
        with torch.no_grad():
            for _, parameter in model.trainables():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_checkpoint(model, root / name)
    return {
        name: Encoder.load(root / name, device="cpu", backbone=backbone)
        for name in MIXED
    }


@pytest.mark.parametrize(
    ("names", "text_passes", "image_passes"),
    [
        ("abc", 1, 1),
        ("ade", 1, 2),
        (["a", "b", *SHAPES], 3, 4),
    ],
)
def test_mixed_rows_equal_each_encoder_alone(
    encoders: dict[str, Encoder],
    names: list[str],
    text_passes: int,
    image_passes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # so length alone does not split a batch
    monkeypatch.setattr("dcar_core.encoder.state.PASS_COST", 10_000)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    texts = [(encoders[name].state, text) for text, name in product(TEXTS, names)]
    images = [(encoders[name].state, image) for image, name in product(pixels, names)]
    runtime = encoders[names[0]].runtime
    with mock.patch.object(runtime, "text", wraps=runtime.text) as text_tower:
        mixed = runtime.encode_texts(texts)
    with mock.patch.object(runtime, "image", wraps=runtime.image) as image_tower:
        mixed_images = runtime.encode_images(images)
    assert text_tower.call_count == text_passes
    assert image_tower.call_count == image_passes
    for text, vector in zip(texts, mixed, strict=True):
        np.testing.assert_allclose(vector, runtime.encode_texts([text])[0], atol=2e-6)
    for image, vector in zip(images, mixed_images, strict=True):
        np.testing.assert_allclose(vector, runtime.encode_images([image])[0], atol=2e-6)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped(file: Path) -> int:
    """Bytes of the file that are mapped and in memory."""
    parts = Path("/proc/self/smaps").read_text().split(str(file.resolve()) + "\n")[1:]
    return sum(1024 * int(part.split("Rss:")[1].split()[0]) for part in parts)


@linux
def test_weights_are_mapped_from_their_file_and_released(
    model: Path, tmp_path: Path
) -> None:
    file = model / WEIGHTS_FILE
    encoder = Encoder.load(model, cache=tmp_path / "cache")
    weights = encoder.model.backbone.clip.state_dict()
    assert all(
        torch.equal(weights[name], value) for name, value in load_file(file).items()
    )
    assert not any(
        weight.requires_grad for weight in encoder.model.backbone.parameters()
    )
    texts = ["a red square"]
    pixels = np.zeros((1, 3, 32, 32), np.uint8)
    before = encoder.encode_text(texts), encoder.encode_pixels(pixels)
    assert mapped(file) > 0
    encoder.release()
    assert mapped(file) == 0
    np.testing.assert_array_equal(encoder.encode_text(texts), before[0])
    np.testing.assert_array_equal(encoder.encode_pixels(pixels), before[1])
    weights["logit_scale"].fill_(3.0)
    release_pages([model])
    assert weights["logit_scale"].item() == 3.0, "written pages are kept"
