"""Figures for the log of the base model's training: validation emoji and short queries
on the unseen styles.
"""

from pathlib import Path

import numpy as np
import open_clip
import torch
from base_batches import UNSEEN, load_images, on_white
from base_texts import TextEncoder
from evaluate_queries import measure, read_domain, read_queries
from torch import Tensor

HERE = Path(__file__).parent


def encode_images(model: open_clip.CLIP, rgba: np.ndarray) -> Tensor:
    """Return the normalised features of images on white."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [
            model.encode_image(on_white(rgba[i : i + 256]), normalize=True)
            for i in range(0, len(rgba), 256)
        ]
    return torch.cat(parts).float()


class Validation:
    """Validation emoji and short queries on the unseen styles."""

    def __init__(self, renders: Path) -> None:
        images, found = load_images(renders, UNSEEN)
        places = {row: place for place, row in enumerate(found)}
        self.metadata, _ = read_domain("twemoji")
        self.queries = read_queries(HERE / "queries" / "validation.tsv", self.metadata)
        self.images = {
            style: images[[places[row["id"], style] for row in self.metadata]]
            for style in ("twemoji", "openmoji")
        }
        self.chosen = [
            place for place, row in enumerate(self.metadata) if row["split"] == "val"
        ]

    def measure(
        self,
        model: open_clip.CLIP,
        encode_texts: TextEncoder,
    ) -> dict[str, list[float]]:
        """Return hit@1, hit@5 and nDCG@10 of the queries and text-to-image R@1 of the
        captions, in percent.
        """
        queries = encode_texts([query.text for query in self.queries])[1]
        captions = encode_texts(
            [self.metadata[place]["caption"] for place in self.chosen]
        )[1]
        figures = {}
        for style, rgba in self.images.items():
            images = encode_images(model, rgba)
            hits = measure((queries @ images.T).numpy(), self.queries).mean(0)
            scores = captions @ images[self.chosen].T
            first = (scores >= scores.diagonal()[:, None]).sum(1) == 1
            figures[style] = [
                round(100 * float(value), 1) for value in (*hits, first.float().mean())
            ]
        return figures
