"""The catalogue of built-in models: complete, and the same as the page and the command."""

import json
import runpy
from collections import Counter
from functools import cache

import open_clip
from typer.testing import CliRunner

from app.cli import app
from dcar_core.model.catalogue import FAMILIES, CatalogueEntry, list_catalogue
from dcar_core.util.errors import ModelError
from tests.support.paths import ROOT


@cache
def entries() -> dict[str, CatalogueEntry]:
    return {entry.name: entry for entry in list_catalogue()}


def test_every_built_in_model_has_a_level_and_a_family() -> None:
    assert list(entries()) == open_clip.list_models()
    assert Counter(entry.level for entry in entries().values()) == {"full": 115, "text": 29}
    assert {entry.family for entry in entries().values()} == set(FAMILIES)


def test_an_entry_describes_its_model() -> None:
    assert entries()["ViT-B-16-SigLIP2-384"] == CatalogueEntry(
        "ViT-B-16-SigLIP2-384", "SigLIP 2", "full", 375, "many", 384, 64, True, ("timm",), ("webli",)
    )
    assert entries()["xlm-roberta-base-ViT-B-32"].needs == ("transformers",)
    assert not entries()["xlm-roberta-base-ViT-B-32"].reads_padding
    assert entries()["RN50"].level == entries()["vit_relpos_medium_patch16_cls_224"].level == "text"
    assert "openai" in entries()["RN50"].pretrained


def test_every_model_has_its_number_of_parameters_and_languages() -> None:
    assert all(entry.parameters for entry in entries().values())
    script = runpy.run_path(str(ROOT / "scripts" / "generate_models_page.py"))
    for name in ("ViT-B-32", "RN50", "PE-Core-T-16-384"):
        assert script["count_parameters"](name) == entries()[name].parameters, name
    many = {entry.family for entry in entries().values() if entry.languages == "many"}
    assert many == {"NLLB-CLIP", "SigLIP 2", "SigLIP", "MetaCLIP 2", "RoBERTa and mT5"}
    assert entries()["ViT-B-16-SigLIP"].languages == entries()["roberta-ViT-B-32"].languages == "English"


def test_the_command_filters_by_name_and_level() -> None:
    done = CliRunner().invoke(app, ["models", "mobileclip2", "--level", "full"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["MobileCLIP2-B", "full", "150", "M", "224", "px"], ["MobileCLIP2-L-14", "full", "428", "M", "224", "px"],
    ]  # fmt: skip
    assert all(line.endswith("tokens  English  timm  dfndr2b") for line in lines)


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
