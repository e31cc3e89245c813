"""Negative captions by two kinds of swap (section 3 of the method), with every count in the cleaning report.

- Category swap: the caption with another category of the same meta-category, most similar first.
- Attribute swap: another caption of the category, or the caption with one attribute word replaced.
- Half of each kind; a shortage of one kind is filled with the other [ours]. FDRD has four negatives per pair.
- A negative never equals a caption, an attribute or another negative of its image, after normalization and after
  truncation to the context. It depends on the seed and on the captions of the same category only.
- A split uses categories of its own, of the training split and of the taxonomy. Without a taxonomy, training therefore
  never sees a category that only the test split has.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath
from random import Random
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from dcar_core.data import CleaningReport, Dataset, Sample
from dcar_core.data.clean import fold_text
from dcar_core.model.text.tokenizer import TextTokenizer
from dcar_core.negatives.taxonomy import NameFeatures, letter_features, load_taxonomy, rank_categories
from dcar_core.negatives.words import find_mentions, fold_name, replace_name, swap_attributes
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError

if TYPE_CHECKING:  # torch takes seconds, and letters need none
    from dcar_core.model.backbone import Backbone

Mode = Literal["auto", "missing", "all", "off"]
ReadTokens = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # texts -> tokens that the encoder reads
COUNT, OTHERS_TRIED = 4, 16
CATEGORY = "the caption with another category"
CAPTION = "another caption of the category"
ATTRIBUTE = "the caption with another attribute"
_PROMPT_TOKENS = 8  # prompt vectors that the context leaves room for


class Negative(NamedTuple):
    """A negative caption, the category it names, and the kind of swap."""

    text: str
    category: str
    kind: str


class NegativeGenerator:
    """Generates negatives for the samples of one split.

    Args:
        samples: the split, as the source of other captions.
        ranked: maps a folded category to others of its meta-category, most similar first.
    """

    def __init__(
        self, samples: Sequence[Sample], ranked: Mapping[str, list[str]], tokenize: ReadTokens, *, count: int, seed: int
    ) -> None:
        self.ranked, self.count, self.seed, self._tokenize = ranked, count, seed, tokenize
        self.unnamed = 0  # captions without their category
        self.unread = 0  # negatives equal to another text of their image after truncation
        self._context = len(tokenize(["a " * 1000])[0])
        self._full_tokens = lru_cache(maxsize=65536)(self._tokens_of_full)
        self._captions: dict[str, list[str]] = defaultdict(list)
        self._own: dict[str, set[Hashable]] = defaultdict(set)
        for sample in samples:
            self._captions[fold_name(sample.category)].append(sample.caption)
            self._own[sample.image] |= {*self._readings(sample.caption), *map(_same, sample.attributes)}

    def negatives(self, sample: Sample) -> list[Negative]:
        """Generate at most `count` negatives of a sample with a category; category swaps come first."""
        name = PurePosixPath(sample.image).name  # without the folder, which depends on the image root
        random = Random(f"{self.seed}\n{name}\n{sample.caption}")
        taken = set(self._own[sample.image])
        swapped, changed = self._category_swaps(sample), self._attribute_swaps(sample, random)
        found = self._take(swapped, self.count - self.count // 2, taken)
        others = self._take(changed, self.count - len(found), taken)
        return [*found, *self._take(swapped, self.count - len(found) - len(others), taken), *others]

    def _take(self, negatives: Iterator[Negative], number: int, taken: set[Hashable]) -> list[Negative]:
        """Take the first `number` negatives that read like nothing in `taken`, and add them to it."""
        found: list[Negative] = []
        while len(found) < number and (negative := next(negatives, None)) is not None:
            readings = self._readings(negative.text)
            if taken.isdisjoint(readings):
                taken.update(readings)
                found.append(negative)
            else:
                self.unread += readings[0] not in taken
        return found

    def _readings(self, text: str) -> list[Hashable]:
        """Return the normalized text and, if it fills the context, the tokens that the encoder reads."""
        may_be_full = len(text.encode()) + 2 >= self._context  # a token is a byte or more
        return [_same(text), *(self._full_tokens(text) if may_be_full else ())]

    def _tokens_of_full(self, text: str) -> list[Hashable]:
        tokens = tuple(self._tokenize([text])[0])
        return [tokens] if len(tokens) == self._context else []

    def _category_swaps(self, sample: Sample) -> Iterator[Negative]:
        key, caption = fold_name(sample.category), sample.caption
        others = self.ranked.get(key, [])
        places = find_mentions(caption, sample.category)
        if others and not places:
            self.unnamed += 1
            return
        for other in others:
            if fold_name(other) != key and not find_mentions(caption, other):  # otherwise the caption may still be true
                yield Negative(replace_name(caption, places, sample.category, other), other, CATEGORY)

    def _attribute_swaps(self, sample: Sample, random: Random) -> Iterator[Negative]:
        pool = self._captions[fold_name(sample.category)]
        picked = random.sample(range(len(pool)), min(len(pool), OTHERS_TRIED))
        captions = (Negative(pool[i], sample.category, CAPTION) for i in picked)
        kept = find_mentions(sample.caption, sample.category)
        words = (Negative(text, sample.category, ATTRIBUTE) for text in swap_attributes(sample.caption, kept, random))
        return (negative for negative in chain.from_iterable(zip_longest(captions, words)) if negative is not None)


def _same(text: str) -> str:
    return fold_text(text.replace("-", " ")).rstrip(".! ")


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
    count: int = COUNT,
    seed: int = 0,
) -> dict[str, Dataset]:
    """Return the splits with negatives according to `mode`, and count them in the reports.

    `auto` completes splits where most pairs have no negatives, as in FDRD's newer files. `missing` completes every pair
    without negatives, `all` also replaces the data's own, and `off` does nothing.

    Args:
        functions: the features rank categories; the tokens tell which negatives read alike.
        taxonomy: a file with meta-categories; see docs/reference/data-formats.md.
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
            generator = NegativeGenerator(data.samples, ranked, functions.tokens, count=count, seed=seed)
            data = _completed(data, rows, generator, reports[name])
        elif tree is not None:
            reports[name].add("pairs with the negatives of the data, for which the taxonomy is not used", len(data))
        done[name] = data
    return done


