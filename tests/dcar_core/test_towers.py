"""The towers of every open_clip configuration, shrunk, and the catalogue of built-in
models.
"""

import runpy
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from app.cli import app
from dcar_core.model.backbone import level_of_config, select_towers
from dcar_core.model.catalogue import (
    DEFAULT,
    RECOMMENDED,
    CatalogueEntry,
    list_catalogue,
    list_recommended,
)
from dcar_core.util.errors import ModelError
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.tiny_models import WIDTH, tiny_clip

QUICK = {
    "RN50",
    "ViT-B-32",
    "ViT-B-16-SigLIP",
    "EVA02-B-16",
    "coca_ViT-B-32",
    "roberta-ViT-B-32",
    "convnext_base",
}


TEXT_LEVEL = ("RN", "convnext", "swin", "vit_relpos", "MobileCLIP-S", "MobileCLIP2-S")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def marks(name: str) -> list[pytest.MarkDecorator]:
    is_hf = "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]
    return [pytest.mark.slow] * (name not in QUICK) + [needs("hf")] * is_hf


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in open_clip.list_models()]
)
def test_towers_equal_open_clip_and_take_prompts(name: str, directory: Path) -> None:
    model = tiny_clip(name, directory)
    text, image = select_towers(model.clip, model.layout, model.size)
    level = "text" if name.startswith(TEXT_LEVEL) else "full"
    assert (
        level_of_config(open_clip.get_model_config(name))
        == level
        == ("full" if image.width else "text")
    )
    whole = model.tokens(3, 9)
    pixels = model.pixels(2)
    trimmed = whole[:, : int(text.layout.lengths(whole).max())]
    with torch.no_grad():
        stock = model.clip.encode_text(whole, normalize=False)
        assert torch.equal(text.encode(whole), stock)
        assert torch.equal(
            image.encode(pixels), model.clip.encode_image(pixels, normalize=False)
        )
        close(text.encode(trimmed), stock)
        close(text.encode(trimmed, weights=torch.ones(trimmed.shape)), stock)
        weighted = text.encode(trimmed, weights=torch.full(trimmed.shape, 1.5))
        assert not torch.allclose(weighted, stock, atol=1e-3)
        rows = text.encode(trimmed, rows=True)
        assert rows[:, 1:].shape == (*trimmed.shape, stock.shape[1])
        close(rows[:, 0], stock)
    start = model.layout.start
    one = trimmed[1:]
    words = text.embed(one[:, start : start + 4])
    rest = torch.cat([one[:, :start], one[:, start + 4 :]], 1)
    close(text.encode(rest, words), text.encode(one))
    check_prompts(lambda rows, prompts: text.encode(trimmed[rows], prompts), 2, WIDTH)
    if image.width:
        check_image_prompts(image, pixels)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def check_prompts(
    encode: Callable[[slice, Any], Tensor],
    depth: int,
    width: int,
    rows: int = 3,
    parts: int = 0,
) -> None:
    """Every depth is reached; prompts or the parts of adapters row by row equal
    separate runs.
    """
    generator = torch.Generator().manual_seed(4)
    values = 0.1 * torch.randn(
        max(parts, 1),
        depth,
        2,
        rows,
        width,
        generator=generator,
    )

    def given(of: Tensor) -> Any:
        return tuple(of) if parts else of[0]

    shared = values[:, :, 0].clone().requires_grad_()
    encode(slice(None), given(shared)).square().sum().backward()  # type: ignore[no-untyped-call]
    assert shared.grad is not None
    assert (shared.grad.abs().amax((2, 3)) > 0).all(), "every depth is reached"
    with torch.no_grad():
        both = encode(slice(None), given(values))
        for i in range(2):
            close(both[i : i + 1], encode(slice(i, i + 1), given(values[:, :, i])))


