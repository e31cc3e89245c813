"""Generator of negative captions for one sample, by two kinds of swap (section 3 of the method).

- Category swap: the caption with another category of the same meta-category, most similar first.
- Attribute swap: another caption of the category, or the caption with one attribute word replaced.
- Half of each kind; a shortage of one kind is filled with the other [ours]. FDRD has four negatives per pair.
- A negative never equals a caption, an attribute or another negative of its image, after normalization and after
  truncation to the context.
- Negatives depend on the seed and on the captions of the same category only.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import PurePosixPath
from random import Random
from typing import NamedTuple

from dcar_core.data import Sample
from dcar_core.data.clean import fold_text
from dcar_core.negatives.lexicon import swap_attributes
from dcar_core.negatives.words import find_mentions, fold_name, replace_name

OTHERS_TRIED = 16
CATEGORY = "the caption with another category"
CAPTION = "another caption of the category"
ATTRIBUTE = "the caption with another attribute"


class Negative(NamedTuple):
    """A negative caption, the category it names, and the kind of swap."""

    text: str
    category: str
    kind: str


ReadTokens = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # texts -> tokens that the encoder reads


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
        captions = list(dict.fromkeys(sample.caption for sample in samples))
        self._context = len(tokenize(["a " * 1000])[0])
        read = zip(captions, map(tuple, tokenize(captions)), strict=True)
        self._full: dict[str, Hashable] = {text: tokens for text, tokens in read if len(tokens) == self._context}
        self._captions: dict[str, list[Sample]] = defaultdict(list)
        self._own: dict[str, set[Hashable]] = defaultdict(set)
        for sample in samples:
            self._captions[fold_name(sample.category)].append(sample)
            same = _same(sample.caption)
            self._own[sample.image] |= {same, self._full.get(sample.caption, same), *map(_same, sample.attributes)}
        self._longer = _contained([*self._captions, *(fold_name(name) for names in ranked.values() for name in names)])

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
        """Take the first `number` negatives that are not in `taken`, and add them to it."""
        found: list[Negative] = []
        while len(found) < number and (negative := next(negatives, None)) is not None:
            same = _same(negative.text)
            if same in taken:
                continue
            read = self._reading(negative) or same
            if read in taken:
                self.unread += 1
            else:
                taken |= {same, read}
                found.append(negative)
        return found

    def _reading(self, negative: Negative) -> Hashable | None:
        """Return the tokens of a text that fills the context, None for a shorter text."""
        if negative.kind == CAPTION:
            return self._full.get(negative.text)
        if len(negative.text.encode()) + 2 < self._context:  # a token is a byte or more
            return None
        tokens = tuple(self._tokenize([negative.text])[0])
        return tokens if len(tokens) == self._context else None

    def _category_swaps(self, sample: Sample) -> Iterator[Negative]:
        key, caption = fold_name(sample.category), sample.caption
        others = self.ranked.get(key, [])
        places = find_mentions(caption, sample.category, self._longer.get(key, ()))
        if others and not places:
            self.unnamed += 1
            return
        for other in others:
            if fold_name(other) != key and not find_mentions(caption, other):  # otherwise the caption may still be true
                yield Negative(replace_name(caption, places, sample.category, other), other, CATEGORY)

    def _attribute_swaps(self, sample: Sample, random: Random) -> Iterator[Negative]:
        pool = self._captions[fold_name(sample.category)]
        picked = random.sample(range(len(pool)), min(len(pool), OTHERS_TRIED))
        captions = (Negative(pool[i].caption, sample.category, CAPTION) for i in picked)
        kept = [(place.start, place.end) for place in find_mentions(sample.caption, sample.category)]
        words = (Negative(text, sample.category, ATTRIBUTE) for text in swap_attributes(sample.caption, kept, random))
        return (negative for negative in chain.from_iterable(zip_longest(captions, words)) if negative is not None)


def _same(text: str) -> str:
    """Normalize a text for comparison."""
    return fold_text(text.replace("-", " ")).rstrip(".! ")


def _contained(categories: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Map each category to the longer ones that contain it: "shorthair" -> ("british shorthair",)."""
    unique = sorted(set(categories) - {""})
    by_word: dict[str, list[str]] = defaultdict(list)
    for name in unique:
        for word in set(name.split()):
            by_word[word].append(name)
    found = {}
    for name in unique:
        rarest = min((by_word[word] for word in name.split()), key=len)
        longer = tuple(other for other in rarest if other != name and f" {name} " in f" {other} ")
        if longer:
            found[name] = longer
    return found
