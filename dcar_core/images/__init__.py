"""Image files: known formats, the check of a file's structure, decoding to RGB, and files in folders and tars.

    bytes --inspect--> Container (checked, metadata removed) --open_image--> RGB

In: bytes, paths or Pillow images. Out: RGB images, or an `ImageError` with the reason.
Every folder above `util` may import it; it imports `util` alone.
"""

from dcar_core.images.containers import inspect
from dcar_core.images.decoding import MAX_PIXELS, ImageSource, open_image, upright_size
from dcar_core.images.files import ImageRoot, TarSpan, index_tar
from dcar_core.images.formats import (
    ALL_FORMATS,
    IMAGE_SUFFIXES,
    WEB_FORMATS,
    Container,
    ImageFormat,
    has_image_suffix,
    sniff_format,
)

__all__ = [
    "ALL_FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "WEB_FORMATS",
    "Container",
    "ImageFormat",
    "ImageRoot",
    "ImageSource",
    "TarSpan",
    "has_image_suffix",
    "index_tar",
    "inspect",
    "open_image",
    "sniff_format",
    "upright_size",
]
