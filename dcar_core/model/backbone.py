"""A frozen CLIP with two encoders that take prompts.

- Every family goes through `model.towers`: other modules know no layer, no pooling and no end-of-text rule.
- A batch of texts is cut to its longest caption; towers that read padding get it back inside.
- Frozen means `requires_grad_(False)` and `eval()`, not `no_grad`: gradients flow through to the prompts.
- `content_hash` stands for every weight and setting that decides on vectors; fingerprints are built on it.

Letters: B batch, L context length, n tokens in this batch, k prompt vectors, P patches, W_t and W_v widths, E joint
space.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dcar_core.model.config import RANDOM, BackboneSource
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.text.tokenizer import TextTokenizer
from dcar_core.model.towers.prompt_rows import AdapterMatrices
from dcar_core.model.towers.select import level_of, select_towers
from dcar_core.util.arrays import Pixels

__all__ = ["RANDOM", "AdapterMatrices", "Backbone", "BackboneSource", "load_backbone"]

_SENTENCE = "a red sports car parked in front of a house"


class Backbone(nn.Module):
    """Frozen towers, tokenizer and preprocessing. Build with `load_backbone`.

    embed_dim: E. text_width, vision_width: W_t and W_v; 0 where the tower takes no prompts.
    """

    def __init__(
        self, source: BackboneSource, clip: nn.Module, tokenizer: TextTokenizer, embed_dim: int, settings: bytes
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.source, self.tokenizer, self.embed_dim, self._settings = source, tokenizer, embed_dim, settings
        self.preprocess = Preprocess.from_open_clip(self.visual.preprocess_cfg)
        self.text_tower, self.image_tower = select_towers(
            self.clip, tokenizer.layout, tokenizer.caption_ids(_SENTENCE), self.preprocess.size
        )
        self.layout = self.text_tower.layout
        self.context_length = self.layout.context_length
        self.text_width, self.vision_width = self.text_tower.width, self.image_tower.width
        self.patch_grid = self.image_tower.patch_grid
        self.level = level_of(self.text_tower, self.image_tower)

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def scale(self) -> Tensor:
        """1 / tau, frozen."""
        scale: Tensor = self.clip.logit_scale  # type: ignore[assignment]
        return scale.exp().squeeze()

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever the owner does."""
        return super().train(False)

    def forward(self, name: str, *inputs: Tensor | AdapterMatrices | bool | None) -> Tensor:
        """Call one of the methods below by name, for `torch.func.functional_call`."""
        encoded: Tensor = getattr(self, name)(*inputs)
        return encoded

    def text_tokenizer(self, prompt_tokens: int) -> TextTokenizer:
        """The tokenizer of texts beside this many prompts; needs no PyTorch."""
        return self.tokenizer.with_limit(self.context_length - prompt_tokens)

    def tokenize(self, texts: Sequence[str], prompt_tokens: int = 0) -> Tensor:
        """Return int64 (B, n): start, words, end, padding; at most L - prompt_tokens, so that prompts fit in too."""
        return torch.from_numpy(self.text_tokenizer(prompt_tokens)(texts)).to(self.device)

    def encode_text(
        self, tokens: Tensor, prompts: Tensor | None = None, weights: Tensor | None = None, rows: bool = False
    ) -> Tensor:
        """Text features (B, E), not normalized, or with `rows` (B, 1 + n, E); see `TextTower`."""
        return (self.text_tower.encode_rows if rows else self.text_tower.encode)(tokens, prompts, weights)

    def lone_token_features(self, tokens: Tensor) -> Tensor:
        """Features of every token as a text of its own (B, n, E), not normalized, without prompts."""
        unique, place = torch.unique(tokens, return_inverse=True)  # [V], [B, n]
        start = tokens.new_tensor(self.layout.start_ids).expand(len(unique), -1)
        end = torch.full_like(unique, self.layout.end_id)
        alone = torch.cat([start, unique[:, None], end[:, None]], 1)  # [V, start + 2]
        return self.encode_text(alone)[place]

    def normalized(self, pixels: Pixels) -> Tensor:
        """uint8 (B, 3, S, S) -> float32, as `encode_image` takes them."""
        return torch.from_numpy(self.preprocess.normalize(pixels)).to(self.device)

    def encode_image(
        self,
        pixels: Tensor,
        prompts: Tensor | None = None,
        adapters: AdapterMatrices | None = None,
        rows: bool = False,
    ) -> Tensor:
        """Image features (B, E), not normalized, or with `rows` (B, 1 + P, E); see `ImageTower`."""
        return (self.image_tower.encode_rows if rows else self.image_tower.encode)(pixels, prompts, adapters)

    def content_hash(self) -> str:
        """sha256 over every weight and whatever else decides on vectors, as 64 hex digits."""
        digest = hashlib.sha256(json.dumps(asdict(self.preprocess), sort_keys=True).encode())
        digest.update(self._settings)
        for name, value in sorted(self.clip.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load_backbone(source: BackboneSource, device: str = "cpu") -> Backbone:
    """Load and freeze a CLIP.

    Raises:
        ModelError: an unknown name, weights that cannot be fetched or do not fit, a configuration that is not allowed.
        MissingExtraError: it needs transformers, which is not installed.
    """
    from dcar_core.model.open_clip_source import load_open_clip  # which takes seconds to import

    return Backbone(source, *load_open_clip(source, device))
