"""The towers of every open_clip configuration, shrunk, and the catalogue of built-in models."""

import json
import runpy
from collections import Counter
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from app.cli import app
from dcar_core.model.catalogue import CatalogueEntry, list_catalogue
from dcar_core.model.recommended import RECOMMENDED
from dcar_core.model.towers.select import level_of, level_of_config, select_towers
from dcar_core.util.errors import ModelError
from tests.support.paths import ROOT
from tests.support.tiny_clips import WIDTH, TinyClip, every_model, tiny_clip

QUICK = {"RN50", "ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32", "roberta-ViT-B-32", "convnext_base"}
TEXT_LEVEL = ("RN", "convnext", "swin", "vit_relpos", "MobileCLIP-S", "MobileCLIP2-S")


def expected_level(name: str) -> str:
    return "text" if name.startswith(TEXT_LEVEL) else "full"


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
        close(text.encode_rows(trimmed)[:, 0], stock)
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
    rows_of = image.encode_rows(pixels, shared)  # type: ignore[attr-defined]
    assert rows_of.shape == (2, 1 + image.patch_grid**2, WIDTH)  # type: ignore[attr-defined]
    close(rows_of[:, 0], image.encode(pixels, shared))  # type: ignore[attr-defined]
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


@cache
def entries() -> dict[str, CatalogueEntry]:
    return {entry.name: entry for entry in list_catalogue()}


def test_every_built_in_model_has_a_level() -> None:
    assert list(entries()) == open_clip.list_models()
    assert Counter(entry.level for entry in entries().values()) == {"full": 115, "text": 29}


def test_an_entry_describes_its_model() -> None:
    assert entries()["ViT-B-16-SigLIP2-384"] == CatalogueEntry(
        "ViT-B-16-SigLIP2-384", "full", 375, "many", 384, 64, ("timm",), ("webli",)
    )
    assert entries()["xlm-roberta-base-ViT-B-32"].needs == ("transformers",)
    assert entries()["RN50"].level == entries()["vit_relpos_medium_patch16_cls_224"].level == "text"
    assert "openai" in entries()["RN50"].pretrained


def test_every_model_has_its_number_of_parameters_and_languages() -> None:
    assert all(entry.parameters for entry in entries().values())
    script = runpy.run_path(str(ROOT / "scripts" / "generate_models_page.py"))
    for name in ("ViT-B-32", "RN50", "PE-Core-T-16-384"):
        assert script["count_parameters"](name) == entries()[name].parameters, name
    many = {"nllb-clip-base", "ViT-B-16-SigLIP2", "ViT-B-16-SigLIP-i18n-256", "ViT-H-14-worldwide", "mt5-base-ViT-B-32"}
    assert {entries()[name].languages for name in many} == {"many"}
    assert entries()["ViT-B-16-SigLIP"].languages == entries()["roberta-ViT-B-32"].languages == "English"


def test_the_command_filters_by_name_and_level() -> None:
    done = CliRunner().invoke(app, ["models", "mobileclip2", "--level", "full"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["MobileCLIP2-B", "full", "150", "M", "224", "px"], ["MobileCLIP2-L-14", "full", "428", "M", "224", "px"],
    ]  # fmt: skip
    assert all(line.endswith("tokens  English  timm  dfndr2b") for line in lines)


def test_recommended_models_exist_with_their_weights() -> None:
    for each in RECOMMENDED:
        assert each.pretrained in entries()[each.name].pretrained
    many = [each.name for each in RECOMMENDED if "many languages" in each.use]
    assert {entries()[name].languages for name in many} == {"many"}
    lines = CliRunner().invoke(app, ["models", "--recommend"]).output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [each.name for each in RECOMMENDED]
    assert lines[1].split()[1:6] == ["39.3", "%,", "66.8", "%", "604"]
    (found,) = json.loads(CliRunner().invoke(app, ["models", "quickgelu", "--recommend", "--json"]).output)
    assert (found["name"], found["pretrained"], found["coco"], found["level"]) == (
        "ViT-B-32-quickgelu", "openai", 30.4, "full",
    )  # fmt: skip


def test_the_command_prints_json_and_refuses_what_matches_nothing() -> None:
    done = CliRunner().invoke(app, ["models", "--json"])
    assert {entry["name"]: entry["level"] for entry in json.loads(done.output)} == {
        name: entry.level for name, entry in entries().items()
    }
    assert json.loads(CliRunner().invoke(app, ["models", "--level", "features", "--json"]).output) == []
    assert CliRunner().invoke(app, ["models", "--level", "half"]).exit_code == 2
    assert isinstance(CliRunner().invoke(app, ["models", "no such model"]).exception, ModelError)


def test_the_page_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "generate_models_page.py"))
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert script["page"](text) == text, "docs/models.md is stale; run `make reference`"
