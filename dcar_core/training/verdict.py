"""Verdict on a training run: the adapted model against the untouched one, on the validation pairs."""

from collections.abc import Mapping
from dataclasses import dataclass

from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.bootstrap import MEASURES, Estimate, Hits, PairedDifference
from dcar_core.util.retrieval_metrics import compute_ranks

FEW_PAIRS = 100  # validation pairs of fewer images get a caveat


@dataclass(frozen=True)
class Verdict:
    """The comparison of a method with the untouched model, and the settings it was trained with."""

    method: str
    comparison: PairedDifference
    config: TrainConfig

    @property
    def is_worth_it(self) -> bool:
        """True if the adapted model has the higher mean R@1. See `is_certain` for the interval."""
        return self.comparison.difference["mean_r1"].value > 0

    @property
    def is_certain(self) -> bool:
        """True if the interval of the difference excludes 0."""
        difference = self.comparison.difference["mean_r1"]
        return difference.low > 0 or difference.high < 0

    def __str__(self) -> str:
        pairs, images = self.comparison.queries, self.comparison.images
        parts = [
            f"{'R@1 in percent (95 % interval)':32}{'text-to-image':24}{'image-to-text':24}mean",
            _row("untouched model", self.comparison.baseline, ""),
            _row(f"adapted ({self.method})", self.comparison.model, ""),
            _row("difference", self.comparison.difference, "+"),
            self._answer(),
        ]
        if not self.is_worth_it:
            parts.append(f"Next: {self._advice()}")
        if images < FEW_PAIRS:
            what = "pairs" if images == pairs else "images"
            parts.append(
                f"Caveat: {images} validation {what} decide little; each is {100 / images:.1f} points of R@1. Use at "
                f"least {FEW_PAIRS}."
            )
        return "\n".join(parts)

    def _answer(self) -> str:
        difference = self.comparison.difference["mean_r1"]
        interval = f"95 % interval {difference.low:+.1f} to {difference.high:+.1f}"
        pairs = f"{self.comparison.queries:,} validation pairs"
        if not self.is_worth_it:
            return f"Was it worth it? No: the untouched model is at least as good ({interval}; {pairs})."
        if not self.is_certain:
            return (
                f"Was it worth it? Uncertain: {difference.value:+.1f} points, but the interval includes 0 ({interval}; "
                f"{pairs}). Add validation pairs, or train several seeds with `dcar evaluate`."
            )
        return (
            f"Was it worth it? Yes: {difference.value:+.1f} points of mean R@1 ({interval}; {pairs}). These pairs also "
            f"chose the epoch; `dcar evaluate` measures on the test split."
        )

    def _advice(self) -> str:
        lower, more = self.config.lr / 4, 2 * self.config.epochs
        # "clip-adapter" runs on every model, but learned less than "block-adapters" from any number of captions.
        other = "" if self.method in ("clip-adapter", "block-adapters") else "--method clip-adapter, "
        return (
            f"{other}--lr {lower:g}, --epochs {more} --patience 0, more training pairs, or `dcar evaluate --tune`; "
            f"until then, `dcar zero-shot` writes a checkpoint of the untouched model."
        )


def split_hits(model: DCAR, split: PreparedSplit) -> Hits:
    """Return the R@1 hits of a model's queries and images on a split."""
    model.eval()
    ranks = compute_ranks(encode_captions(model, split), encode_images(model, split), split.image_of)
    return Hits.from_ranks(ranks, split.image_of)


def _row(name: str, estimates: Mapping[str, Estimate], sign: str) -> str:
    cells = [estimates[measure] for measure in MEASURES]
    texts = [f"{cell.value:{sign}.1f} ({cell.low:{sign}.1f} to {cell.high:{sign}.1f})" for cell in cells]
    return f"  {name:30}{texts[0]:24}{texts[1]:24}{texts[2]}"
