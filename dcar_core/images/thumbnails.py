"""Thumbnails: small upright RGB copies of images, for pages."""

import io
from typing import Any, Literal

from PIL import Image

from dcar_core.images.decoding import open_image
from dcar_core.images.formats import Container, ImageFormat

ThumbnailFormat = Literal["webp", "jpeg"]

_OPTIONS: dict[ThumbnailFormat, dict[str, Any]] = {
    "webp": {"quality": 78, "method": 4},
    "jpeg": {"quality": 82, "optimize": True, "progressive": True},
}
_MAX_UNCHANGED_BYTES = 32 * 2**10
_UNCHANGED = frozenset({ImageFormat.PNG, ImageFormat.WEBP})  # every browser shows them, and small drawings stay sharp


def make_thumbnail(container: Container, side: int, thumbnail_format: ThumbnailFormat) -> bytes:
    """Return an image file whose longer side has at most `side` pixels; a small PNG or WebP stays as it is.

    Raises:
        ImageError: the image cannot be decoded.
    """
    shorter, longer = sorted((container.width, container.height))
    at_least = max(1, 2 * side * shorter // longer) if longer else None
    image = open_image(container, at_least=at_least)
    is_small = longer <= side and len(container.data) <= _MAX_UNCHANGED_BYTES
    if is_small and container.format in _UNCHANGED and container.orientation == 1:
        return container.data
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, thumbnail_format, **_OPTIONS[thumbnail_format])
    return buffer.getvalue()
