"""Which pairs meet in a batch."""

import numpy as np
import torch
import torch.nn.functional as F

from dcar_core.order import epoch_order, neighbours_of


def clustered() -> tuple[np.ndarray, np.ndarray]:
    """40 captions of 10 kinds, four near each other of each, in no order; their kinds, and their neighbours."""
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randperm(40, generator=draw) % 10
    features = F.normalize(torch.eye(10)[kinds] + 0.05 * torch.randn(40, 10, generator=draw), dim=1)
    return kinds.numpy(), neighbours_of(features)


def test_every_row_once_and_the_same_again() -> None:
    _, neighbours = clustered()
    for epoch in (1, 2, 3):
        order = epoch_order(40, 7, epoch, neighbours, 4)
        assert sorted(order.tolist()) == list(range(40))
        np.testing.assert_array_equal(order, epoch_order(40, 7, epoch, neighbours, 4))
        assert (order != epoch_order(40, 8, epoch, neighbours, 4)).any()
    assert (epoch_order(40, 7, 1, neighbours, 4) != epoch_order(40, 7, 3, neighbours, 4)).any()


def test_odd_epochs_bring_variants_together() -> None:
    kinds, neighbours = clustered()
    near = kinds[epoch_order(40, 7, 1, neighbours, 4)].reshape(10, 4)
    assert (near == near[:, :1]).all()
    pairs = kinds[epoch_order(40, 7, 1, neighbours, 2)].reshape(20, 2)
    assert (pairs == pairs[:, :1]).all()
    plain = np.random.default_rng([7, 2]).permutation(40)
    np.testing.assert_array_equal(epoch_order(40, 7, 2, neighbours, 4), plain)
    np.testing.assert_array_equal(epoch_order(40, 7, 2), plain)


def test_without_groups_the_order_is_the_draw() -> None:
    _, neighbours = clustered()
    draw = np.random.default_rng([7, 1]).permutation(40)
    np.testing.assert_array_equal(epoch_order(40, 7, 1, neighbours, 1), draw)
    np.testing.assert_array_equal(epoch_order(40, 7, 1), draw)


def test_neighbours_are_by_cosine_and_few() -> None:
    features = F.normalize(torch.randn(100, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    found = neighbours_of(features)
    assert found.shape == (100, 32)
    assert (found[:, 0] == np.arange(100)).all()
    cosines = (features @ features.T).numpy()
    np.testing.assert_array_equal(found, np.argsort(-cosines, 1, kind="stable")[:, :32])
    assert neighbours_of(features[:3]).shape == (3, 3)
