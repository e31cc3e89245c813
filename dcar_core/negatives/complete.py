"""Negative captions by two kinds of swap (section 3 of the method), with every count in
the cleaning report.

- Category swap: the caption with another category of the same meta-category, most
  similar first.
- Attribute swap: another caption of the category, or the caption with one attribute
  word replaced.
- Half of each kind; a shortage of one kind is filled with the other [ours]. FDRD has
  four negatives per pair.
- A negative never equals a caption, an attribute or another negative of its image,
  after normalization and after truncation to the context. It depends on the seed and on
  the captions of the same category only.
- Training sees categories of its own split and of the taxonomy, never those that only
  the test split has.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dcar_core.data import CleaningReport, Dataset, Sample
from dcar_core.data.samples import fold_text
from dcar_core.model.tokenizer import TextTokenizer
from dcar_core.negatives.words import (
    find_mentions,
    fold_name,
    replace_name,
    swap_attributes,
)
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

if TYPE_CHECKING:  # torch takes seconds, and letters need none
    from dcar_core.model.backbone import Backbone

Mode = Literal["auto", "missing", "all", "off"]
NameVectors = NDArray[np.floating[Any]]
COUNT = 4
OTHERS_TRIED = 16
MOST_RANKED = 100  # of a meta-category
CATEGORY = "the caption with another category"
CAPTION = "another caption of the category"
ATTRIBUTE = "the caption with another attribute"
_PROMPT_TOKENS = 8  # prompt vectors that the context leaves room for
_FORM = (
    '{"meta_categories": {"cats": ["Sphynx", "Ragdoll"]}, "similar": {"Sphynx":'
    ' ["Ragdoll"]}}; either is optional'
)


class TextFunctions(NamedTuple):
    """features: of category names, (n, d), L2-normalized. tokens: of texts, as an
    encoder with prompts reads them.
    """

    features: Callable[[Sequence[str]], NameVectors]
    tokens: Callable[[Sequence[str]], Sequence[Sequence[int]]]


def letter_features(names: Sequence[str]) -> NameVectors:
    """Return hashed letter-trigram features (n, 512) of names, for use without a
    CLIP.
    """
    counts = np.zeros((len(names), 512))
    for row, name in enumerate(names):
        text = f"  {fold_name(name)} "
        for i in range(len(text) - 2):
            counts[row, zlib.crc32(text[i : i + 3].encode()) % 512] += 1
    unit: NameVectors = counts / np.linalg.norm(counts, axis=1, keepdims=True)
    return unit


def _clip_tokens(texts: Sequence[str]) -> list[list[int]]:
    clip = TextTokenizer.for_clip()
    return replace(clip, limit=clip.limit - _PROMPT_TOKENS).encode(texts)


LETTER_FUNCTIONS = TextFunctions(letter_features, _clip_tokens)


def backbone_functions(backbone: "Backbone") -> TextFunctions:
    """Return the text functions of a loaded CLIP, without prompts."""
    import torch
    import torch.nn.functional as F

    @torch.no_grad()
    def features(names: Sequence[str]) -> NameVectors:
        texts = [f"a photo of a {name}" for name in names]
        batches = (
            backbone.tokenize(texts[i : i + 256]) for i in range(0, len(texts), 256)
        )
        encoded = torch.cat(
            [backbone.encode_text(tokens).double() for tokens in batches]
        )
        vectors: NameVectors = F.normalize(encoded, dim=-1).cpu().numpy()
        return vectors

    return TextFunctions(features, backbone.text_tokenizer(_PROMPT_TOKENS).encode)


@dataclass(frozen=True)
class Taxonomy:
    """Category -> group, category -> others, most similar first, and category ->
    spelling; keys are folded names.
    """

    meta_categories: dict[str, str] = field(default_factory=dict)
    similar: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def load_taxonomy(file: Path) -> Taxonomy:
    """Read a taxonomy file. Raise DataError if it is missing, is not valid, or puts a
    category into two groups.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the taxonomy {file} cannot be read as JSON: {error}"
        ) from error
    if isinstance(content, dict) and content.keys() <= {"meta_categories", "similar"}:
        parts = [*content.values()]
    else:
        parts = []
    lists = [
        names
        for part in parts
        for names in (part.values() if isinstance(part, dict) else [None])
    ]
    if not parts or not all(
        isinstance(n, list) and all(isinstance(x, str) and x.strip() for x in n)
        for n in lists
    ):
        raise DataError(f"the taxonomy {file} must look like {_FORM}")
    tree = Taxonomy()
    for group, members in content.get("meta_categories", {}).items():
        for category in members:
            key = fold_name(category)
            if (known := tree.meta_categories.setdefault(key, group)) != group:
                raise DataError(
                    f"the taxonomy {file} has {category!r} in both {known!r} and"
                    f" {group!r}"
                )
            tree.names.setdefault(key, category)
    for category, others in content.get("similar", {}).items():
        tree.similar[fold_name(category)] = [fold_name(other) for other in others]
        for name in (category, *others):
            tree.names.setdefault(fold_name(name), name)
    return tree


