"""The models that open_clip has built in, read from their configurations, and those worth taking.

Published recall and operations are those of open_clip's tables (openclip_retrieval_results.csv and model_profile.csv in
the docs of its repository), licences those of the weights' pages.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dcar_core.model.backbone import Level

PARAMETERS = Path(__file__).with_name("parameters.json")  # millions by name; building a tower to count takes seconds
_MULTILINGUAL = re.compile("nllb|SigLIP2|i18n|worldwide|xlm|mt5")  # as their publishers state


class Recommended(NamedTuple):
    """A model and its weights.

    coco, flickr: zero-shot text-to-image R@1 on COCO and Flickr30k, in percent.
    gflops: operations for one image, in billions; a ViT-B/32 takes 8.8.
    """

    name: str
    pretrained: str
    coco: float
    flickr: float
    gflops: float
    licence: str
    use: str


_HF = "many languages; extra hf"
RECOMMENDED = (
    Recommended("ViT-B-32", "laion2b_s34b_b79k", 39.3, 66.8, 8.8, "MIT", "a CPU; the default"),
    Recommended("ViT-B-32-quickgelu", "openai", 30.4, 58.8, 8.8, "MIT", "comparisons with papers"),
    Recommended("ViT-B-16-SigLIP", "webli", 47.8, 74.7, 35.4, "Apache-2.0", "a CPU and time: 4 x the cost per image"),
    Recommended("ViT-L-14", "datacomp_xl_s13b_b90k", 45.7, 73.4, 162.0, "MIT", "a GPU, long captions"),
    Recommended("ViT-SO400M-14-SigLIP-384", "webli", 54.2, 83.0, 670.4, "Apache-2.0", "a GPU; the best recall"),
    Recommended("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k", 37.8, 64.5, 8.8, "MIT", "a CPU, " + _HF),
    Recommended("ViT-B-16-SigLIP-i18n-256", "webli", 44.9, 72.2, 46.8, "Apache-2.0", "many languages, and time"),
    Recommended("xlm-roberta-large-ViT-H-14", "frozen_laion5b_s13b_b90k", 49.2, 77.4, 334.6, "MIT", "a GPU, " + _HF),
)
DEFAULT = RECOMMENDED[0]


@dataclass(frozen=True)
class CatalogueEntry:
    """A built-in model.

    parameters: of both towers, in millions; None for a model newer than the list.
    languages: of the texts that its published weights learned from. pretrained: tags of its weights.
    image_size: S in pixels. context_length: L, start and end token included.
    needs: libraries other than open_clip that build its towers.
    """

    name: str
    level: "Level"
    parameters: int | None
    languages: Literal["English", "many", ""]
    image_size: int
    context_length: int
    needs: tuple[str, ...]
    pretrained: tuple[str, ...]


def list_catalogue() -> list[CatalogueEntry]:
    """Describe every built-in model, in open_clip's order; nothing is built or fetched."""
    from dcar_core.model.backbone import level_of_config
    from dcar_core.model.open_clip_source import builtin_models

    counts, entries = json.loads(PARAMETERS.read_text(encoding="utf-8")), []
    for name, (config, tags) in builtin_models().items():
        vision, text = config["vision_cfg"], config["text_cfg"]
        needs = ["timm"] * ("timm_model_name" in vision) + ["transformers"] * ("hf_model_name" in text)
        size, length = int(vision.get("image_size", 224)), int(text.get("context_length", 77))
        level, languages = level_of_config(config), languages_of(name)
        entries.append(
            CatalogueEntry(name, level, counts.get(name), languages, size, length, tuple(needs), tuple(tags))
        )
    return entries


def recommended_weights(model: str) -> str | None:
    """Return the tag of the weights that a model is recommended with; None for any other model, and for a directory."""
    return next((row.pretrained for row in RECOMMENDED if row.name == model and not Path(model).is_dir()), None)


def languages_of(model: str) -> Literal["English", "many", ""]:
    """Return the languages of the texts that a built-in model learned from; "" for a model of a directory or a hub."""
    if "/" in model or os.sep in model:
        return ""
    return "many" if _MULTILINGUAL.search(model) else "English"
