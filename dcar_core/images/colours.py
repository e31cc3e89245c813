"""Conversion of Pillow images to RGB, tile by tile.

- Pillow holds the interpreter lock while NumPy converts, so other threads wait for one tile at most.
- Memory holds the image and the result, not the steps between them.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageChops

TILE_PIXELS = 2**18  # a few milliseconds
LARGE_PIXELS = 2**22  # above, an image that is needed small is averaged before its colours are converted


def to_rgb(image: Image.Image, at_least: int | None = None, *, is_turned: bool = False) -> Image.Image:
    """Return the image in mode RGB.

    Args:
        at_least: pixels that the shorter side must keep when a large image is averaged; None keeps all pixels.
        is_turned: whether the caller rotates the result; a plain RGB image is then averaged as well.
    """
    width, height = image.size
    is_large = at_least is not None and width * height > LARGE_PIXELS
    factor = max(1, min(width, height) // at_least) if is_large and at_least else 1
    if image.mode == "RGB" and not isinstance(image.info.get("transparency"), tuple):  # the colour that is transparent
        if factor == 1 or not is_turned:
            image.load()
            return image
        return _convert_tiles(image, factor, lambda tile: tile.reduce(factor))
    if image.mode.startswith("I;16") or image.mode == "I":
        return _convert_tiles(image, factor, lambda tile: _from_16_bits(tile).reduce(factor))
    if image.mode == "F":
        maxima = (np.nanmax(np.asarray(image.crop(box)), initial=0.0) for box in _tiles(image.size, 1))
        top = max(1.0, *map(float, maxima))
        return _convert_tiles(image, factor, lambda tile: _from_floats(tile, top).reduce(factor))
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        return _convert_tiles(image, factor, lambda tile: _over_white(tile.convert("RGBA"), factor))
    return _convert_tiles(image, factor, lambda tile: tile.convert("RGB").reduce(factor))


def _tiles(size: tuple[int, int], factor: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes that cover an image, with sides that the factor divides."""
    width, height = size
    across = min(width, max(1, TILE_PIXELS // factor**2) * factor)
    down = max(1, TILE_PIXELS // (across * factor)) * factor
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _convert_tiles(image: Image.Image, factor: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    width, height = image.size
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)), None)
    for box in _tiles(image.size, factor):
        result.paste(convert(image.crop(box)), (box[0] // factor, box[1] // factor))
    return result


def _from_16_bits(tile: Image.Image) -> Image.Image:
    values = np.clip(np.asarray(tile, np.int32), 0, 65535)
    gray = ((values + 128) // 257).astype(np.uint8)  # rounds value / 65535 * 255
    if (key := tile.info.get("transparency")) is not None:
        gray[values == key] = 255
    return Image.fromarray(gray)


def _from_floats(tile: Image.Image, top: float) -> Image.Image:
    gray = np.nan_to_num(np.clip(np.asarray(tile, np.float64) / top, 0, 1)) * 255
    return Image.fromarray(gray.round().astype(np.uint8))


def _over_white(tile: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB")
    *colours, alpha = tile.convert("RGBa").reduce(factor).split()  # premultiplied: averages are those over white
    white = ImageChops.invert(alpha)
    return Image.merge("RGB", [ImageChops.add(colour, white) for colour in colours])
