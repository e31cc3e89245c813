"""The vector of a query: the weighted sum of its parts."""

import numpy as np
import pytest

from app.search.errors import InvalidQueryError
from app.search.plan import compose
from dcar_core.util.arrays import Floats

EAST, NORTH = np.eye(4, dtype=np.float32)[:2]


def unit(*values: float) -> Floats:
    vector = np.array(values, np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def test_the_only_part_keeps_its_direction_whatever_its_weight() -> None:
    for weight in (1e-30, 1.0, 100.0):
        np.testing.assert_allclose(compose([(weight, EAST)]), EAST, atol=1e-7)


def test_parts_are_added_by_weight_and_negative_ones_subtracted() -> None:
    vector = compose([(1.0, EAST), (-0.5, NORTH)])
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, unit(1, -0.5, 0, 0), atol=1e-7)


def test_only_the_ratio_of_the_weights_matters() -> None:
    vectors = [compose([(scale, EAST), (scale / 4, NORTH)]) for scale in (1e-38, 1.0, 100.0)]
    for vector in vectors:
        np.testing.assert_allclose(vector, unit(1, 0.25, 0, 0), atol=1e-6)


def test_a_part_of_weight_zero_does_not_matter() -> None:
    np.testing.assert_allclose(compose([(0.0, NORTH), (1.0, EAST)]), EAST, atol=1e-7)


def test_the_mean_of_items_need_not_have_unit_length() -> None:
    mean = np.asarray((EAST + NORTH) / 2, np.float32)
    np.testing.assert_allclose(compose([(1.0, mean)]), unit(1, 1, 0, 0), atol=1e-7)


@pytest.mark.parametrize("parts", [[], [(0.0, EAST)], [(0.0, EAST), (-0.0, NORTH)]])
def test_a_query_without_any_weight_is_refused(parts: list[tuple[float, Floats]]) -> None:
    with pytest.raises(InvalidQueryError, match="weight above 0") as refused:
        compose(parts)
    assert refused.value.field == "weights"


def test_parts_that_cancel_out_are_refused() -> None:
    nearly_east = unit(1, 1e-6, 0, 0)
    with pytest.raises(InvalidQueryError, match="cancel each other out"):
        compose([(1.0, EAST), (-1.0, nearly_east)])
