"""A few categories, and negatives made for them."""

from pathlib import Path
from typing import Any

from dcar_core.data import CleaningReport, Dataset, Sample
from dcar_core.images import ImageRoot
from dcar_core.negatives import LETTER_FUNCTIONS, add_negatives
from dcar_core.negatives.complete import TextFunctions

FELINE = {"cat": ["Sphynx", "Ragdoll", "Maine Coon"], "dog": ["Beagle", "Pug"]}


def sample(image: str, caption: str, category: str = "", **more: object) -> Sample:
    return Sample(image, caption, category, **more)  # type: ignore[arg-type]


CATS = [
    sample("1", "A Sphynx with green eyes on a chair.", "Sphynx"),
    sample("2", "A Ragdoll in front of a red sofa.", "Ragdoll"),
    sample("3", "A Maine Coon, asleep.", "Maine Coon"),
    sample("4", "A beagle on the grass.", "Beagle"),
    sample("5", "Two pugs with blue collars.", "Pug"),
    sample("6", "An older Sphynx that looks up.", "Sphynx"),
]


def split(samples: list[Sample], tmp_path: Path, name: str = "train") -> Dataset:
    return Dataset(name, samples, ImageRoot(tmp_path))


def made(
    samples: list[Sample], tmp_path: Path, mode: str = "auto", functions: TextFunctions = LETTER_FUNCTIONS, **given: Any
) -> tuple[list[Sample], CleaningReport]:
    report = CleaningReport()
    done = add_negatives({"train": split(samples, tmp_path)}, {"train": report}, functions, mode=mode, **given)
    return done["train"].samples, report