def rank_categories(
    samples: Iterable[Sample],
    tree: Taxonomy | None,
    functions: TextFunctions,
    report: CleaningReport,
) -> dict[str, list[str]]:
    """Map each folded category to the rest of its meta-category, most similar first.

    - The meta-category comes from the taxonomy file, else from the data; without
      either, all categories are one [ours].
    - The order is that of the taxonomy file, then the frequency in the data's own
      negatives, then the cosine of the features.

    Raises:
        DataError: the taxonomy has none of the data's categories.
    """
    names: dict[str, str] = {}
    metas = defaultdict[str, Counter[str]](Counter)
    negatives = defaultdict[str, Counter[str]](Counter)
    for sample in (sample for sample in samples if sample.category):
        key = fold_name(sample.category)
        names.setdefault(key, sample.category)
        metas[key].update([sample.meta_category] if sample.meta_category else [])
        negatives[key].update(
            {fold_name(other) for other in sample.negative_categories if other} - {key}
        )
    groups = defaultdict[str, list[str]](list)
    for key in sorted(names) if tree is None else ():
        counts = metas[key] or Counter([""])
        groups[min(counts, key=lambda meta: (-counts[meta], meta))].append(key)
    if tree is not None:
        missing = sorted(
            name
            for key, name in names.items()
            if key not in {*tree.meta_categories, *tree.similar}
        )
        if names and len(missing) == len(names):
            known = ", ".join(map(repr, list(tree.names.values())[:3]))
            raise DataError(
                f"the taxonomy has none of the data's {len(names):,} categories, such"
                f" as {missing[0]!r}; it has {known or 'no categories at all'}"
            )
        report.add(
            "categories missing from the taxonomy, not swapped for others",
            names=missing,
        )
        for key, group in tree.meta_categories.items():
            groups[group].append(key)
    tree = tree or Taxonomy()
    similar = {
        key: sorted(counts, key=lambda other: (-counts[other], other))
        for key, counts in negatives.items()
    }
    similar = similar | tree.similar
    names = tree.names | names
    ranked = dict[str, list[str]]()
    for members in map(sorted, groups.values()):
        vectors = functions.features([names[key] for key in members])
        row_of = {key: row for row, key in enumerate(members)}
        for key, row in row_of.items():
            # rounded, to be equal on every device
            near = np.round(vectors @ vectors[row], 4)
            rank_of = np.full(len(members), np.inf)
            for rank, other in enumerate(similar.get(key, ())):
                if other in row_of:
                    rank_of[row_of[other]] = rank
            # equal ones stay in the order of names
            nearest = np.lexsort((-near, rank_of))[: MOST_RANKED + 1]
            ranked[key] = [names[members[i]] for i in nearest if i != row]
    for key, others in tree.similar.items():
        # the file's order comes first, across groups
        stated = [names[other] for other in others if other != key]
        ranked[key] = [
            *stated,
            *(name for name in ranked.get(key, []) if fold_name(name) not in others),
        ]
    return ranked


class Negative(NamedTuple):
    text: str
    category: str  # that it names
    kind: str  # of swap


