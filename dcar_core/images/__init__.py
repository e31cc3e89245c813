"""Image files: known formats, decoding to RGB here or in processes with limits, and
files in folders and tars.

    bytes --OpenedImage--> header --open_image--> RGB
    bytes --DecodeWorker.run--> pixels, or a thumbnail, from a process with limits

In: bytes, paths or Pillow images. Out: RGB images, or an `ImageError` with the reason.
Every folder above `util` may import it; it imports `util` alone.
"""

from dcar_core.images.decoding import MAX_PIXELS, ImageSource, OpenedImage, open_image
from dcar_core.images.files import ImageRoot, TarSpan, index_tar
from dcar_core.images.formats import (
    ALL_FORMATS,
    IMAGE_SUFFIXES,
    ImageFormat,
    has_image_suffix,
    sniff_format,
)

__all__ = [
    "ALL_FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageFormat",
    "ImageRoot",
    "ImageSource",
    "OpenedImage",
    "TarSpan",
    "has_image_suffix",
    "index_tar",
    "open_image",
    "sniff_format",
]
