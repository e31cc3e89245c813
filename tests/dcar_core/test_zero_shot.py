"""A model as it is, as a checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import read_config, save_zero_shot
from dcar_core.util.errors import CheckpointError


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
