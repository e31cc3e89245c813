"""The second stage of a search [ours]: a query scored with each of its first images, by prompts made from the query.

    second score = 0.25 x cosine of the text and the image, read with the query's prompts + 0.1 x late interaction

- A bottleneck turns the text vector into a prompt for each of the last blocks of the image tower. As in ELIP (Zhan et
  al., arXiv 2502.15682), prompts depend on the query; they are added to the class row, which reads the patches.
- Late interaction (FILIP): the cosine of each word with its most similar patch in a small space, mean over the words.
- Patches never see the query, so a pair costs one row of these blocks. A gallery's vectors stay as they are.

Letters: B images, N texts, M pairs, n tokens, P patches, E joint space, W_v width, D' last blocks.
"""

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import PromptValues
from dcar_core.model.towers.image import ClassRowInputs

PROMPTED, LATE = 0.25, 0.1  # weights of the two parts of the second score
_INNER = 64


class QueryParts(NamedTuple):
    """Texts as the second stage reads them. vectors: (N, E). words: (N, n, E), normalized. mask: bool (N, n)."""

    vectors: Tensor
    words: Tensor
    mask: Tensor


Parts = TypeVar("Parts", QueryParts, ClassRowInputs)


def take(parts: Parts, rows: Tensor | slice) -> Parts:
    """Return these rows of each part."""
    return type(parts)(*(each[rows] for each in parts))


class QueryPrompts(nn.Module):
    """The learned layers. The prompts are zero at the start.

    blocks: D'. values: "constant" makes the prompts of no text, as a control.
    """

    def __init__(self, backbone: Backbone, blocks: int, values: PromptValues = "learned") -> None:
        super().__init__()
        dim, width = backbone.embed_dim, backbone.vision_width
        self.blocks, self.reads_query = blocks, values == "learned"
        self.down, self.up = nn.Linear(dim, _INNER), nn.Linear(_INNER, blocks * width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.word, self.patch = nn.Linear(dim, _INNER, bias=False), nn.Linear(width, _INNER, bias=False)
        self.late_scale = nn.Parameter(torch.tensor(3.0))  # log of 1 / temperature of late interaction in the loss

    def prompts(self, vectors: Tensor) -> Tensor:
        """(M, E), normalized -> (M, D', W_v)."""
        prompts: Tensor = self.up(F.gelu(self.down(self.reads_query * vectors * vectors.shape[-1] ** 0.5)))
        return prompts.reshape(len(prompts), self.blocks, -1)

    def late(self, texts: QueryParts, patches: Tensor) -> Tensor:
        """Late interaction (M,) of texts with the patches (M, P, W_v) of images."""
        return (self.best_patches(texts, patches) * texts.mask).sum(1) / texts.mask.sum(1).clamp(min=1)

    def best_patches(self, texts: QueryParts, patches: Tensor) -> Tensor:
        """The cosine of each word with its most similar patch: (M, n)."""
        words = F.normalize(self.word(texts.words.float()), dim=-1)
        found = F.normalize(self.patch(F.layer_norm(patches.float(), patches.shape[-1:])), dim=-1)
        return (words @ found.transpose(1, 2)).amax(-1)
