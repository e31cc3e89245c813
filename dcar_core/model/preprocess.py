"""Preprocessing of images into the model's pixels, without the model, here or in
decoding processes.

- The exact mode resizes with PIL as open_clip's transform does, bit for bit; training
  and evaluation use it.
- The fast mode decodes a large JPEG at reduced scale, halves a large image before
  filtering, and crops while resizing. Embeddings of 1,000 photos at three sizes stayed
  within cosine 0.999 of the exact mode's.
- If PyTorch is loaded, the fast mode can resize with it: four times as fast, and within
  two levels of 255.
- Pixels stay uint8 until the forward pass, a quarter of the bytes to send and to cache.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcar_core.images import MAX_PIXELS, ImageSource, OpenedImage, open_image
from dcar_core.util.errors import ModelError
from dcar_core.util.machine import is_installed

# Smallest input of the fast mode's filter, as a multiple of the result's side. At 2
# some textures fall to a cosine of 0.993, at 1 to 0.84.
_DECODED = 2.5
_REDUCED = 3.0
# The exact mode scales an image and then crops, as open_clip does, up to this many
# pixels: a line of 10,000 pixels would become 500 million. Longer images are cropped
# while they are scaled, which may round differently.
MAX_SCALED_PIXELS = 2**24

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """Turn images into the pixels of one model.

    size: S, the side in pixels. resize: "shortest" (then a centre crop), "squash", or
    "longest" (then padding). exact: open_clip's pixels bit for bit; False is the fast
    mode. resizer: of the fast mode; PyTorch's for images that need no halving, on
    processors where it is faster.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash", "longest"] = "shortest"
    fill: int = 0
    max_pixels: int = MAX_PIXELS
    exact: bool = True
    resizer: Literal["pillow", "torch"] = "pillow"

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> "Preprocess":
        size = config["size"]
        side, *others = [size] if isinstance(size, int) else size
        if any(other != side for other in others):
            raise ModelError(
                f"the model takes images of {' x '.join(map(str, size))} pixels; they"
                " must be square"
            )
        interpolation = config.get("interpolation", "bicubic")
        if interpolation not in _FILTERS:
            interpolation = "bicubic"
        return cls(
            side,
            tuple(config["mean"]),
            tuple(config["std"]),
            interpolation,
            config.get("resize_mode", "shortest"),
            config.get("fill_color", 0),
        )

    def fast(self, *, torch: bool = False) -> "Preprocess":
        """Return the fast mode of this preprocessing. torch: resize with PyTorch if
        that is faster here.
        """
        return replace(
            self,
            exact=False,
            resizer="torch" if torch and torch_is_fast() else "pillow",
        )

    def __call__(self, source: ImageSource) -> NDArray[np.uint8]:
        """Return uint8 (3, S, S). Raise ImageError if the image cannot be read."""
        return self.finish(self.decode(source))

    def decode(self, source: ImageSource) -> NDArray[np.uint8]:
        """Do the part that needs no PyTorch, as decoding processes do, and leave the
        rest to `finish`.

        Returns:
            uint8 (3, S, S), or (H, W, 3) of an image that PyTorch is to scale.
        """
        at_least = None if self.exact else math.ceil(_DECODED * self.size)
        image = open_image(source, max_pixels=self.max_pixels, at_least=at_least)
        if (
            self.resizer == "torch"
            and self.resize != "longest"
            and min(image.size) < 2 * _REDUCED * self.size
        ):
            (across, down), _, _ = self._scaled(image.size)
            if across * down <= MAX_SCALED_PIXELS:
                return np.array(image)
        return np.ascontiguousarray(np.asarray(self._fit(image)).transpose(2, 0, 1))

    def decoder(
        self, box: Sequence[float] | None = None
    ) -> Callable[[OpenedImage], NDArray[np.uint8]]:
        """Return `decode`, perhaps of a part of the image, for a decoding process; see
        `decode_image`.
        """
        return partial(decode_image, preprocess=asdict(self), box=box)

    def finish(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return uint8 (3, S, S) of what `decode` returns."""
        if pixels.shape == (3, self.size, self.size):
            return pixels
        height, width, _ = pixels.shape
        scaled, left, top = self._scaled((width, height))
        resized = resize_by_torch(pixels, scaled, self.interpolation)
        return np.ascontiguousarray(
            resized[:, top : top + self.size, left : left + self.size]
        )

    def standardize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, 3, S, S) -> float32, zero mean and unit variance by the model's
        statistics.
        """
        mean = np.array(self.mean, np.float32).reshape(1, 3, 1, 1)
        std = np.array(self.std, np.float32).reshape(1, 3, 1, 1)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def blank(self) -> NDArray[np.uint8]:
        """Return a white image, uint8 (3, S, S): the reference of the token weights
        [ours].
        """
        return np.full((3, self.size, self.size), 255, np.uint8)

    def _scaled(self, size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
        """Return the size after scaling, and the left top corner of the S x S crop; not
        for "longest".
        """
        side, (width, height) = self.size, size
        if self.resize == "squash":
            return (side, side), 0, 0
        shortest = min(width, height)
        # rounded down, as torchvision does
        across = int(side * width / shortest)
        down = int(side * height / shortest)
        return (across, down), round((across - side) / 2), round((down - side) / 2)

    def _fit(self, image: Image.Image) -> Image.Image:
        side = self.size
        how = _FILTERS[self.interpolation]
        gap = None if self.exact else _REDUCED
        width, height = image.size
        if self.resize == "squash" or width == height:
            if (width, height) == (side, side):
                return image
            return image.resize((side, side), how, None, gap)
        if self.resize == "shortest":
            scaled, left, top = self._scaled(image.size)
            if not self.exact or scaled[0] * scaled[1] > MAX_SCALED_PIXELS:
                # source pixels a pixel of the result
                across = width / scaled[0]
                down = height / scaled[1]
                box = (
                    left * across,
                    top * down,
                    (left + side) * across,
                    (top + side) * down,
                )
                return image.resize((side, side), how, box, gap)
            return image.resize(scaled, how).crop((left, top, left + side, top + side))
        longest = max(width, height)
        scaled = (
            max(1, round(width * side / longest)),
            max(1, round(height * side / longest)),
        )
        page = Image.new("RGB", (side, side), (self.fill,) * 3)
        page.paste(
            image.resize(scaled, how, None, gap),
            ((side - scaled[0]) // 2, (side - scaled[1]) // 2),
        )
        return page


def decode_image(
    opened: OpenedImage,
    preprocess: Mapping[str, Any],
    box: Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """Return `Preprocess(**preprocess).decode` of an upright image, or of a part of it,
    at least one pixel.

    Args:
        box: left, top, width and height in fractions of the image's.
    """
    decoder = Preprocess(**preprocess)
    if box is None:
        return decoder.decode(opened)
    image, (x, y, width, height) = (
        open_image(opened, max_pixels=decoder.max_pixels),
        box,
    )
    left = int(x * image.width)
    top = int(y * image.height)
    right = round((x + width) * image.width)
    bottom = round((y + height) * image.height)
    return decoder.decode(
        image.crop((left, top, max(left + 1, right), max(top + 1, bottom)))
    )


@cache
def torch_is_fast() -> bool:
    """True if PyTorch is installed, on processors with AVX2, which its kernel for bytes
    needs.
    """
    if not is_installed("torch"):
        return False
    import torch

    return torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}


def resize_by_torch(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    interpolation: str,
) -> NDArray[np.uint8]:
    """Scale RGB (H, W, 3) to (width, height) as Pillow does, uint8 (3, height, width),
    in one thread.
    """
    import torch

    # [1, 3, H, W], channels last in memory
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        pixels,
        size[::-1],
        mode=interpolation,
        antialias=True,
    )[0]
    result: NDArray[np.uint8] = resized.numpy()
    return result
