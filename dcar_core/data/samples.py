"""One image-caption pair, and the pairs of a split."""

from dataclasses import dataclass
from functools import cached_property

from dcar_core.images import ImageRoot
from dcar_core.util.errors import DataError, ImageError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image-caption pair; an image with several captions has several samples. Unknown texts are "".

    image: the image's name below the image root.
    meta_category: the group of similar categories, if the data state one.
    negative_categories: the category of each negative, "" if unknown; empty if all are unknown.
    attributes: short texts that are true of the image; a text equal to one is not used as its negative.
    """

    image: str
    caption: str
    category: str = ""
    meta_category: str = ""
    negatives: tuple[str, ...] = ()
    negative_categories: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The pairs of one split and the root of their images."""

    split: str
    samples: list[Sample]
    root: ImageRoot

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def images(self) -> list[str]:
        """Every image once, in the order of the pairs."""
        return list(dict.fromkeys(sample.image for sample in self.samples))

    def read(self, image: str) -> bytes:
        """Return the bytes of an image. Raise DataError if it is missing; the message names it."""
        try:
            return self.root.read(image)
        except ImageError as error:
            raise DataError(f"{self.split}: {error}; point --images to the folder or tar that holds it") from error
