"""The models that open_clip has built in, read from their configurations; nothing is built or fetched.

- The level is that of the towers by structure. Loading lowers it where a tower fails its proof.
- parameters.json has the counts, since building a large tower to count takes seconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcar_core.model.checkpoint import languages_of
from dcar_core.model.open_clip_source import builtin_models
from dcar_core.model.towers.select import Level, level_of_config

PARAMETERS = Path(__file__).with_name("parameters.json")  # millions by name


@dataclass(frozen=True)
class CatalogueEntry:
    """A built-in model.

    parameters: of both towers, in millions; None for a model newer than the list.
    languages: of the texts that its published weights learned from. pretrained: tags of its weights.
    image_size: S in pixels. context_length: L, start and end token included.
    needs: libraries other than open_clip that build its towers.
    """

    name: str
    level: Level
    parameters: int | None
    languages: Literal["English", "many", ""]
    image_size: int
    context_length: int
    needs: tuple[str, ...]
    pretrained: tuple[str, ...]


def list_catalogue() -> list[CatalogueEntry]:
    """Describe every built-in model, in open_clip's order."""
    counts = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    found = []
    for name, (config, tags) in builtin_models().items():
        vision, text = config["vision_cfg"], config["text_cfg"]
        needs = ["timm"] * ("timm_model_name" in vision) + ["transformers"] * ("hf_model_name" in text)
        size, length = int(vision.get("image_size", 224)), int(text.get("context_length", 77))
        level, languages = level_of_config(config), languages_of(name)
        found.append(CatalogueEntry(name, level, counts.get(name), languages, size, length, tuple(needs), tuple(tags)))
    return found
