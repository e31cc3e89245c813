"""A method with encoders of its own, and names that no method has."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core import Encoder
from dcar_core.model.backbone import Backbone
from dcar_core.model.checkpoint import load_checkpoint, save_checkpoint
from dcar_core.model.config import plain_config
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import (
    METHODS,
    Method,
    find_method,
)
from dcar_core.util.errors import DcarError, ModelError


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(
        2,
        3,
        32,
        32,
        generator=torch.Generator().manual_seed(0),
    )


class Shifted(nn.Module):
    """Encoders that add a learned vector to the backbone's features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(backbone.embed_dim))

    def encode_text(self, backbone: Backbone, tokens: Tensor, rows: bool) -> Tensor:
        return backbone.encode_text(tokens, rows=rows) + self.shift

    def encode_image(self, backbone: Backbone, pixels: Tensor, rows: bool) -> Tensor:
        return backbone.encode_image(pixels, rows=rows) + self.shift


@torch.no_grad()
def test_encoders_of_a_plugin_are_in_its_checkpoint_but_no_runtime_serves_them(
    backbone: Backbone,
    pixels: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = backbone.tokenize(["a red square", "a blue cross"])
    with monkeypatch.context() as installed:
        installed.setitem(
            METHODS,
            "shifted",
            Method(config=plain_config("shifted"), encoders=Shifted),
        )
        model = seeded_model(backbone, find_method("shifted").config, 0)
        assert [name for name, _ in model.trainables()] == ["encoders.shift"]
        assert model.text_is_frozen is False
        assert model.image_is_frozen is False
        save_checkpoint(model, tmp_path)
        loaded, _ = load_checkpoint(tmp_path)
        expected = F.normalize(
            backbone.encode_text(tokens) + dict(model.trainables())["encoders.shift"],
            dim=-1,
        )
        torch.testing.assert_close(
            [model.encode_text(tokens), loaded.encode_text(tokens)], [expected] * 2
        )
        torch.testing.assert_close(
            loaded.encode_image(pixels), model.encode_image(pixels)
        )
        for runtime in ("torch", "openvino"):
            with pytest.raises(
                ModelError,
                match="shifted can be compared by `dcar evaluate`, but not served",
            ):
                Encoder.load(tmp_path, runtime=runtime)
    with pytest.raises(DcarError, match="no method is named 'shifted'"):
        load_checkpoint(tmp_path)
