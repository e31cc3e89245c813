"""The learned parts around the frozen CLIP, and the two encoders that use them.

One class holds DCAR, its ablations and the baselines (`methods`), since they differ
only in which parts exist. A text vector never depends on an image and an image vector
never on a text, so a gallery is encoded once. What reads both is the second stage of a
search.

Letters: B images, N texts, M pairs, n tokens, P patches, E joint space, W_t and W_v
widths, D' last blocks.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.backbone import AdapterMatrices, Backbone
from dcar_core.model.config import ModelConfig, PromptConfig
from dcar_core.model.methods import Method, find_method, require_runnable
from dcar_core.model.token_weights import TokenWeightHead
from dcar_core.model.towers.image import ClassRowInputs, NativeImage
from dcar_core.model.towers.text import PROMPT_STD
from dcar_core.model.weight_changes import WeightChanges
from dcar_core.util.arrays import Floats, Pixels

INITIAL_TEXT = "a photo of a"
# weights of the two parts of the second score
PROMPTED = 0.25
LATE = 0.1
_INNER = 64


class DualPrompts(nn.Module):
    """Text prompts V and the image prompts E generated from them (section 1).

    e_i = Linear(v_i) [ours, as MaPLe couples them] + residual_i [ours; the figure marks
    both v and e as trained]. The layer is one for all depths, and `maple` has the
    residual too [ours; MaPLe has a layer for each depth and none]. E starts near the
    patches of a blank image [ours], since prompts of random directions first lower
    recall.
    """

    def __init__(self, backbone: Backbone, config: PromptConfig) -> None:
        super().__init__()
        self.config = config
        std = backbone.text_tower.prompt_std
        start = torch.empty(config.depth, config.length, backbone.text_width).normal_(
            std=std
        )
        tokens = backbone.tokenize([INITIAL_TEXT])
        words = tokens[backbone.layout.caption_mask(tokens)][None]
        if words.shape[1] == config.length:
            start[0] = backbone.text_tower.embed(words)[0].detach().cpu()
        self.text = nn.Parameter(start)
        if config.image:
            self.couple = nn.Linear(backbone.text_width, backbone.vision_width)
            nn.init.normal_(self.couple.weight, std=PROMPT_STD)
            nn.init.zeros_(self.couple.bias)
            with torch.no_grad():
                blank = backbone.standardized(backbone.preprocess.blank()[None])
                # [depth, W_v]
                rows = backbone.image_tower.blank_rows(blank, config.depth).cpu()
            # equal prompts would learn alike
            noise = torch.randn(config.depth, config.length, backbone.vision_width)
            self.residual = nn.Parameter(rows[:, None] + 0.05 * rows.std() * noise)

    def text_prompts(self) -> Tensor | None:
        """(depth, k, W_t)"""
        return self.text if self.config.text else None

    def image_prompts(self) -> Tensor | None:
        """(depth, k, W_v)"""
        return self.couple(self.text) + self.residual if self.config.image else None


class FeatureAdapter(nn.Module):
    """A residual bottleneck on the features of a tower, zero at the start.

    On frozen caption features it is the paper's CAA: part of L_cate, not of serving. On
    the towers' outputs it is CLIP-Adapter's, here without a fixed residual ratio
    [ours].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(16, width // 4))
        self.up = nn.Linear(self.down.out_features, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(..., E) -> (..., E), normalized."""
        return F.normalize(features + self.up(F.relu(self.down(features))), dim=-1)


class BlockAdapters(nn.Module):
    """A residual bottleneck behind every block of the image tower, zero at the start
    [ours].

    Like low-rank changes of the weights, they change the inner layers, which prompts
    and feature adapters cannot. Unlike them, they are inputs of the shared tower.
    """

    def __init__(self, backbone: Backbone, inner: int) -> None:
        super().__init__()
        shape = (backbone.image_tower.blocks, inner, backbone.vision_width)
        width = backbone.vision_width
        self.down = nn.Parameter(torch.randn(shape) / width**0.5)
        self.up = nn.Parameter(torch.zeros(shape))

    def matrices(self) -> AdapterMatrices:
        """Two of (D, r, W_v)."""
        return self.down, self.up


class QueryParts(NamedTuple):
    """Texts as the second stage reads them. vectors: (N, E). words: (N, n, E),
    normalized. mask: bool (N, n).
    """

    vectors: Tensor
    words: Tensor
    mask: Tensor


Parts = TypeVar("Parts", QueryParts, ClassRowInputs)


def take(parts: Parts, rows: Tensor | slice) -> Parts:
    """Return these rows of each part."""
    return type(parts)(*(part[rows] for part in parts))


class QueryPrompts(nn.Module):
    """The learned layers of the second stage [ours]. The prompts are zero at the start.

    blocks: D'.
    """

    def __init__(self, backbone: Backbone, blocks: int) -> None:
        super().__init__()
        dim = backbone.embed_dim
        width = backbone.vision_width
        self.blocks = blocks
        self.down = nn.Linear(dim, _INNER)
        self.up = nn.Linear(_INNER, blocks * width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.word = nn.Linear(dim, _INNER, bias=False)
        self.patch = nn.Linear(width, _INNER, bias=False)
        # log of 1 / temperature of late interaction in the loss
        self.late_scale = nn.Parameter(torch.tensor(3.0))

    def prompts(self, vectors: Tensor) -> Tensor:
        """(M, E), normalized -> (M, D', W_v)."""
        prompts: Tensor = self.up(F.gelu(self.down(vectors * vectors.shape[-1] ** 0.5)))
        return prompts.reshape(len(prompts), self.blocks, -1)

    def late(self, texts: QueryParts, patches: Tensor) -> Tensor:
        """Late interaction (M,) of texts with the patches (M, P, W_v) of images."""
        return (self.best_patches(texts, patches) * texts.mask).sum(1) / texts.mask.sum(
            1
        ).clamp(min=1)

    def best_patches(self, texts: QueryParts, patches: Tensor) -> Tensor:
        """The cosine of each word with its most similar patch: (M, n)."""
        words = F.normalize(self.word(texts.words.float()), dim=-1)
        keys = F.normalize(
            self.patch(F.layer_norm(patches.float(), patches.shape[-1:])), dim=-1
        )
        return (words @ keys.transpose(1, 2)).amax(-1)


class DCAR(nn.Module):
    """A frozen backbone with its trainables. `encode_text` and `encode_image` return
    normalized features (B, E).

    changes: of the backbone's own weights, in a training; a checkpoint holds a merged
    model. encoders: of a plug-in, in place of the backbone's. query_weights,
    rerank_weight: as in the configuration, or as validation prefers.

    Raises:
        ModelError: the backbone's towers cannot run the method; the message names one
            that they can.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: ModelConfig,
        changes: WeightChanges | None = None,
        encoders: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require_runnable(config, backbone)
        self.backbone = backbone
        self.config = config
        self.query_weights = config.reweight.query
        self.rerank_weight = config.rerank.weight
        prompt = config.prompt
        rerank = config.rerank
        self.prompts = DualPrompts(backbone, prompt) if any(prompt.depths) else None
        self.head = (
            TokenWeightHead(backbone.text_width, config.reweight)
            if config.reweight.train != "none"
            else None
        )
        self.text_adapter = (
            FeatureAdapter(backbone.embed_dim) if config.adapter.text else None
        )
        self.image_adapter = (
            FeatureAdapter(backbone.embed_dim) if config.adapter.image else None
        )
        self.block_adapters = (
            BlockAdapters(backbone, config.adapter.blocks)
            if config.adapter.blocks
            else None
        )
        self.query_prompts = (
            QueryPrompts(backbone, rerank.blocks) if rerank.blocks else None
        )
        self.changes = changes
        self.encoders = encoders
        # A text adapter whose queries are unprompted, as the captions of L_cate are,
        # serves both.
        is_shared = self.text_adapter is not None and self.text_is_frozen
        self.caa = (
            FeatureAdapter(backbone.embed_dim)
            if config.loss.category > 0 and not is_shared
            else None
        )
        self.to(backbone.device)

    @property
    def method(self) -> Method:
        """The method, which training needs. Raise DcarError if its plug-in is
        missing.
        """
        return find_method(self.config.method)

    @property
    def served_config(self) -> ModelConfig:
        """The configuration with what validation prefers."""
        reweight = replace(self.config.reweight, query=self.query_weights)
        return replace(
            self.config,
            reweight=reweight,
            rerank=replace(self.config.rerank, weight=self.rerank_weight),
        )

    @property
    def prompt_tokens(self) -> int:
        """Token positions that the text prompts take."""
        return self.config.prompt.length if self.config.prompt.text else 0

    def trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that training learns: all but the backbone's."""
        return (
            (name, p)
            for name, p in self.named_parameters()
            if not name.startswith("backbone.")
        )

    def served(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that a checkpoint holds: the learned ones without those of the
        loss alone.
        """
        return (
            (name, p) for name, p in self.trainables() if not name.startswith("caa.")
        )

    def predicted_weights(self, tokens: Tensor) -> Tensor | None:
        """Factors (B, n) from the text alone; None without a head."""
        if self.head is None:
            return None
        mask = self.backbone.layout.caption_mask(tokens)
        return self.head(self.backbone.text_tower.embed(tokens), mask)  # type: ignore[no-any-return]

    def encode_text(
        self,
        tokens: Tensor,
        weights: Tensor | None = None,
        *,
        rows: bool = False,
    ) -> Tensor:
        """int64 (B, n), made with room for the prompts, and optional factors (B, n) ->
        (B, E).

        rows: also return the features of the tokens behind that of the text: (B, 1 + n,
        E).
        """
        return self.adapt_text(self.text_features(tokens, weights, rows=rows))

    def text_features(
        self,
        tokens: Tensor,
        weights: Tensor | None = None,
        *,
        rows: bool = False,
    ) -> Tensor:
        """As `encode_text`, before the text adapter."""
        prompts = self.prompts.text_prompts() if self.prompts is not None else None
        return F.normalize(
            self._run("encode_text", tokens, prompts, weights, rows), dim=-1
        )

    def encode_query(self, tokens: Tensor) -> Tensor:
        """Encode as a query, without an image: see `query_features`."""
        return self.adapt_text(self.query_features(tokens))

    def query_features(self, tokens: Tensor) -> Tensor:
        """Features of queries before the text adapter: with the head's factors if
        validation preferred them.
        """
        return self.text_features(
            tokens,
            (
                self.predicted_weights(tokens)
                if self.query_weights == "predicted"
                else None
            ),
        )

    def encode_image(self, pixels: Tensor, *, rows: bool = False) -> Tensor:
        """float32 (B, 3, S, S), standardized -> (B, E), or with the patches (B, 1 + P,
        E).
        """
        return self.adapt_image(self.image_features(pixels, rows=rows))

    def image_features(self, pixels: Tensor, *, rows: bool = False) -> Tensor:
        """As `encode_image`, before the image adapter."""
        prompts = self.prompts.image_prompts() if self.prompts is not None else None
        if self.block_adapters is not None:
            adapters = self.block_adapters.matrices()
        else:
            adapters = None
        return F.normalize(
            self._run("encode_image", pixels, prompts, adapters, rows), dim=-1
        )

    def _run(
        self,
        name: str,
        *inputs: Tensor | AdapterMatrices | bool | None,
    ) -> Tensor:
        """Call a method of the backbone, with the changed weights if there are some, or
        a plug-in's of its name.
        """
        if self.encoders is not None:
            return getattr(self.encoders, name)(self.backbone, inputs[0], inputs[-1])  # type: ignore[no-any-return]
        if self.changes is not None:
            changed = self.changes.changed(self.backbone, image=name == "encode_image")
        else:
            changed = {}
        encoded: Tensor = torch.func.functional_call(
            self.backbone,
            changed,
            (name, *inputs),
        )
        return encoded

    def adapt_text(self, features: Tensor) -> Tensor:
        """Apply the text adapter: (B, E) -> (B, E), both normalized."""
        return features if self.text_adapter is None else self.text_adapter(features)

    def adapt_image(self, features: Tensor) -> Tensor:
        """Apply the image adapter: (B, E) -> (B, E), both normalized."""
        return features if self.image_adapter is None else self.image_adapter(features)

    @property
    def text_is_frozen(self) -> bool:
        """True if nothing is learned in or before the text tower, so that its features
        can be computed once.
        """
        is_changed = self.encoders is not None or (
            self.changes is not None and self.changes.touches(image=False)
        )
        return self.head is None and self.prompt_tokens == 0 and not is_changed

    @property
    def image_is_frozen(self) -> bool:
        """True if nothing is learned in or before the image tower, so that its features
        can be computed once.
        """
        is_changed = self.encoders is not None or (
            self.changes is not None and self.changes.touches(image=True)
        )
        return (
            self.config.prompt.depths[1] == 0
            and self.block_adapters is None
            and not is_changed
        )

    def category_adapter(self) -> FeatureAdapter | None:
        """The adapter of L_cate's captions; None if the loss has no such term."""
        return None if self.config.loss.category <= 0 else self.caa or self.text_adapter


class SecondStage:
    """The second stage of a search [ours]: a query scored with each of its first
    images, by prompts made of the query.

        second score = 0.25 x cosine of the text and the image, read with the query's
        prompts + 0.1 x late interaction

    - A bottleneck turns the text vector into a prompt for each of the last blocks of
      the image tower. As in ELIP (Zhan et al., arXiv 2502.15682), prompts depend on the
      query; they are added to the class row, which reads the patches.
    - Late interaction (FILIP): the cosine of each word with its most similar patch in a
      small space, mean over words.
    - Patches never see the query, so a pair costs one row of these blocks.
    """

    def __init__(self, model: DCAR) -> None:
        assert model.query_prompts is not None
        self.model = model
        self.layers = model.query_prompts
        self.tower = cast(NativeImage, model.backbone.image_tower)
        self.block = self.tower.blocks - self.layers.blocks
        self.adapters = (
            model.block_adapters.matrices()
            if model.block_adapters is not None
            else None
        )

    @torch.no_grad()
    def image_rows(self, pixels: Tensor) -> Tensor:
        """What a cache keeps of images: float32 (B, 3, S, S), standardized -> (B, 1 +
        P, W_v).
        """
        return self.tower.rows_before(pixels, self.block, self.adapters)

    @torch.no_grad()
    def images(self, rows: Tensor) -> ClassRowInputs:
        """Finish `image_rows`."""
        return self.tower.class_row_inputs(rows, self.block, self.adapters)

    @torch.no_grad()
    def vectors(self, images: ClassRowInputs) -> Tensor:
        """The images' own vectors (B, E)."""
        no_prompts = images.first.new_zeros(
            len(images.first),
            self.layers.blocks,
            self.tower.width,
        )
        rows = self.tower.class_row_features(
            images,
            no_prompts,
            self.block,
            self.adapters,
        )
        return self.model.adapt_image(F.normalize(rows, dim=-1))

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> QueryParts:
        """int64 (N, n) -> parts."""
        words = F.normalize(
            self.model.backbone.encode_text(tokens, rows=True)[:, 1:], dim=-1
        )
        return QueryParts(
            self.model.encode_query(tokens),
            words,
            self.model.backbone.layout.caption_mask(tokens),
        )

    def prompted(self, texts: QueryParts, images: ClassRowInputs) -> Tensor:
        """Cosines (M,) of texts with images that were read with the texts' prompts."""
        rows = self.tower.class_row_features(
            images,
            self.layers.prompts(texts.vectors),
            self.block,
            self.adapters,
        )
        return (texts.vectors * self.model.adapt_image(F.normalize(rows, dim=-1))).sum(
            -1
        )

    @torch.no_grad()
    def scores(self, texts: QueryParts, images: ClassRowInputs) -> Tensor:
        """Second scores (M,) of M texts with as many images."""
        return PROMPTED * self.prompted(texts, images) + LATE * self.layers.late(
            texts, images.patches
        )

    def image_features(self, pixels: Pixels) -> Floats:
        """uint8 (C, 3, S, S), from `preprocess` -> what `query_scores` needs of images,
        float16 (C, 1 + P, W_v).
        """
        rows: Floats = (
            self.image_rows(self.model.backbone.standardized(pixels))
            .half()
            .cpu()
            .numpy()
        )
        return rows

    @torch.inference_mode()
    def query_scores(self, text: str, image_features: Floats) -> Floats:
        """Return the second scores (C,) of a query with each image, times their
        weight.
        """
        backbone = self.model.backbone
        texts = self.texts(backbone.tokenize([text], self.model.prompt_tokens))
        images = self.images(
            torch.from_numpy(image_features).to(backbone.device).float()
        )
        pairs = take(texts, torch.zeros(len(image_features), dtype=torch.long))
        scores: Floats = self.scores(pairs, images).float().cpu().numpy()
        return scores * self.model.rerank_weight


def seeded_model(backbone: Backbone, config: ModelConfig, seed: int) -> DCAR:
    """Create a model to train, whose initial trainables follow from the seed."""
    torch.manual_seed(seed)
    method = find_method(config.method)
    changes = method.changes and method.changes(backbone)
    return DCAR(
        backbone,
        config,
        changes,
        method.encoders and method.encoders(backbone),
    )
