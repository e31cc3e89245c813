"""The methods by name, and which of them a model can run.

A method of another distribution is a plug-in: an entry point `NAME = "module:object"` in the group `dcar.methods`,
whose object is a `Method`.
"""

from dataclasses import replace
from importlib.metadata import entry_points

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import AdapterConfig, ModelConfig
from dcar_core.model.methods import baselines, dcar
from dcar_core.model.methods.method import Method
from dcar_core.util.errors import DcarError, ModelError

DEFAULT = "query-prompts"  # of `dcar train`, for a model that can run it
ENTRY_POINTS = "dcar.methods"  # the group
MAX_DEPTH = 128  # more blocks than any tower has

METHODS: dict[str, Method] = {each.config.method: each for each in (*baselines.METHODS, *dcar.METHODS)}


def find_method(name: str) -> Method:
    """Return a method of this package or of a plug-in, which is imported here.

    Raises:
        DcarError: none has this name (the message lists all), or the plug-in cannot be loaded, or is no `Method`.
    """
    if name in METHODS:
        return METHODS[name]
    plug_ins = entry_points(group=ENTRY_POINTS)
    if name not in plug_ins.names:
        raise DcarError(f"no method is named {name!r}; there are: {', '.join([*METHODS, *sorted(plug_ins.names)])}")
    place = plug_ins[name].value
    try:
        found = plug_ins[name].load()
    except Exception as error:
        raise DcarError(f"the plug-in {place} cannot be loaded ({error}); update or uninstall it") from error
    if not isinstance(found, Method):
        raise DcarError(f"the plug-in {place} is a {type(found).__name__}, not a Method; update or uninstall it")
    return replace(found, config=replace(found.config, method=name))


def method(name: str) -> ModelConfig:
    """Return the configuration of a method. Raise DcarError as `find_method`."""
    return find_method(name).config


def default_method(backbone: Backbone) -> str:
    """Return the name of the method that `dcar train` uses by default."""
    if backbone.level == "full":
        return DEFAULT if has_second_stage(backbone, METHODS[DEFAULT].config) else "block-adapters+"
    return "dcar+-text" if backbone.level == "text" else "clip-adapter"


def comparable_methods(backbone: Backbone) -> list[str]:
    """Return the names of the methods that `dcar evaluate` compares by default."""
    return {
        "full": ["clip", "coop", "clip-adapter", "maple", "dcar", "dcar+", default_method(backbone)],
        "text": ["clip", "coop", "clip-adapter", "dcar-text", "dcar+-text"],
    }.get(backbone.level, ["clip", "clip-adapter"])


def has_second_stage(backbone: Backbone, config: ModelConfig) -> bool:
    """Return whether a model can run the second stage of a method that has one (`model.query_prompts`)."""
    return backbone.image_tower.pools_class_row and config.rerank.blocks <= backbone.image_tower.blocks


def require_runnable(config: ModelConfig, level: str, model: str, context: int) -> None:
    """Raise ModelError, which names another method, if the towers of a model cannot run a method.

    context: token positions behind the start tokens.
    """
    prompt, has_prompts = config.prompt, config.prompt.length > 0
    needs_text = any(prompt.depths) or config.reweight.train != "none" or config.loss.late > 0
    needs_rows = prompt.depths[1] > 0 or config.reweight.image_feature == "patches" or config.adapter.blocks > 0
    needs_rows = needs_rows or config.loss.late > 0
    if level == "features" and needs_text:
        needed, tower, other = "prompts or token weights", f"the towers of {model} do not take", "clip-adapter"
        raise ModelError(f"{config.method} needs {needed}, which {tower}; use the method {other}")
    if level != "full" and needs_rows:
        needed, tower = "image prompts, block adapters or patches", f"the image tower of {model} does not have"
        other = _text_variant(config) if level == "text" else "clip-adapter"
        raise ModelError(f"{config.method} needs {needed}, which {tower}; use the method {other}")
    if has_prompts and prompt.length > context - 1:
        raise ModelError(f"{prompt.length} prompts do not fit into the {context} tokens of {model}")
    if has_prompts and prompt.depth > MAX_DEPTH:
        raise ModelError(f"prompts for {prompt.depth} blocks are too many; a tower has at most {MAX_DEPTH}")


def _text_variant(config: ModelConfig) -> str:
    """The method that is most like this one without image prompts."""
    if config.adapter != AdapterConfig():
        return "dcar+-text"
    return "coop" if config.reweight.train == "none" and config.loss.category == 0 else "dcar-text"
