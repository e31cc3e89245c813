"""Batches for training the base model: images, augmentation, and a sampler of easily
confused emoji.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import facts, family
from PIL import Image
from torch import Tensor

STYLES = (
    "noto",
    "fluent-emoji-flat",
    "fluent-emoji",
    "noto-v1",
    "emojione",
    "fxemoji",
    "streamline-emojis",
    "flag",
    "circle-flags",
    "cif",
    "flagpack",
    "fluent-emoji-3d",
    "fluent-emoji-high-contrast",
    "emojione-monotone",
    "noto-mono-400",
    "noto-mono-700",
    "symbola",
    "noto-filled",
    "fluent-filled",
    "symbola-filled",
)
WITHOUT_COLOUR = {
    "fluent-emoji-high-contrast",
    "emojione-monotone",
    "noto-mono-400",
    "noto-mono-700",
    "symbola",
}
RARER = 0.4  # weight of a style without colour when two images of an emoji are drawn
UNSEEN = ("twemoji", "openmoji")
# pixels of the model's input and of the rendered images
SIDE = 48
RENDERED = 64
# Subgroups whose mirror images mean something else, and words of labels that say so.
DIRECTED = {
    "country-flag",
    "subdivision-flag",
    "flag",
    "arrow",
    "alphanum",
    "keycap",
    "punctuation",
    "math",
    "currency",
    "av-symbol",
    "zodiac",
    "time",
    "transport-sign",
    "religion",
    "other-symbol",
    "music",
}
SIDED = ("left", "right", "clockwise", "magnifying")


def load_images(
    renders: Path, styles: tuple[str, ...]
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return all images of the styles, uint8 (n, 4, 64, 64), and the emoji and the
    style of each.

    They are packed into one file, which is memory-mapped, the first time and whenever
    images have come or gone.
    """
    packed = renders / f"packed-{len(styles)}.npy"
    names = renders / f"packed-{len(styles)}.json"
    files = [f for style in styles for f in sorted((renders / style).glob("*.png"))]
    rows = [(f.stem, f.parent.name) for f in files]
    if not names.exists() or names.read_text() != json.dumps(rows):
        names.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(
            packed,
            "w+",
            np.uint8,
            (len(files), 4, RENDERED, RENDERED),
        )
        for row, file in enumerate(files):
            array[row] = np.asarray(Image.open(file).convert("RGBA")).transpose(2, 0, 1)
        array.flush()
        names.write_text(json.dumps(rows))
    return np.load(packed, mmap_mode="r"), rows