def check_image_prompts(image: Any, pixels: Tensor) -> None:
    width = image.width
    patches = image.patch_grid**2
    check_prompts(lambda rows, prompts: image.encode(pixels[rows], prompts), 2, width)
    check_prompts(
        lambda rows, both: image.encode(pixels[rows], None, both),
        image.blocks,
        width,
        16,
        parts=2,
    )
    prompts = 0.1 * torch.randn(
        2,
        3,
        width,
        generator=torch.Generator().manual_seed(5),
    )
    with torch.no_grad():
        rows = image.encode(pixels, prompts, rows=True)
        assert rows.shape == (2, 1 + patches, WIDTH)
        close(rows[:, 0], image.encode(pixels, prompts))
        features = image.encode(pixels, rows=True)[:, 1:]
        starts = image.blank_rows(pixels[:1], 5)
        mean = image.embed(pixels[:1])[0, -patches:].mean(0)
        entering = image.entry_norm(starts[0])
    assert starts.shape == (5, width), "more than the blocks of a shrunk tower"
    assert torch.cosine_similarity(entering, mean, dim=0) > 0.9
    assert features.shape == (2, patches, WIDTH)
    assert torch.isfinite(features).all()


@cache
def entries() -> dict[str, CatalogueEntry]:
    return {entry.name: entry for entry in list_catalogue()}


def test_the_catalogue_describes_every_model() -> None:
    assert list(entries()) == open_clip.list_models()
    assert Counter(entry.level for entry in entries().values()) == {
        "full": 115,
        "text": 29,
    }
    assert entries()["ViT-B-16-SigLIP2-384"] == CatalogueEntry(
        "ViT-B-16-SigLIP2-384",
        "full",
        375,
        "many",
        384,
        64,
        ("timm",),
        ("webli",),
    )
    assert entries()["xlm-roberta-base-ViT-B-32"].needs == ("transformers",)
    assert all(entry.parameters for entry in entries().values())
    many = {
        "nllb-clip-base",
        "ViT-B-16-SigLIP2",
        "ViT-B-16-SigLIP-i18n-256",
        "ViT-H-14-worldwide",
        "mt5-base-ViT-B-32",
    }
    many |= {each.name for each in RECOMMENDED if "many languages" in each.use}
    assert {entries()[name].languages for name in many} == {"many"}
    assert (
        entries()["ViT-B-16-SigLIP"].languages
        == entries()["roberta-ViT-B-32"].languages
        == "English"
    )
    for row, entry in list_recommended().items():
        assert row.pretrained in (entry.pretrained if not row.towers else ("",)), (
            row.name
        )


def test_the_default_has_the_best_recall_of_free_weights_at_its_cost() -> None:
    rivals = [
        each
        for each in RECOMMENDED
        if each.gflops <= DEFAULT.gflops and each.licence in ("MIT", "Apache-2.0")
    ]
    assert max(rivals, key=lambda each: each.coco or 0) == DEFAULT


def models(*given: str) -> str:
    return CliRunner().invoke(app, ["models", *given], catch_exceptions=False).output


def test_the_command_filters_and_recommends() -> None:
    line = next(
        line
        for line in models("mobileclip2").splitlines()
        if line.startswith("MobileCLIP2-B ")
    )
    assert (
        " ".join(line.split())
        == "MobileCLIP2-B full 150 M 224 px 77 tokens English timm dfndr2b"
    )
    _, *lines = models("--recommend").splitlines()
    assert [line.split()[0] for line in lines] == [each.name for each in RECOMMENDED]
    row = (
        "ViT-B-32-SigLIP2-256 webli 377 1.5 GB 11.5 47.2 SigLIP 2 Apache-2.0 a CPU,"
        " many languages"
    )
    assert row in [" ".join(line.split()) for line in lines]
    assert (
        len(
            {
                line.index(each.licence)
                for line, each in zip(lines, RECOMMENDED, strict=True)
            }
        )
        == 1
    ), "columns"
    assert len(models("quickgelu", "--recommend").splitlines()) == 3
    with pytest.raises(ModelError):
        models("no such model")


def test_the_page_of_models_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "generate_models_page.py"))
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert script["page"](text) == text, "docs/models.md is stale; run `make reference`"
    assert (
        script["count_parameters"]("PE-Core-T-16-384")
        == entries()["PE-Core-T-16-384"].parameters
    )