class NegativeGenerator:
    """Generates negatives for the samples of one split, with categories in the order of
    `rank_categories`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        ranked: Mapping[str, list[str]],
        functions: TextFunctions,
        count: int,
        seed: int,
    ) -> None:
        self.ranked = ranked
        self.count = count
        self.seed = seed
        self._tokens = functions.tokens
        self.unnamed = 0  # captions without their category
        self._context = len(self._tokens(["a " * 1000])[0])
        self._read = lru_cache(maxsize=65536)(self._reading)
        self._captions: dict[str, list[str]] = defaultdict(list)
        self._own: dict[str, set[Hashable]] = defaultdict(set)
        for sample in samples:
            self._captions[fold_name(sample.category)].append(sample.caption)
            self._own[sample.image] |= set(
                map(self._read, (sample.caption, *sample.attributes))
            )

    def negatives(self, sample: Sample) -> list[Negative]:
        """Generate at most `count` negatives of a sample with a category; category
        swaps come first.
        """
        # without the folder, which depends on the image root
        name = PurePosixPath(sample.image).name
        random = Random(f"{self.seed}\n{name}\n{sample.caption}")
        taken = set(self._own[sample.image])
        swapped = self._category_swaps(sample)
        changed = self._attribute_swaps(sample, random)
        first = self._take(swapped, self.count - self.count // 2, taken)
        others = self._take(changed, self.count - len(first), taken)
        return [
            *first,
            *self._take(swapped, self.count - len(first) - len(others), taken),
            *others,
        ]

    def _take(
        self,
        negatives: Iterator[Negative],
        number: int,
        taken: set[Hashable],
    ) -> list[Negative]:
        """Take the first `number` negatives that read like nothing in `taken`, and add
        them to it.
        """
        chosen: list[Negative] = []
        while len(chosen) < number and (negative := next(negatives, None)) is not None:
            if (reading := self._read(negative.text)) not in taken:
                taken.add(reading)
                chosen.append(negative)
        return chosen

    def _reading(self, text: str) -> Hashable:
        """Return the normalized text or, if it fills the context, the tokens that the
        encoder reads.
        """
        text = fold_text(text.replace("-", " ")).rstrip(".! ")
        if len(text.encode()) + 2 < self._context:  # a token is a byte or more
            return text
        tokens = tuple(self._tokens([text])[0])
        return tokens if len(tokens) == self._context else text

    def _category_swaps(self, sample: Sample) -> Iterator[Negative]:
        key = fold_name(sample.category)
        caption = sample.caption
        others = self.ranked.get(key, [])
        spans = find_mentions(caption, sample.category)
        if others and not spans:
            self.unnamed += 1
            return
        for other in others:
            # otherwise the caption may still be true
            if fold_name(other) != key and not find_mentions(caption, other):
                yield Negative(
                    replace_name(caption, spans, sample.category, other),
                    other,
                    CATEGORY,
                )

    def _attribute_swaps(self, sample: Sample, random: Random) -> Iterator[Negative]:
        pool = self._captions[fold_name(sample.category)]
        picked = random.sample(range(len(pool)), min(len(pool), OTHERS_TRIED))
        captions = (Negative(pool[i], sample.category, CAPTION) for i in picked)
        kept = find_mentions(sample.caption, sample.category)
        words = (
            Negative(text, sample.category, ATTRIBUTE)
            for text in swap_attributes(sample.caption, kept, random)
        )
        return (
            negative
            for negative in chain.from_iterable(zip_longest(captions, words))
            if negative is not None
        )


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
    """Return the splits with negatives according to `mode`, and count them in the
    reports.

    `auto` completes splits where most pairs have no negatives, as in FDRD's newer
    files. `missing` completes every pair without negatives, `all` also replaces the
    data's own, and `off` does nothing.

    Args:
        taxonomy: a file with meta-categories; see docs/reference/data-formats.md.
        count: maximum negatives per pair. seed: selects among the possible attribute
            swaps.

    Raises:
        DataError: an unknown mode, an unusable taxonomy, an empty split, or mode
            `missing` or `all` for data without categories.
    """
    if mode not in get_args(Mode):
        raise DataError(
            f"--negatives must be {', '.join(get_args(Mode))}, not {mode!r}"
        )
    tree = load_taxonomy(taxonomy) if taxonomy is not None else None
    done = {}
    for name, data in splits.items():
        rows = _rows_to_complete(data, mode, reports[name])
        if rows:
            samples = [
                *data.samples,
                *(
                    splits["train"].samples
                    if "train" in splits and name != "train"
                    else ()
                ),
            ]
            ranked = rank_categories(samples, tree, functions, reports[name])
            data = _completed(
                data,
                rows,
                NegativeGenerator(data.samples, ranked, functions, count, seed),
                reports[name],
            )
        elif tree is not None:
            reports[name].add(
                "pairs that keep their negatives, so that the taxonomy is not used",
                len(data),
            )
        done[name] = data
    return done


def _rows_to_complete(data: Dataset, mode: str, report: CleaningReport) -> list[int]:
    if not data.samples:
        raise DataError(f"the split {data.split} has no pairs")
    rows = [
        row
        for row, sample in enumerate(data.samples)
        if mode == "all" or not sample.negatives
    ]
    if mode == "off" or (mode == "auto" and 2 * len(rows) <= len(data)):
        return []
    known = [row for row in rows if data.samples[row].category]
    if rows and not known and mode != "auto":
        what = (
            f"{data.split}: negatives need categories, and none of its {len(rows):,}"
            " pairs without negatives has one"
        )
        raise DataError(
            f"{what}; give class_name (or a column category), or --negatives off"
        )
    report.add(
        "pairs without a category, for which no negatives are made",
        len(rows) - len(known),
    )
    return known


def _completed(
    data: Dataset,
    rows: Sequence[int],
    generator: NegativeGenerator,
    report: CleaningReport,
) -> Dataset:
    samples = list(data.samples)
    kinds = Counter[str]()
    for row in rows:
        made = generator.negatives(samples[row])
        kinds.update(negative.kind for negative in made)
        texts, categories = (tuple(negative[i] for negative in made) for i in (0, 1))
        samples[row] = replace(
            samples[row],
            negatives=texts,
            negative_categories=categories,
        )
    empty = [samples[row].image for row in rows if not samples[row].negatives]
    report.add("pairs for which negatives were made", len(rows) - len(empty))
    for kind, number in kinds.items():
        report.add(f"negatives made: {kind}", number)
    report.add(
        "captions that do not name their category, so that it could not be swapped",
        generator.unnamed,
    )
    report.add("pairs for which no negative could be made", names=empty)
    return replace(data, samples=samples)
