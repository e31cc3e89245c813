"""Generator of negative captions for one sample, by two kinds of swap (section 3 of the method).

- Category swap: the caption with another category of the same meta-category, most similar first.
- Attribute swap: another caption of the category, or the caption with one attribute word replaced.
- Half of each kind; a shortage of one kind is filled with the other [ours]. FDRD has four negatives per pair.
- A negative never equals a caption, an attribute or another negative of its image, after normalization and after
  truncation to the context.
- Negatives depend on the seed and on the captions of the same category only.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
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
        self._context = len(tokenize(["a " * 1000])[0])
        self._full_tokens = lru_cache(maxsize=65536)(self._tokens_of_full)
        self._captions: dict[str, list[str]] = defaultdict(list)
        self._own: dict[str, set[Hashable]] = defaultdict(set)
        for sample in samples:
            self._captions[fold_name(sample.category)].append(sample.caption)
            self._own[sample.image] |= {*self._readings(sample.caption), *map(_same, sample.attributes)}
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
        captions = (Negative(pool[i], sample.category, CAPTION) for i in picked)
        kept = find_mentions(sample.caption, sample.category)
        words = (Negative(text, sample.category, ATTRIBUTE) for text in swap_attributes(sample.caption, kept, random))
        return (negative for negative in chain.from_iterable(zip_longest(captions, words)) if negative is not None)


def _same(text: str) -> str:
    """Normalize a text for comparison."""
    return fold_text(text.replace("-", " ")).rstrip(".! ")


def _contained(categories: Iterable[str]) -> dict[str, list[str]]:
    """Map each category to the longer ones that contain it: "shorthair" -> ["british shorthair"]."""
    by_word: dict[str, list[str]] = defaultdict(list)
    unique = sorted(set(categories) - {""})
    for name in unique:
        for word in set(name.split()):
            by_word[word].append(name)
    rarest = {name: min((by_word[word] for word in name.split()), key=len) for name in unique}
    return {name: [o for o in rarest[name] if o != name and f" {name} " in f" {o} "] for name in unique}
