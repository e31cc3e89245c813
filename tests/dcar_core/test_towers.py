"""The towers of every open_clip configuration, shrunk: equal to the stock encoders, and open to prompts."""

from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from dcar_core.model.towers.select import level_of, level_of_config, reads_padding, select_towers
from tests.support.tiny_clips import WIDTH, TinyClip, every_model, tiny_clip

NAMES = sorted(open_clip.list_models())
QUICK = {"RN50", "ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32", "roberta-ViT-B-32", "convnext_base"}
TEXT_LEVEL = ("RN", "convnext", "swin", "vit_relpos", "MobileCLIP-S", "MobileCLIP2-S")


def expected_level(name: str) -> str:
    return "text" if name.startswith(TEXT_LEVEL) else "full"


def test_every_configuration_is_counted() -> None:
    assert Counter(map(expected_level, NAMES)) == {"full": 115, "text": 29}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.mark.parametrize("name", every_model(QUICK))
def test_towers_equal_open_clip_and_take_prompts(name: str, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_clip(name, directory)
    text, image = select_towers(model.clip, model.layout, model.caption, model.size)
    assert level_of(text, image) == expected_level(name), caplog.text
    config = open_clip.get_model_config(name)
    assert level_of_config(config) == expected_level(name)
    assert reads_padding(config["text_cfg"]) == text.layout.reads_padding
    whole, pixels = model.tokens(3, 9), model.pixels(2)
    trimmed = whole[:, : int(text.layout.lengths(whole).max())]
    with torch.no_grad():
        stock = model.clip.encode_text(whole, normalize=False)
        assert torch.equal(text.encode(whole), stock)
        assert torch.equal(image.encode(pixels), model.clip.encode_image(pixels, normalize=False))
        close(text.encode(trimmed), stock)
        close(text.encode(trimmed, weights=torch.ones(trimmed.shape)), stock)
        weighted = text.encode(trimmed, weights=torch.full(trimmed.shape, 1.5))
        assert not torch.allclose(weighted, stock, atol=1e-3)
        assert text.token_features(trimmed).shape == (*trimmed.shape, stock.shape[1])
    check_words_as_prompts(model, text, trimmed[1:])
    check_text_prompts(text, trimmed)
    if image.width:
        check_image_prompts(image, pixels)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def check_words_as_prompts(model: TinyClip, text: object, tokens: Tensor) -> None:
    start = model.layout.start
    prompts = text.embed(tokens[:, start : start + 4])  # type: ignore[attr-defined]
    rest = torch.cat([tokens[:, :start], tokens[:, start + 4 :]], 1)
    close(text.encode(rest, prompts), text.encode(tokens))  # type: ignore[attr-defined]


def check_text_prompts(text: object, tokens: Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    shared = (0.1 * torch.randn(2, 3, WIDTH, generator=generator)).requires_grad_()
    rows = 0.1 * torch.randn(2, 2, 3, WIDTH, generator=generator)
    found = text.encode(tokens, shared)  # type: ignore[attr-defined]
    found.square().sum().backward()
    assert shared.grad is not None
    assert (shared.grad.abs().amax((1, 2)) > 0).all(), "both depths are reached"
    check_rows(lambda i, prompts: text.encode(tokens[i], prompts), rows)  # type: ignore[attr-defined]


def check_image_prompts(image: object, pixels: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    width = image.width  # type: ignore[attr-defined]
    shared = (0.1 * torch.randn(2, 3, width, generator=generator)).requires_grad_()
    rows = 0.1 * torch.randn(2, 2, 3, width, generator=generator)
    image.encode(pixels, shared).square().sum().backward()  # type: ignore[attr-defined]
    assert shared.grad is not None
    assert (shared.grad.abs().amax((1, 2)) > 0).all(), "both depths are reached"
    check_rows(lambda i, prompts: image.encode(pixels[i], prompts), rows)  # type: ignore[attr-defined]
    blocks = 0.1 * torch.randn(2, image.blocks, 2, 16, width, generator=generator)  # type: ignore[attr-defined]
    down, up = (each.clone().requires_grad_() for each in blocks.select(-3, 0))
    image.encode(pixels, None, (down, up)).square().sum().backward()  # type: ignore[attr-defined]
    for matrix in (down, up):
        assert matrix.grad is not None
        assert (matrix.grad.abs().amax((1, 2)) > 0).all(), "every block is reached"
    check_rows(lambda i, both: image.encode(pixels[i], None, tuple(both)), blocks)  # type: ignore[attr-defined]
    with torch.no_grad():
        patches = image.patch_features(pixels)  # type: ignore[attr-defined]
        starts = image.blank_rows(pixels[:1], 5)  # type: ignore[attr-defined]
        mean = image.embed(pixels[:1])[0, -(image.patch_grid**2) :].mean(0)  # type: ignore[attr-defined]
        entering = image.entry_norm(starts[0])  # type: ignore[attr-defined]
    assert starts.shape == (5, width), "more than the blocks of a shrunk tower"
    assert torch.cosine_similarity(entering, mean, dim=0) > 0.9
    assert patches.shape == (2, image.patch_grid**2, WIDTH)  # type: ignore[attr-defined]
    assert torch.isfinite(patches).all()


def check_rows(encode: object, prompts: Tensor) -> None:
    """Prompts or adapters row by row, at the last axis but two, equal separate runs."""
    with torch.no_grad():
        both = encode(slice(None), prompts)  # type: ignore[operator]
        for i in range(2):
            close(both[i : i + 1], encode(slice(i, i + 1), prompts.select(-3, i)))  # type: ignore[operator]
