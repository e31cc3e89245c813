"""A frozen CLIP with two encoders that take prompts.

- Every family goes through `model.towers`: other modules know no layer, no pooling and
  no end-of-text rule. Towers are chosen by the model's structure, and compared with the
  model's own encoders at load.
- A batch of texts is cut to its longest caption; towers that read padding get it back
  inside.
- Frozen means `requires_grad_(False)` and `eval()`, not `no_grad`: gradients flow
  through to the prompts.

Letters: B batch, L context length, n tokens in this batch, k prompt vectors, P patches,
E joint space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcar_core.model.clip_files import content_hash
from dcar_core.model.config import RANDOM, BackboneSource
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.tokenizer import TextLayout, TextTokenizer
from dcar_core.model.towers.image import ImageTower, NativeImage, TimmImage, WholeImage
from dcar_core.model.towers.text import (
    AdapterMatrices,
    CocaText,
    HfText,
    NativeText,
    TextTower,
)
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ModelError

__all__ = ["RANDOM", "AdapterMatrices", "Backbone", "BackboneSource", "load_backbone"]

Level = Literal["full", "text"]

# Modules of timm whose models are of the classes that `TimmImage` covers.
_TIMM_MODULES = {"vision_transformer", "vision_transformer_hybrid", "vitamin", "eva"}
_TOLERANCE = 1e-4  # of the difference from the model's own features, relative to them


class Backbone(nn.Module):
    """Frozen towers, tokenizer and preprocessing. Build with `load_backbone`.

    embed_dim: E. text_width, vision_width: of the towers' rows and prompts; 0 for an
    image tower without rows. level: "full" if both towers take prompts, "text" if the
    text tower alone does.
    """

    def __init__(
        self,
        source: BackboneSource,
        clip: nn.Module,
        tokenizer: TextTokenizer,
        embed_dim: int,
        settings: bytes,
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.source = source
        self.tokenizer = tokenizer
        self.embed_dim = embed_dim
        self._settings = settings
        self.preprocess = Preprocess.from_open_clip(self.visual.preprocess_cfg)
        self.text_tower, self.image_tower = select_towers(
            self.clip,
            tokenizer.layout,
            self.preprocess.size,
        )
        self.layout = self.text_tower.layout
        self.context_length = self.layout.context_length
        self.text_width = self.text_tower.width
        self.vision_width = self.image_tower.width
        self.level: Level = "full" if self.vision_width else "text"

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

    def forward(
        self,
        name: str,
        *inputs: Tensor | AdapterMatrices | bool | None,
    ) -> Tensor:
        """Call one of the methods below by name, for `torch.func.functional_call`."""
        encoded: Tensor = getattr(self, name)(*inputs)
        return encoded

    def text_tokenizer(self, prompt_tokens: int) -> TextTokenizer:
        """The tokenizer of texts beside this many prompts; needs no PyTorch."""
        return replace(self.tokenizer, limit=self.context_length - prompt_tokens)

    @property
    def patch_grid(self) -> int:
        """Patches per side."""
        return self.image_tower.patch_grid

    @torch.no_grad()
    def embeddings(self, start: int, stop: int) -> Floats:
        """Embeddings of tokens [start, stop), before positions: (n, W_t)."""
        ids = torch.arange(len(self.text_tower.table.weight), device=self.device)[
            start:stop
        ]
        embedded: Floats = self.text_tower.embed(ids).float().cpu().numpy()
        return embedded

    def tokenize(self, texts: Sequence[str], prompt_tokens: int = 0) -> Tensor:
        """Return int64 (B, n): start, words, end, padding; at most L - prompt_tokens,
        so that prompts fit in too.
        """
        return torch.from_numpy(self.text_tokenizer(prompt_tokens)(texts)).to(
            self.device
        )

    def encode_text(
        self,
        tokens: Tensor,
        prompts: Tensor | None = None,
        weights: Tensor | None = None,
        rows: bool = False,
    ) -> Tensor:
        """Text features, not normalized: see `TextTower.encode`."""
        return self.text_tower.encode(tokens, prompts, weights, rows)

    def lone_token_features(self, tokens: Tensor) -> Tensor:
        """Features of every token as a text of its own (B, n, E), not normalized,
        without prompts.
        """
        unique, rows = torch.unique(tokens, return_inverse=True)  # [V], [B, n]
        start = tokens.new_tensor(self.layout.start_ids).expand(len(unique), -1)
        end = torch.full_like(unique, self.layout.end_id)
        alone = torch.cat([start, unique[:, None], end[:, None]], 1)  # [V, start + 2]
        return self.encode_text(alone)[rows]

    def standardized(self, pixels: Pixels) -> Tensor:
        """uint8 (B, 3, S, S) -> float32, as `encode_image` takes them."""
        return torch.from_numpy(self.preprocess.standardize(pixels)).to(self.device)

    def encode_image(
        self,
        pixels: Tensor,
        prompts: Tensor | None = None,
        adapters: AdapterMatrices | None = None,
        rows: bool = False,
    ) -> Tensor:
        """Image features, not normalized: see `ImageTower.encode`."""
        return self.image_tower.encode(pixels, prompts, adapters, rows)

    def content_hash(self) -> str:
        """sha256 over every weight and whatever else decides on vectors, as 64 hex
        digits; fingerprints build on it.
        """
        weights = (
            (name, value.detach().cpu().numpy())
            for name, value in self.clip.state_dict().items()
        )
        return content_hash(self.preprocess, self._settings, weights)


def load_backbone(source: BackboneSource, device: str = "cpu") -> Backbone:
    """Load and freeze a CLIP.

    Raises:
        ModelError: an unknown name, weights that cannot be fetched or do not fit, a
            configuration that is not allowed.
        MissingExtraError: it needs transformers, which is not installed.
    """
    # which takes seconds to import
    from dcar_core.model.open_clip_source import load_open_clip

    return Backbone(source, *load_open_clip(source, device))


def select_towers(
    clip: Any,
    layout: TextLayout,
    size: int,
) -> tuple[TextTower, ImageTower]:
    """Return the towers of an open_clip model in eval mode.

    Args:
        layout: of its tokenizer; `reads_padding` is decided here.
        size: S, the side of its images in pixels.

    Raises:
        ModelError: their features are not those of the model's own encoders.
    """
    device = next(clip.parameters()).device
    tokens = torch.tensor([[*layout.start_ids, 5, 6, 7, layout.end_id]], device=device)
    whole = nn.functional.pad(
        tokens,
        (0, layout.context_length - tokens.shape[1]),
        value=layout.pad_id,
    )
    pixels = torch.randn(
        1,
        3,
        size,
        size,
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    try:
        text = _text_tower(clip, layout)
        image = _image_tower(clip, size)
        with torch.no_grad():
            _require_equal(
                text.encode(tokens), clip.encode_text(whole, normalize=False)
            )
            _require_equal(
                image.encode(pixels), clip.encode_image(pixels, normalize=False)
            )
    except Exception as error:  # a library that changed may raise anything
        raise ModelError(
            "towers of this kind are not supported with this release of open_clip:"
            f" {error}"
        ) from error
    return text, image


def _text_tower(clip: Any, layout: TextLayout) -> TextTower:
    text = getattr(clip, "text", clip)
    if type(text).__name__ == "HFTextEncoder":
        return HfText(text, layout)
    if getattr(text, "cls_emb", None) is None:
        return NativeText(text, layout)
    return CocaText(text, layout)


def _image_tower(clip: Any, size: int) -> ImageTower:
    visual = clip.visual
    trunk = getattr(clip.visual, "trunk", None)
    if type(visual).__name__ == "VisionTransformer":
        return NativeImage(visual)
    if type(trunk).__name__ in ("VisionTransformer", "Eva") and not getattr(
        trunk,
        "rope_mixed",
        False,
    ):
        return TimmImage(visual)
    return WholeImage(clip, size)


def level_of_config(config: Mapping[str, Any]) -> Level:
    """Return the level of a model from its `model_cfg`, without building it."""
    vision = config["vision_cfg"]
    name = vision.get("timm_model_name")
    if name is None:
        # a list: ResNet
        return "text" if isinstance(vision.get("layers"), list | tuple) else "full"
    from timm.models import model_entrypoint

    module = model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]
    return "full" if module in _TIMM_MODULES and "rope_mixed" not in name else "text"


def _require_equal(features: Tensor, stock: Tensor) -> None:
    difference = float((features - stock).norm() / stock.norm().clamp(min=1e-12))
    if not difference <= _TOLERANCE:  # true for NaN, too
        raise ValueError(
            f"features differ from the model's own by {difference:.1e} of their length"
        )
