"""The order in which an epoch takes the pairs, and so which of them meet in a batch. It follows from seed and epoch."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]

_NEIGHBOURS = 32
_AT_ONCE = 1024  # rows, so that a large data set's cosines need not lie in memory together


def epoch_order(count: int, seed: int, epoch: int, neighbours: Rows | None = None, near: int = 1) -> Rows:
    """A permutation of `count` rows for an epoch, which counts from 1.

    Args:
        neighbours: from `neighbours_of`. With it, odd epochs take the rows in groups of up to `near` that are
            neighbours (dcar+ [ours]): a batch at random seldom holds two variants of one thing, and so never asks which
            is which. Even epochs stay as they are, or the many things that are far apart would be forgotten.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(count)
    if neighbours is None or near < 2 or epoch % 2 == 0:
        return order
    taken, groups = np.zeros(count, bool), list[list[int]]()
    for row in order.tolist():
        if taken[row]:
            continue
        free = [each for each in neighbours[row].tolist() if each != row and not taken[each]]
        groups.append([row, *free[: near - 1]])
        taken[groups[-1]] = True
    return np.concatenate([groups[i] for i in draw.permutation(len(groups))])


@torch.no_grad()
def neighbours_of(features: Tensor) -> Rows:
    """(N, E), L2-normalised -> int64 (N, at most 32): the rows nearest to each, nearest first, itself among them."""
    wide = min(_NEIGHBOURS, len(features))
    parts = [(part @ features.T).topk(wide).indices.cpu().numpy() for part in torch.split(features, _AT_ONCE)]
    return np.concatenate(parts)
