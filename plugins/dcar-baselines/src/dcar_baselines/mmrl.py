"""MMRL: tokens of a shared space in the last blocks of both towers, read by a second
image feature in training.

Guo and Gu, "MMRL: Multi-Modal Representation Learning for Vision-Language Models", CVPR
2025.

- The paper's, by the authors' code (yunncheng/MMRL): five learned vectors of 512
  numbers, and for each of the last 7 / 12 of the blocks of each tower a projection of
  them to its width. They stand behind the start token and the class row, fresh before
  each block. Images have two features: of the class row, by the frozen projection, and
  of the mean of their representation tokens, by a learned one. The loss is 0.7 times
  the cross-entropy of the first and 0.3 times that of the second, plus 1 - cosine of
  texts and images with the frozen features, with a weight of 1, the authors' default.
- As the authors search what training has not seen: by the class row alone.
- Adapted to retrieval: captions in place of class names in a template, the symmetric
  contrastive loss in place of cross-entropy over classes.
- How `dcar_core` expresses the loss: late interaction of an only patch, the second
  image feature, with words that all are the feature of their text equals the
  contrastive loss of these two.

Letters: B batch, n tokens, k representation tokens, J blocks with them, W width of a
tower, E joint space.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dcar_baselines.filip import late_interaction_loss
from dcar_baselines.towers import blocks, encode_image, encode_text, require_clip
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import LossConfig, plain_config
from dcar_core.model.methods import Method
from dcar_core.model.towers.image import ImageTower
from dcar_core.model.towers.text import PromptRows, TextTower

SHARE = 7 / 12  # of the blocks
COUNT = 5
WIDTH = 512
ALPHA = 0.7  # of the class row in the loss


class RepresentationRows(PromptRows):
    """Run the last blocks with tokens behind the first row.

    tokens: (J, k, W). is_causal: whether rows see only those before them.
    outputs: the tokens' rows (B, k, W) behind the last block.
    """

    outputs: Tensor

    def __init__(self, tokens: Tensor, *, is_causal: bool) -> None:
        super().__init__(None, 1)
        self.tokens = tokens
        self.is_causal = is_causal

    def run(self, x: Tensor, blocks: Iterable[Callable[..., Tensor]]) -> Tensor:
        blocks = list(blocks)
        depth, k, _ = self.tokens.shape
        for block in blocks[:-depth]:
            x = block(x)
        wider = nn.Transformer.generate_square_subsequent_mask(x.shape[1] + k, x.device)
        options: dict[str, Any] = {"attn_mask": wider} if self.is_causal else {}
        for tokens, block in zip(self.tokens, blocks[-depth:], strict=True):
            joined = torch.cat(
                [x[:, :1], tokens.to(x.dtype).expand(len(x), -1, -1), x[:, 1:]], 1
            )
            joined = block(joined, **options)
            self.outputs = joined[:, 1 : 1 + k]
            x = torch.cat([joined[:, :1], joined[:, 1 + k :]], 1)
        return x


class RepresentationTokens(nn.Module):
    """The tokens, their projections into both towers, and that of the second image
    feature.

    Raises:
        ModelError: the towers are not CLIP's own.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        require_clip(backbone, "mmrl")
        self.tokens = nn.Parameter(torch.empty(COUNT, WIDTH).normal_(std=0.02))
        self.text = _projections(backbone.text_tower)
        self.image = _projections(backbone.image_tower)
        width = backbone.vision_width
        self.project = nn.Parameter(torch.randn(width, backbone.embed_dim) / width**0.5)

    def encode_text(self, backbone: Backbone, tokens: Tensor, rows: bool) -> Tensor:
        """(B, n) -> (B, E), or with `rows` the same for each token behind it: (B, 1 +
        n, E).
        """
        features = encode_text(backbone, tokens, self._rows(self.text, is_causal=True))
        if rows:
            return features[:, None].expand(-1, 1 + tokens.shape[1], -1)
        return features

    def encode_image(self, backbone: Backbone, pixels: Tensor, rows: bool) -> Tensor:
        """(B, 3, S, S) -> the class row's feature (B, E), or with `rows` both features
        (B, 2, E).
        """
        added = self._rows(self.image, is_causal=False)
        features = encode_image(backbone, pixels, added)
        if not rows:
            return features
        second = backbone.visual.ln_post(added.outputs).mean(1) @ self.project
        return torch.stack([features, second], 1)

    def _rows(
        self,
        projections: nn.ModuleList,
        *,
        is_causal: bool,
    ) -> RepresentationRows:
        return RepresentationRows(
            torch.stack([layer(self.tokens) for layer in projections]),
            is_causal=is_causal,
        )


def _projections(tower: TextTower | ImageTower) -> nn.ModuleList:
    """Return a projection to the tower's width for each of its last blocks."""
    count = max(1, round(SHARE * len(blocks(tower))))
    return nn.ModuleList(nn.Linear(WIDTH, tower.width) for _ in range(count))


METHOD = Method(
    config=plain_config(
        "mmrl",
        loss=LossConfig(category=0, head=0, late=1 - ALPHA, anchor=1.0),
    ),
    encoders=RepresentationTokens,
    late_loss=late_interaction_loss,
)
