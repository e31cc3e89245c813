"""Version contents for galleries with more text than one Arrow array holds."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from index_jobs.jobs.contents import calibrate_cutoff, caption_queries
from index_jobs.jobs.gate import QueryPairs


class Written:
    """An encoder that records its inputs and returns one of four vectors."""

    dim = 4

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_text(self, texts: list[str]) -> Any:
        self.texts += texts
        return np.eye(4, dtype=np.float32)[np.array([len(text) % 4 for text in texts])]


@pytest.fixture(scope="module")
def long() -> pa.ChunkedArray:
    """40 chunks of 65 MB that are the same memory, and one of a few rows."""
    chunk = pa.array([f"{number:05}" + "x" * 1000 for number in range(65_536)])
    return pa.chunked_array([chunk] * 40 + [pa.array(["a", "bb", "ccc"])])


def test_captions_are_taken_from_very_many(long: pa.ChunkedArray) -> None:
    encoder: Any = Written()
    queries = caption_queries(pa.table({"caption": long}), encoder)
    assert queries is not None
    step = -(-len(long) // 1000)
    assert [text[:5] for text in encoder.texts] == [f"{row % 65_536:05}" for row in range(0, 40 * 65_536, step)]
    assert (queries.own_rows == -1).all()


@pytest.mark.slow
def test_cutoff_is_computed_from_pairs_among_very_many(long: pa.ChunkedArray) -> None:
    """Rows that failed have no vector; the last vectors are those of the last three ids."""
    rows = np.setdiff1d(np.arange(len(long)), [5, len(long) - 2])
    vectors = np.zeros((len(rows), 4), np.float32)
    vectors[-2:] = [[0, 0, 0, 0.25], [0, 0, 0.5, 0]]
    encoded: Any = SimpleNamespace(rows=lambda: rows, blocks=lambda: iter(np.array_split(vectors, 9)))
    last = len(long) - 3  # "a", "bb" and "ccc"
    pairs = QueryPairs(["xxx", "xx", "x"], ["a", "ccc", "bb"], [last, last + 2, last + 1], "validation")
    encoder: Any = Written()
    found = calibrate_cutoff(pairs, encoder, encoded)
    assert encoder.texts == ["xxx", "xx"], "bb has no vector"
    assert found["pairs"] == 2
    assert found["min_score"] == pytest.approx(np.quantile([0.25, 0.5], 0.05), abs=1e-4)
