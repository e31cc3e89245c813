"""The vector of a query: the weighted sum of its parts."""

import numpy as np
import pytest

from app.search.errors import InvalidQueryError
from app.search.query import compose
from dcar_core.util.arrays import Floats

EAST, NORTH = np.eye(4, dtype=np.float32)[:2]


def unit(*values: float) -> Floats:
    vector = np.array(values, np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        *(([(weight, EAST)], EAST) for weight in (1e-30, 1.0, 100.0)),
        ([(1.0, EAST), (-0.5, NORTH)], unit(1, -0.5, 0, 0)),
        *(([(scale, EAST), (scale / 4, NORTH)], unit(1, 0.25, 0, 0)) for scale in (1e-38, 1.0, 100.0)),
        ([(0.0, NORTH), (1.0, EAST)], EAST),
        ([(1.0, (EAST + NORTH) / 2)], unit(1, 1, 0, 0)),  # the mean of items
    ],
)
def test_parts_are_added_by_the_ratio_of_their_weights(parts: list[tuple[float, Floats]], expected: Floats) -> None:
    vector = compose(parts)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.parametrize("parts", [[], [(0.0, EAST)], [(0.0, EAST), (-0.0, NORTH)]])
def test_a_query_without_any_weight_is_refused(parts: list[tuple[float, Floats]]) -> None:
    with pytest.raises(InvalidQueryError, match="weight above 0") as refused:
        compose(parts)
    assert refused.value.field == "weights"


def test_parts_that_cancel_out_are_refused() -> None:
    nearly_east = unit(1, 1e-6, 0, 0)
    with pytest.raises(InvalidQueryError, match="cancel each other out"):
        compose([(1.0, EAST), (-1.0, nearly_east)])
