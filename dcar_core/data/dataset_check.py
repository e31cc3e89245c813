"""Check of a data set before training: counts, repairs, and images that are missing or broken."""

from dataclasses import dataclass
from pathlib import Path

from dcar_core.data.load import Annotations, note_overlaps
from dcar_core.data.report import CleaningReport, shorten
from dcar_core.data.samples import Dataset


@dataclass(frozen=True)
class CheckedSplit:
    """One split, its report, the names of missing images, and "name (reason)" of broken ones."""

    data: Dataset
    report: CleaningReport
    missing: list[str]
    broken: list[str]

    def __str__(self) -> str:
        samples = self.data.samples
        categories = {sample.category for sample in samples} - {""}
        images = len({sample.image for sample in samples})
        lines = [
            f"{self.data.split}: {len(samples):,} pairs, {images:,} images, "
            f"{len(categories) or 'no'} {'category' if len(categories) == 1 else 'categories'}",
            *str(self.report).splitlines(),
        ]
        if self.missing:
            lines.append(f"{len(self.missing):7,} images missing: {shorten(self.missing)}")
        if self.broken:
            lines.append(f"{len(self.broken):7,} images broken: {shorten(self.broken)}")
        return "\n".join(lines)


def check_dataset(
    path: Path,
    *,
    image_root: Path | None = None,
    decode_images: bool = True,
    context: int = 0,
) -> list[CheckedSplit]:
    """Return every split of a data set, checked.

    Args:
        context: count captions of more CLIP tokens, SOS and EOT included; 0 counts none.

    Raises:
        DataError: there are no annotations, or they cannot be read.
    """
    annotations, checked = Annotations(path, image_root), list[CheckedSplit]()
    for split in annotations.splits():
        data, report = annotations.load(split, "ignore")
        categories = {sample.category for sample in data.samples} - {""}
        report.add("splits with one category only: no category can be swapped for another", len(categories) == 1)
        report.add("pairs without a category", sum(not sample.category for sample in data.samples))
        if context:
            from dcar_core.model.text.tokenizer import count_clip_tokens

            lengths = count_clip_tokens([sample.caption for sample in data.samples])
            report.add(f"captions longer than the context's {context} tokens, cut", sum(n > context for n in lengths))
        missing, broken, lookups = annotations.unusable_images(split) if decode_images else ([], [], CleaningReport())
        report.merge(lookups)
        checked.append(CheckedSplit(data, report, missing, broken))
    note_overlaps({each.data.split: each.data for each in checked}, {each.data.split: each.report for each in checked})
    return checked
