"""Configuration as frozen data with a dict round trip. Nothing here reads the environment."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

TrainWeights = Literal["none", "pair"]
QueryWeights = Literal["none", "predicted"]
TokenFeature = Literal["context", "alone"]
ImageFeature = Literal["pooled", "patches"]
Amp = Literal["auto", "off", "bfloat16", "float16"]
LossDirection = Literal["both", "image-to-text"]

MODEL_CONFIG = "open_clip_config.json"  # in the directory of a model
MAX_BLOCK_WIDTH = 4096  # of adapters; a forged config.json must not fill the memory
GRID = (5e-4, 2e-3, 5e-3, 1e-2)  # learning rates for tuning


class _Config:
    _omitted: ClassVar[frozenset[str]] = frozenset()
    _former: ClassVar[Mapping[str, str | None]] = {}  # names in older checkpoints; None: without a meaning now

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; omit options of later versions at their defaults, so that older fingerprints stay."""
        usual = vars(type(self)())
        kept = {name: v for name, v in vars(self).items() if name not in self._omitted or v != usual[name]}
        return {name: v.to_dict() if isinstance(v, _Config) else v for name, v in kept.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        usual = vars(cls())
        current = {name: cls._former.get(name, name) for name in values}
        values = {new: values[name] for name, new in current.items() if new is not None}
        if unknown := sorted(set(values) - set(usual)):
            raise ValueError(f"{cls.__name__} has no field {unknown}; it has {sorted(usual)}")
        for name, value in values.items():
            _require_kind(f"{cls.__name__}.{name}", value, usual[name], get_args(cls.__annotations__[name]))
        parts = {name: part for name, part in usual.items() if isinstance(part, _Config) and name in values}
        return cls(**{**values, **{name: part.from_dict(values[name]) for name, part in parts.items()}})


def _require_kind(name: str, value: Any, usual: object, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless a value is of the kind of its default, and one of the choices if there are any."""
    kind = dict if isinstance(usual, _Config) else type(usual)
    is_of_kind = isinstance(value, int | float if kind is float else kind) and (kind is bool or type(value) is not bool)
    if not is_of_kind or (choices and value not in choices):
        wanted = " or ".join(map(str, choices)) or f"of the type {kind.__name__}"
        raise ValueError(f"{name} must be {wanted}, not {value!r:.80}")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(_Config):
    """The dual prompts (section 1 of the method).

    length: k, the number of prompt vectors; 0 is plain CLIP.
    depth: how many transformer blocks get fresh prompts; 1 is the paper's figure, more is MaPLe's.
    text, image: which towers are prompted. Text alone is CoOp.
    """

    length: int = 4
    depth: int = 1
    text: bool = True
    image: bool = True

    def __post_init__(self) -> None:
        if self.length < 0 or self.depth < 1:
            raise ValueError(f"length must be at least 0 and depth at least 1, not {self.length} and {self.depth}")

    @property
    def depths(self) -> tuple[int, int]:
        """Depth of the text prompts and of the image prompts, 0 for a tower without any."""
        depth = self.depth if self.length else 0
        return depth * self.text, depth * self.image


@dataclass(frozen=True, kw_only=True)
class ReweightConfig(_Config):
    """Dynamic token re-weighting (section 2).

    train: the weights that captions get in training: "pair" from their own image, as published, or "none".
    query: the weights of a query, which has no image. "predicted" or "none", as the validation split prefers.
    strength, low, high [ours]: 1 + strength * (w / mean - 1), clipped to [low, high].
    token_feature: of a token in a pair weight, in its caption or alone.
    image_feature: of the image in a pair weight, pooled or of the patch most like the token (FILIP's).
    """

    train: TrainWeights = "pair"
    query: QueryWeights = "none"
    strength: float = 0.5
    low: float = 0.5
    high: float = 2.0
    token_feature: TokenFeature = "context"
    image_feature: ImageFeature = "pooled"
    _omitted = frozenset({"token_feature", "image_feature"})
    _former: ClassVar[Mapping[str, str | None]] = {"word": "token_feature", "picture": "image_feature"}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(_Config):
    """Residual bottlenecks, part of serving.

    text, image: on the features that leave the towers (CLIP-Adapter; dcar+ [ours]). If the text tower is unchanged,
        L_cate uses the text adapter for its captions, in place of a category adapter that serving drops.
    blocks: inner width of the adapters behind every block of the image tower (Houlsby et al. 2019; dcar+ [ours]); 0 for
        none.
    """

    text: bool = False
    image: bool = False
    blocks: int = 0
    _omitted = frozenset({"blocks"})

    def __post_init__(self) -> None:
        if not 0 <= self.blocks <= MAX_BLOCK_WIDTH:
            raise ValueError(f"blocks must be 0 to {MAX_BLOCK_WIDTH}, not {self.blocks}")


@dataclass(frozen=True, kw_only=True)
class LossConfig(_Config):
    """L = L_con + category * L_cate + head * L_head + anchor * L_anchor + ... (sections 3 and 4).

    alpha: the category-matching weight.
    anchor [ours, dcar+]: how strongly adapted features are held to the frozen encoders' (PromptSRC's idea).
    direction: L_con's directions. "image-to-text" alone is the classification loss of CoOp's and MaPLe's own code.
    """

    category: float = 0.5
    head: float = 1.0
    alpha: float = 0.5
    anchor: float = 0.0
    direction: LossDirection = "both"
    _omitted = frozenset({"direction"})
    _former: ClassVar[Mapping[str, str | None]] = {"consistency": None, "distance": None}

    def __post_init__(self) -> None:
        if self.direction not in get_args(LossDirection):
            raise ValueError(f"direction must be {' or '.join(get_args(LossDirection))}, not {self.direction!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Config):
    """One training run.

    warmup: the share of all steps over which the learning rate rises; then it falls as a cosine.
    patience: epochs without a better validation recall that end the run; 0 never stops early.
    accumulate: parts of a batch that are computed one by one, for small devices; the result is the same.
    amp: mixed precision; "auto" uses it on a GPU that supports it.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    patience: int = 0
    seed: int = 0
    accumulate: int = 1
    amp: Amp = "auto"

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.epochs < 1 or self.batch_size < 2:
            raise ValueError(
                f"epochs and accumulate must be at least 1 and batch_size 2, not {self.epochs}, {self.accumulate} and "
                f"{self.batch_size}"
            )
        if not (0 <= self.lr < math.inf) or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"lr must be finite and at least 0, and seed an integer in [0, 2 ** 63), not {self.lr} and {self.seed}"
            )
        if self.amp not in get_args(Amp):
            raise ValueError(f"amp must be {', '.join(get_args(Amp))}, not {self.amp!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Config):
    """Everything that rebuilds a method on a backbone."""

    method: str = "dcar"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    reweight: ReweightConfig = field(default_factory=ReweightConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def with_loss_direction(self, direction: LossDirection) -> Self:
        return replace(self, loss=replace(self.loss, direction=direction))

    def with_query_weights(self, query: QueryWeights) -> Self:
        return replace(self, reweight=replace(self.reweight, query=query))
