"""Addition of negatives to a data set, with every count in the cleaning report.

- `auto` (the default) completes splits where most pairs have no negatives, as in FDRD's newer files. `missing`
  completes every pair without negatives, `all` also replaces the data's own, and `off` does nothing.
- A split uses categories of its own, of the training split and of the taxonomy. Without a taxonomy, training therefore
  never sees a category that only the test split has.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from dcar_core.data import CleaningReport, Dataset
from dcar_core.model.text.tokenizer import TextTokenizer
from dcar_core.negatives.generate import NegativeGenerator, ReadTokens
from dcar_core.negatives.taxonomy import NameFeatures, letter_features, load_taxonomy, rank_categories
from dcar_core.negatives.words import fold_name
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError

if TYPE_CHECKING:  # torch takes seconds, and letters need none
    from dcar_core.model.backbone import Backbone

Mode = Literal["auto", "missing", "all", "off"]
COUNT = 4
_PROMPT_TOKENS = 8  # prompt vectors that the context leaves room for


class TextFunctions(NamedTuple):
    """features: of category names, (n, d), L2-normalized. tokens: of texts, as an encoder with prompts reads them."""

    features: NameFeatures
    tokens: ReadTokens


def _clip_tokens(texts: Sequence[str]) -> list[list[int]]:
    clip = TextTokenizer.for_clip()
    return clip.with_limit(clip.limit - _PROMPT_TOKENS).encode(texts)


LETTER_FUNCTIONS = TextFunctions(letter_features, _clip_tokens)


def backbone_functions(backbone: "Backbone") -> TextFunctions:
    """Return the text functions of a loaded CLIP, without prompts."""
    import torch
    import torch.nn.functional as F

    @torch.no_grad()
    def features(names: Sequence[str]) -> Floats:
        texts = [f"a photo of a {name}" for name in names]
        batches = (backbone.tokenize(texts[i : i + 256]) for i in range(0, len(texts), 256))
        encoded = torch.cat([backbone.encode_text(tokens).double() for tokens in batches])
        vectors: Floats = F.normalize(encoded, dim=-1).cpu().numpy()
        return vectors

    return TextFunctions(features, backbone.text_tokenizer(_PROMPT_TOKENS).encode)


def add_negatives(
    splits: Mapping[str, Dataset],
    reports: Mapping[str, CleaningReport],
    functions: TextFunctions,
    *,
    mode: str = "auto",
    taxonomy: Path | None = None,
    held_out: Collection[str] = (),
    count: int = COUNT,
    seed: int = 0,
) -> dict[str, Dataset]:
    """Return the splits with negatives according to `mode`, and count them in the reports.

    Args:
        functions: the features rank categories; the tokens tell which negatives read alike.
        taxonomy: a file with meta-categories; see docs/reference/data-formats.md.
        held_out: folded names of categories that only negatives of the test split may name.
        count: maximum negatives per pair.
        seed: selects among the possible attribute swaps.

    Raises:
        DataError: an unknown mode, an unusable taxonomy, a taxonomy with mode `off`, an empty split, or mode `missing`
            or `all` for data without categories.
    """
    if mode not in get_args(Mode):
        raise DataError(f"--negatives must be {', '.join(get_args(Mode))}, not {mode!r}")
    if mode == "off" and taxonomy is not None:
        raise DataError("--taxonomy is for generated negatives, which --negatives off turns off; leave one of them out")
    tree = load_taxonomy(taxonomy) if taxonomy is not None else None
    done = {}
    for name, data in splits.items():
        rows = _rows_to_complete(data, mode, reports[name])
        if rows:
            samples = [*data.samples, *(splits["train"].samples if "train" in splits and name != "train" else ())]
            ranked = rank_categories(samples, tree, functions.features, reports[name])
            if name != "test":
                ranked = {key: [o for o in near if fold_name(o) not in held_out] for key, near in ranked.items()}
            generator = NegativeGenerator(data.samples, ranked, functions.tokens, count=count, seed=seed)
            data = _completed(data, rows, generator, reports[name])
        elif tree is not None:
            reports[name].add("pairs with the negatives of the data, for which the taxonomy is not used", len(data))
        done[name] = data
    return done


def _rows_to_complete(data: Dataset, mode: str, report: CleaningReport) -> set[int]:
    if not data.samples:
        raise DataError(f"the split {data.split} has no pairs")
    without = {row for row, sample in enumerate(data.samples) if not sample.negatives}
    if mode == "off" or (mode == "auto" and 2 * len(without) <= len(data)):
        return set()
    rows = set(range(len(data))) if mode == "all" else without
    known = {row for row in rows if data.samples[row].category}
    if rows and not known and mode != "auto":
        raise DataError(
            f"{data.split}: negatives need categories, and none of its {len(rows):,} pairs without negatives has one; "
            f"give class_name (or a column category), or --negatives off"
        )
    report.add("pairs without a category, for which no negatives are made", len(rows - known))
    return known


def _completed(data: Dataset, rows: set[int], generator: NegativeGenerator, report: CleaningReport) -> Dataset:
    ranked = generator.ranked
    own = {fold_name(sample.category): sample.category for sample in data.samples if sample.category}
    if len(own) == 1 and not any(ranked.values()):
        report.add("splits with one category only: no category can be swapped for another")
    else:
        outside = report.names.get("categories missing from the taxonomy, not swapped for others", [])
        single = sorted(name for key, name in own.items() if not ranked.get(key) and name not in outside)
        report.add("single categories of a meta-category, not swapped for others", names=single)
    made = {row: generator.negatives(data.samples[row]) for row in sorted(rows)}
    samples = list(data.samples)
    for row, negatives in made.items():
        texts, categories = tuple(n.text for n in negatives), tuple(n.category for n in negatives)
        samples[row] = replace(samples[row], negatives=texts, negative_categories=categories)
    report.add("pairs for which negatives were made", sum(bool(negatives) for negatives in made.values()))
    for kind, number in Counter(n.kind for negatives in made.values() for n in negatives).items():
        report.add(f"negatives made: {kind}", number)
    report.add("captions that do not name their category, so that it could not be swapped", generator.unnamed)
    report.add("negatives that differ only where the context has ended, left out", generator.unread)
    empty = [samples[row].image for row, negatives in made.items() if not negatives]
    report.add("pairs for which no negative could be made", names=empty)
    return replace(data, samples=samples)
