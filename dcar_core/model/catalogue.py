"""The models that open_clip has built in, read from their configurations, and those
worth taking.

Published recall is that of SOURCES, licences those of the weights' pages. Operations
are those of open_clip's model_profile.csv, or counted alike by
torch.utils.flop_counter.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dcar_core.model.backbone import Level

# millions by name; building a tower to count takes seconds
PARAMETERS = Path(__file__).with_name("parameters.json")
# as their publishers state
_MULTILINGUAL = re.compile("nllb|SigLIP2|i18n|worldwide|xlm|mt5")


class Recommended(NamedTuple):
    """A model and its weights.

    coco: zero-shot text-to-image R@1 on COCO in percent, as the source states it; None
    if it states none. gflops: operations for one image, in billions; a ViT-B/32 takes
    8.8. towers: of a repository of the hub, the built-in model with the same towers.
    """

    name: str
    pretrained: str
    coco: float | None
    source: str
    gflops: float
    licence: str
    use: str
    towers: str = ""


_GITHUB = "https://github.com/"
SOURCES = {
    "open_clip": (
        _GITHUB
        + "mlfoundations/open_clip/blob/main/docs/openclip_retrieval_results.csv"
    ),
    "SigLIP 2": (
        _GITHUB
        + "google-research/big_vision/tree/main/big_vision/configs/proj/image_text"
    ),
    "PE": _GITHUB + "facebookresearch/perception_models/tree/main/apps/pe",
    "MobileCLIP2": _GITHUB + "apple/ml-mobileclip/tree/main/results",
    "MetaCLIP 2": _GITHUB + "facebookresearch/MetaCLIP",
    "Marqo": _GITHUB + "marqo-ai/marqo-ecommerce-embeddings",
}
_MARQO = "hf-hub:Marqo/marqo-ecommerce-embeddings-"
_SHOPS = "R@10 on GoogleShopping"
RECOMMENDED = (
    Recommended(
        "ViT-B-32",
        "laion2b_s34b_b79k",
        39.3,
        "open_clip",
        8.8,
        "MIT",
        "a CPU; the default",
    ),
    Recommended(
        "ViT-B-32-quickgelu",
        "openai",
        30.4,
        "open_clip",
        8.8,
        "MIT",
        "comparisons with papers",
    ),
    Recommended(
        "ViT-B-32-SigLIP2-256",
        "webli",
        47.2,
        "SigLIP 2",
        11.5,
        "Apache-2.0",
        "a CPU, many languages",
    ),
    Recommended(
        "MobileCLIP2-S2",
        "dfndr2b",
        48.8,
        "MobileCLIP2",
        15.7,
        "research only",
        "a CPU, in research",
    ),
    Recommended(
        "ViT-B-16-SigLIP2",
        "webli",
        52.1,
        "SigLIP 2",
        35.4,
        "Apache-2.0",
        "a CPU and time, many languages",
    ),
    Recommended(
        "ViT-L-14",
        "datacomp_xl_s13b_b90k",
        45.7,
        "open_clip",
        162.0,
        "MIT",
        "a GPU, long captions",
    ),
    Recommended(
        "ViT-SO400M-16-SigLIP2-256",
        "webli",
        55.4,
        "SigLIP 2",
        220.5,
        "Apache-2.0",
        "a GPU, many languages",
    ),
    Recommended(
        "PE-Core-L-14-336",
        "meta",
        57.1,
        "PE",
        384.4,
        "Apache-2.0",
        "a GPU; the best recall",
    ),
    Recommended(
        "ViT-H-14-worldwide-quickgelu",
        "metaclip2_worldwide",
        None,
        "MetaCLIP 2",
        334.6,
        "CC-BY-NC-4.0",
        "a GPU, many languages, in research: 57.4 on CVQA",
    ),
    Recommended(
        _MARQO + "B",
        "",
        None,
        "Marqo",
        35.4,
        "Apache-2.0",
        f"shops: {_SHOPS} 83.2, of ViT-B-16-SigLIP 66.0",
        "ViT-B-16-SigLIP",
    ),
    Recommended(
        _MARQO + "L",
        "",
        None,
        "Marqo",
        162.6,
        "Apache-2.0",
        f"shops, a GPU: {_SHOPS} 87.8",
        "ViT-L-16-SigLIP-256",
    ),
)
DEFAULT = RECOMMENDED[0]


@dataclass(frozen=True)
class CatalogueEntry:
    """A built-in model.

    parameters: of both towers, in millions; None for a model newer than the list.
    languages: of the texts that its published weights learned from. pretrained: tags of
    its weights. image_size: S in pixels. context_length: L, start and end token
    included. needs: libraries other than open_clip that build its towers.
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
    """Describe every built-in model, in open_clip's order; nothing is built or
    fetched.
    """
    from dcar_core.model.backbone import level_of_config
    from dcar_core.model.open_clip_source import builtin_models

    counts = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    entries = []
    for name, (config, tags) in builtin_models().items():
        vision = config["vision_cfg"]
        text = config["text_cfg"]
        needs = ["timm"] * ("timm_model_name" in vision) + ["transformers"] * (
            "hf_model_name" in text
        )
        size = int(vision.get("image_size", 224))
        length = int(text.get("context_length", 77))
        level = level_of_config(config)
        languages = languages_of(name)
        entries.append(
            CatalogueEntry(
                name,
                level,
                counts.get(name),
                languages,
                size,
                length,
                tuple(needs),
                tuple(tags),
            )
        )
    return entries


def list_recommended() -> dict[Recommended, CatalogueEntry]:
    """Describe the recommended models, in their order."""
    entries = {entry.name: entry for entry in list_catalogue()}
    return {
        row: replace(entries[row.towers or row.name], name=row.name)
        for row in RECOMMENDED
    }


def recommended_weights(model: str) -> str | None:
    """Return the tag of the weights that a model is recommended with; None for any
    other model, and for a directory.
    """
    return next(
        (
            row.pretrained or None
            for row in RECOMMENDED
            if row.name == model and not Path(model).is_dir()
        ),
        None,
    )


def languages_of(model: str) -> Literal["English", "many", ""]:
    """Return the languages of the texts that a built-in model learned from; "" for a
    model of a directory or a hub.
    """
    if "/" in model or os.sep in model:
        return ""
    return "many" if _MULTILINGUAL.search(model) else "English"
