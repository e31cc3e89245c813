"""Towers: the text and image encoders of every CLIP family behind one protocol that takes prompts.

In: open_clip's model and its tokenizer. Out: towers that encode tokens and pixels, with or without prompt rows.
`model.backbone`, `model.catalogue` and `runtimes` import it; nothing else does.
"""

from dcar_core.model.towers.image import ImageTower, NativeImage, TimmImage, WholeImage
from dcar_core.model.towers.select import select_towers
from dcar_core.model.towers.text import CausalText, NativeText, TextTower, WholeText

__all__ = [
    "CausalText",
    "ImageTower",
    "NativeImage",
    "NativeText",
    "TextTower",
    "TimmImage",
    "WholeImage",
    "WholeText",
    "select_towers",
]
