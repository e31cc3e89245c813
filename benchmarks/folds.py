"""Write two folds of a data set, to compare methods without its test split.

    python benchmarks/folds.py examples/emoji/twemoji --out folds
    for FOLD in 0 1; do
        dcar evaluate --data folds/$FOLD --images examples/emoji/twemoji/gallery.tar --model examples/emoji/base \\
            --epochs 5 --lr 5e-3 --amp bfloat16 --methods block-adapters,query-prompts --out folds/results/$FOLD
    done
    python benchmarks/category_intervals.py folds/results/0 folds/results/1 "query-prompts with rerank" \\
        block-adapters --measure t2i_r1

- Training and validation categories are halved: one half is searched (the test split of the fold), the other trains,
  and a tenth of it chooses the epoch. The other fold has the halves the other way round.
- Categories with the same image, byte for byte, stay together.
- Images that are searched keep their first caption. Negatives are left out, since they may be captions of the other
  half; `dcar evaluate` makes new ones of each split.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dcar_core.data import Annotations, Dataset, Sample, write_splits

Group = frozenset[str]  # categories that stay together


def groups_of(samples: list[Sample], read: dict[str, bytes]) -> list[Group]:
    """Return the groups. read: the content of each image."""
    sharing, group_of = defaultdict[bytes, set[str]](set), dict[str, Group]()
    for sample in samples:
        sharing[read[sample.image]].add(sample.category)
    for categories in sharing.values():
        group = frozenset().union(*(group_of.get(each, {each}) for each in categories))
        group_of |= dict.fromkeys(group, group)
    return list(dict.fromkeys(group_of.values()))


def folds(data: Path, seed: int = 0) -> list[dict[str, Dataset]]:
    """Return the splits of both folds."""
    splits, _ = Annotations(data).load_all(("train", "val"))
    samples = [replace(each, negatives=(), negative_categories=()) for part in splits.values() for each in part.samples]
    groups = groups_of(samples, {image: part.read(image) for part in splits.values() for image in part.images})
    groups = [groups[place] for place in np.random.default_rng(seed).permutation(len(groups))]
    first_captions = [*{each.image: each for each in reversed(samples)}.values()]

    def part(name: str, own: Iterable[Group]) -> Dataset:
        categories = frozenset().union(*own)
        kept = [each for each in (samples if name == "train" else first_captions) if each.category in categories]
        return Dataset(name, kept, splits["train"].root)

    halves = groups[::2], groups[1::2]
    return [
        {
            "train": part("train", (group for place, group in enumerate(learned) if place % 10)),
            "val": part("val", learned[::10]),
            "test": part("test", searched),
        }
        for learned, searched in (halves, halves[::-1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data set with categories")
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument("--seed", type=int, default=0, help="of the halves (default: %(default)s)")
    args = parser.parse_args()
    for number, splits in enumerate(folds(args.data, args.seed)):
        write_splits(splits, args.out / str(number))
        print(f"{args.out / str(number)}: " + "; ".join(f"{name}: {part}" for name, part in splits.items()))


if __name__ == "__main__":
    main()