def _rows_to_complete(data: Dataset, mode: str, report: CleaningReport) -> list[int]:
    if not data.samples:
        raise DataError(f"the split {data.split} has no pairs")
    rows = [row for row, sample in enumerate(data.samples) if mode == "all" or not sample.negatives]
    if mode == "off" or (mode == "auto" and 2 * len(rows) <= len(data)):
        return []
    known = [row for row in rows if data.samples[row].category]
    if rows and not known and mode != "auto":
        raise DataError(
            f"{data.split}: negatives need categories, and none of its {len(rows):,} pairs without negatives has one; "
            f"give class_name (or a column category), or --negatives off"
        )
    report.add("pairs without a category, for which no negatives are made", len(rows) - len(known))
    return known


def _completed(data: Dataset, rows: Sequence[int], generator: NegativeGenerator, report: CleaningReport) -> Dataset:
    own = {fold_name(sample.category): sample.category for sample in data.samples if sample.category}
    if len(own) == 1 and not any(generator.ranked.values()):
        report.add("splits with one category only: no category can be swapped for another")
    else:
        outside = report.names.get("categories missing from the taxonomy, not swapped for others", [])
        single = sorted(name for key, name in own.items() if not generator.ranked.get(key) and name not in outside)
        report.add("single categories of a meta-category, not swapped for others", names=single)
    samples, kinds = list(data.samples), Counter[str]()
    for row in rows:
        made = generator.negatives(samples[row])
        kinds.update(negative.kind for negative in made)
        texts, categories = (tuple(negative[i] for negative in made) for i in (0, 1))
        samples[row] = replace(samples[row], negatives=texts, negative_categories=categories)
    empty = [samples[row].image for row in rows if not samples[row].negatives]
    report.add("pairs for which negatives were made", len(rows) - len(empty))
    for kind, number in kinds.items():
        report.add(f"negatives made: {kind}", number)
    report.add("captions that do not name their category, so that it could not be swapped", generator.unnamed)
    report.add("negatives that differ only where the context has ended, left out", generator.unread)
    report.add("pairs for which no negative could be made", names=empty)
    return replace(data, samples=samples)
