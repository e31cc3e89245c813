"""Models that are worth taking, with published figures.

Recall and operations are those of open_clip's tables (openclip_retrieval_results.csv and model_profile.csv in the docs
of its repository), licences those of the weights' pages.
"""

from pathlib import Path
from typing import NamedTuple


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


RECOMMENDED = (
    Recommended("ViT-B-32", "laion2b_s34b_b79k", 39.3, 66.8, 8.8, "MIT", "a CPU; the default"),
    Recommended("ViT-B-32-quickgelu", "openai", 30.4, 58.8, 8.8, "MIT", "comparisons with papers"),
    Recommended(
        "ViT-B-16-SigLIP", "webli", 47.8, 74.7, 35.4, "Apache-2.0", "a CPU and time: 4 times the cost per image"
    ),
    Recommended("ViT-L-14", "datacomp_xl_s13b_b90k", 45.7, 73.4, 162.0, "MIT", "a GPU, long captions"),
    Recommended("ViT-SO400M-14-SigLIP-384", "webli", 54.2, 83.0, 670.4, "Apache-2.0", "a GPU; the best recall"),
    Recommended(
        "xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k", 37.8, 64.5, 8.8, "MIT", "a CPU, many languages; extra hf"
    ),
    Recommended("ViT-B-16-SigLIP-i18n-256", "webli", 44.9, 72.2, 46.8, "Apache-2.0", "many languages, and time"),
    Recommended(
        "xlm-roberta-large-ViT-H-14",
        "frozen_laion5b_s13b_b90k",
        49.2,
        77.4,
        334.6,
        "MIT",
        "a GPU, many languages; extra hf",
    ),
)
DEFAULT = RECOMMENDED[0]


def recommended_weights(model: str) -> str | None:
    """Return the tag of the weights that a model is recommended with; None for any other model, and for a directory."""
    return next((each.pretrained for each in RECOMMENDED if each.name == model and not Path(model).is_dir()), None)
