"""Baselines that are configurations of the shared model: zero-shot CLIP, CoOp, CLIP-Adapter and MaPLe."""

from dataclasses import replace

from dcar_core.model.config import AdapterConfig, PromptConfig
from dcar_core.model.methods.method import Method, plain_config

METHODS = (
    Method(config=plain_config("clip")),
    # text prompts alone
    Method(config=replace(plain_config("coop"), prompt=PromptConfig(image=False))),
    # bottlenecks on the features of both towers
    Method(config=replace(plain_config("clip-adapter"), adapter=AdapterConfig(text=True, image=True))),
    # coupled prompts in several blocks
    Method(config=replace(plain_config("maple"), prompt=PromptConfig(depth=4))),
)