def augment(rgba: Tensor, may_flip: Tensor) -> Tensor:
    """Draw geometry, outline, background and colour at random: (B, 4, 64, 64) in 0..1
    -> (B, 3, 48, 48), normalised.

    may_flip: bool (B,), false for images that must not be mirrored.
    """
    n = rgba.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high)

    angle = uniform(-0.25, 0.25) * (torch.rand(n) < 0.5)
    zoom = uniform(0.85, 1.35)
    aspect = uniform(-0.12, 0.12).exp()
    flip = torch.where((torch.rand(n) < 0.4) & may_flip, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = angle.cos() * zoom * aspect * flip
    theta[:, 0, 1] = -angle.sin() * zoom
    theta[:, 1, 0] = angle.sin() * zoom * flip
    theta[:, 1, 1] = angle.cos() * zoom / aspect
    theta[:, :, 2] = uniform(-0.12, 0.12, 2)
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    x = F.grid_sample(
        premultiplied,
        F.affine_grid(theta, [n, 4, SIDE, SIDE], align_corners=False),
        align_corners=False,
    )
    color = x[:, :3]
    alpha = x[:, 3:]

    # A dark outline where colour or alpha changes, as in hand-drawn styles.
    edges = torch.cat([color, alpha], 1)
    edges = (F.max_pool2d(edges, 3, 1, 1) + F.max_pool2d(-edges, 3, 1, 1)).amax(
        1, keepdim=True
    )
    outlined = (torch.rand(n) < 0.35).float().view(n, 1, 1, 1) * uniform(
        0.5, 1.0, 1, 1, 1
    )
    ink = (edges * uniform(1.0, 2.5, 1, 1, 1) - 0.15).clamp(0, 1) * outlined
    color = color * (1 - ink)
    alpha = torch.maximum(alpha, ink)

    kind = torch.rand(n, 1, 1, 1)
    background = torch.where(
        kind < 0.65,
        torch.ones(n, 3, 1, 1),
        torch.rand(n, 3, 1, 1),
    )
    background = torch.where(
        (kind >= 0.65) & (kind < 0.8),
        uniform(0.85, 1.0, 1, 1, 1).expand(n, 3, 1, 1),
        background,
    )
    # Now and then the lines alone.
    lines = (torch.rand(n) < 0.06).float().view(n, 1, 1, 1)
    color = color * (1 - lines)
    alpha = alpha * (1 - lines) + lines * (2 * edges - 0.15).clamp(0, 1)
    x = color + background * (1 - alpha)

    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * uniform(0.5, 1.5, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.12, 0.12, 1, 1, 1)
    x = x + uniform(-0.06, 0.06, 3, 1, 1)
    return (x.clamp(0, 1) - 0.5) / 0.5


def on_white(rgba: np.ndarray) -> Tensor:
    """Return images (n, 3, 48, 48) on white at the model's size, as the encoder will
    see them.
    """
    x = torch.from_numpy(rgba.astype(np.float32) / 255)
    x = x[:, :3] * x[:, 3:] + 1 - x[:, 3:]
    return (
        F.interpolate(x, SIDE, mode="bicubic", antialias=True).clamp(0, 1) - 0.5
    ) / 0.5


class Sampler:
    """Draws emoji with two images each in different styles.

    Half of a batch is random base emoji; the other half are groups of four from one
    family or subgroup.
    """

    GROUP = 4

    def __init__(self, rows: list[tuple[str, str]], emoji: dict, seed: int) -> None:
        self.images: dict[str, list[int]] = {}
        for row, (name, _) in enumerate(rows):
            self.images.setdefault(name, []).append(row)
        self.weights = [RARER if style in WITHOUT_COLOUR else 1.0 for _, style in rows]
        self.base = [name for name in self.images if emoji[name]["base"] == name]
        self.families: dict[str, list[str]] = {}
        self.subgroups: dict[str, list[str]] = {}
        for name in self.images:
            self.families.setdefault(family(emoji[name]), []).append(name)
        for name in self.base:
            self.subgroups.setdefault(emoji[name]["subgroup"], []).append(name)
        self.facts = {name: facts(emoji[name]) for name in self.images}
        self.emoji = emoji
        self.rng = random.Random(seed)
        self.may_flip = {
            name: (
                emoji[name]["subgroup"] not in DIRECTED
                and not any(word in emoji[name]["label"] for word in SIDED)
            )
            for name in self.images
        }

    def draw(self, n: int) -> tuple[list[str], list[int], list[int]]:
        """Return n emoji, and the rows of a first and a second image of each."""
        chosen = dict.fromkeys(self.rng.sample(self.base, n // 2))
        large_families = [
            members for members in self.families.values() if len(members) >= self.GROUP
        ]
        while len(chosen) < n:
            group = self.rng.choice(large_families)
            if self.rng.random() < 0.5:
                group = self.subgroups[
                    self.emoji[self.rng.choice(self.base)]["subgroup"]
                ]
            chosen |= dict.fromkeys(self.rng.sample(group, min(self.GROUP, len(group))))
        names = list(chosen)[:n]
        pairs = [self.draw_two(self.images[name]) for name in names]
        return names, [first for first, _ in pairs], [second for _, second in pairs]

    def draw_two(self, rows: list[int]) -> list[int]:
        """Draw two different rows by weight, or the only row twice."""
        keys = sorted(
            rows, key=lambda row: -(self.rng.random() ** (1 / self.weights[row]))
        )
        return (keys * 2)[:2]
