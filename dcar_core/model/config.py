"""Configuration as frozen data with a dict round trip. Nothing here reads the
environment.
"""

from collections.abc import Mapping
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from dcar_core.util.machine import WEIGHTS_FILE

TrainWeights = Literal["none", "pair"]
QueryWeights = Literal["none", "predicted"]
TokenFeature = Literal["context", "alone"]
ImageFeature = Literal["pooled", "patches"]
Amp = Literal["auto", "off", "bfloat16", "float16"]
LossDirection = Literal["both", "image-to-text"]

MODEL_CONFIG = "open_clip_config.json"  # in the directory of a model
RANDOM = "random"  # instead of weights
GRID = (5e-4, 2e-3, 5e-3, 1e-2)  # learning rates for tuning

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
_Positive = Annotated[int, Field(ge=1)]
# an integer stays one: fingerprints and the names of runs cover its text
_Number = float | int


@dataclass(frozen=True)
class _Config:
    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the configuration of a `to_dict`. Raise ValueError, which names the
        field, for a wrong value.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                for fault in error.errors()
            ]
            raise ValueError(f"{cls.__name__}: {'; '.join(faults)}") from None


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class PromptConfig(_Config):
    """The dual prompts (section 1 of the method).

    length: k, the number of prompt vectors; 0 is plain CLIP. depth: how many
    transformer blocks get fresh prompts; 1 is the paper's figure, more is MaPLe's.
    text, image: which towers are prompted. Text alone is CoOp.
    """

    length: Annotated[int, Field(ge=0)] = 4
    # more blocks than any tower has would fill the memory
    depth: Annotated[int, Field(ge=1, le=128)] = 1
    text: bool = True
    image: bool = True

    @property
    def depths(self) -> tuple[int, int]:
        """Depth of the text prompts and of the image prompts, 0 for a tower without
        any.
        """
        depth = self.depth if self.length else 0
        return depth * self.text, depth * self.image


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ReweightConfig(_Config):
    """Dynamic token re-weighting (section 2).

    train: the weights that captions get in training: "pair" from their own image, as
    published, or "none". query: the weights of a query, which has no image. "predicted"
    or "none", as the validation split prefers. strength, low, high [ours]: 1 + strength
    * (w / mean - 1), clipped to [low, high]. token_feature: of a token in a pair
    weight, in its caption or alone. image_feature: of the image in a pair weight,
    pooled or of the patch most like the token (FILIP's).
    """

    train: TrainWeights = "pair"
    query: QueryWeights = "none"
    strength: _Number = 0.5
    low: _Number = 0.5
    high: _Number = 2.0
    token_feature: TokenFeature = "context"
    image_feature: ImageFeature = "pooled"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class AdapterConfig(_Config):
    """Residual bottlenecks, part of serving.

    text, image: on the features that leave the towers (CLIP-Adapter; dcar+ [ours]). If
        the text tower is unchanged, L_cate uses the text adapter for its captions, in
        place of a category adapter that serving drops.
    blocks: inner width of the adapters behind every block of the image tower (Houlsby
        et al. 2019; dcar+ [ours]); 0 for none.
    """

    text: bool = False
    image: bool = False
    # a forged config.json must not fill the memory
    blocks: Annotated[int, Field(ge=0, le=4096)] = 0


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RerankConfig(_Config):
    """The second stage of a search [ours]: see `model.dcar.SecondStage`.

    blocks: the last blocks of the image tower, before which a prompt made from the
    query is added; 0 for no such stage. weight: of the second score, as the validation
    split prefers; 0 turns the stage off.
    """

    blocks: Annotated[int, Field(ge=0, le=16)] = 0
    weight: Annotated[_Number, Field(ge=0, le=10)] = 1.0


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class LossConfig(_Config):
    """L = L_con + category * L_cate + head * L_head + anchor * L_anchor + ... (sections
    3 and 4).

    alpha: the category-matching weight. anchor [ours, dcar+]: how strongly adapted
    features are held to the frozen encoders' (PromptSRC's idea). direction: L_con's
    directions. "image-to-text" alone is the classification loss of CoOp's and MaPLe's
    own code. late: share of late interaction in L_con (FILIP). hard_negatives [ours]: a
    second stage, which tunes the adapters of both features on the images nearest to
    each
        caption (`training.hard_negatives`).
    """

    category: _Number = 0.5
    head: _Number = 1.0
    alpha: _Number = 0.5
    anchor: _Number = 0.0
    direction: LossDirection = "both"
    late: Annotated[_Number, Field(ge=0, le=1)] = 0
    hard_negatives: bool = False


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class TrainConfig(_Config):
    """One training run.

    warmup: the share of all steps over which the learning rate rises; then it falls as
    a cosine. patience: epochs without a better validation recall that end the run; 0
    never stops early. accumulate: parts of a batch that are computed one by one, for
    small devices; the result is the same. amp: mixed precision; "auto" uses it on a GPU
    that supports it.
    """

    epochs: _Positive = 20
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Annotated[float, Field(ge=0)] = 2e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    patience: int = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    accumulate: _Positive = 1
    amp: Amp = "auto"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ModelConfig(_Config):
    """Everything that rebuilds a method on a backbone."""

    method: str = "dcar"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    reweight: ReweightConfig = field(default_factory=ReweightConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)

    def with_loss_direction(self, direction: LossDirection) -> Self:
        return replace(self, loss=replace(self.loss, direction=direction))


def plain_config(name: str, **parts: Any) -> ModelConfig:
    """Return a configuration with no parts of the shared model but those given."""
    plain = {
        "prompt": PromptConfig(length=0),
        "reweight": ReweightConfig(train="none"),
        "loss": LossConfig(category=0, head=0),
    }
    return ModelConfig(method=name, **plain | parts)


UNTOUCHED = plain_config("clip")  # zero-shot


@dataclass(frozen=True)
class BackboneSource:
    """The source of a backbone: an open_clip name or a directory, and for a name its
    weights.

    pretrained: a tag, a file, or "random" for measurements of speed.
    """

    model: str
    pretrained: str | None = None

    @property
    def directory(self) -> Path | None:
        path = Path(self.model)
        return path if path.is_dir() else None

    @property
    def weights_file(self) -> Path:
        """Place of local weights, where nothing may be."""
        if self.directory:
            return self.directory / WEIGHTS_FILE
        return Path(self.pretrained or "")
