"""MMA: adapters in the last blocks of both towers, whose inner layer the towers share.

Yang et al., "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024.

- The paper's, by the authors' code (ZjjConan/VLM-MultiModalAdapter): beside each of the
  last two thirds of the blocks a bottleneck reads the block's normalized input, and its
  output, times 0.001, is added to that of the block. Its inner layer is one for both
  towers, so that gradients of texts and images meet there. Width 32, Kaiming's initial
  weights.
- Adapted to retrieval: captions in place of class names in a template, the symmetric
  contrastive loss in place of cross-entropy over classes.
- Adapted to towers of unequal depth: the last blocks are paired, as many as two thirds
  of the shallower tower has.
- Left out: the authors' factor that makes gradients as large as without the 0.001.
  AdamW, which trains here in place of SGD, divides by the size of gradients itself.

Letters: B batch, n rows, W width of a tower, r inner width.
"""

from collections.abc import Callable, Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dcar_baselines.towers import blocks, encode_image, encode_text, require_clip
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import plain_config
from dcar_core.model.methods import Method
from dcar_core.model.towers.image import ImageTower
from dcar_core.model.towers.text import PromptRows, TextTower

SHARE = 2 / 3  # of the blocks: the paper's 5 to 12 of 12
INNER = 32
SCALE = 0.001


class Bottleneck(nn.Module):
    """What a tower has alone of an adapter: the layers before and behind the shared
    one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, INNER)
        self.up = nn.Linear(INNER, width)

    def forward(self, x: Tensor, shared: nn.Module) -> Tensor:
        """(B, n, W) -> (B, n, W)"""
        inner = F.relu(shared(F.relu(self.down(x))))  # [B, n, r]
        return self.up(inner)  # type: ignore[no-any-return]


class AdaptedBlocks(PromptRows):
    """Run the last blocks with adapters beside them.

    norms: of the input of each of these blocks, frozen.
    """

    def __init__(
        self,
        adapters: Sequence[nn.Module],
        shared: Sequence[nn.Module],
        norms: Sequence[nn.Module],
    ) -> None:
        super().__init__(None, 0)
        self.layers = list(zip(adapters, shared, norms, strict=True))

    def run(self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        blocks = list(blocks)
        first = len(blocks) - len(self.layers)
        for block in blocks[:first]:
            x = block(x)
        for block, (adapter, shared, norm) in zip(
            blocks[first:],
            self.layers,
            strict=True,
        ):
            x = block(x) + SCALE * adapter(norm(x), shared)
        return x


class MultiModalAdapters(nn.Module):
    """The adapters of both towers.

    Raises:
        ModelError: the towers are not CLIP's own.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        require_clip(backbone, "mma")
        depth = min(
            len(blocks(tower)) for tower in (backbone.text_tower, backbone.image_tower)
        )
        count = max(1, round(SHARE * depth))
        self.text = nn.ModuleList(Bottleneck(backbone.text_width) for _ in range(count))
        self.image = nn.ModuleList(
            Bottleneck(backbone.vision_width) for _ in range(count)
        )
        self.shared = nn.ModuleList(nn.Linear(INNER, INNER) for _ in range(count))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(
                    layer.weight,
                    mode="fan_out",
                    nonlinearity="relu",
                )
                nn.init.zeros_(layer.bias)

    def encode_text(self, backbone: Backbone, tokens: Tensor, rows: bool) -> Tensor:
        return encode_text(
            backbone,
            tokens,
            self._added(backbone.text_tower, self.text),
        )

    def encode_image(self, backbone: Backbone, pixels: Tensor, rows: bool) -> Tensor:
        return encode_image(
            backbone,
            pixels,
            self._added(backbone.image_tower, self.image),
        )

    def _added(
        self,
        tower: TextTower | ImageTower,
        adapters: nn.ModuleList,
    ) -> AdaptedBlocks:
        return AdaptedBlocks(
            [*adapters],
            [*self.shared],
            [block.ln_1 for block in blocks(tower)[-len(adapters) :]],
        )


METHOD = Method(config=plain_config("mma"), encoders=MultiModalAdapters)
