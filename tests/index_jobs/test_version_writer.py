"""Version contents for galleries with more text than one Arrow array holds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from index_jobs.engines.measure import caption_queries
from index_jobs.jobs.gate import QueryPairs, calibrate


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


def test_cutoff_is_computed_from_pairs_with_a_vector() -> None:
    """Rows that failed have no vector; texts that equal the caption choose no weight."""
    rows = np.array([0, 1, 3, 5])
    vectors = np.zeros((4, 4), np.float32)
    vectors[2:] = [[0, 0, 0, 0.25], [0, 0, 0.5, 0]]
    encoded: Any = SimpleNamespace(rows=lambda: rows)
    index: Any = SimpleNamespace(vectors=lambda positions: vectors[positions])
    gallery: Any = SimpleNamespace(table=pa.table({"caption": [""] * 6}))
    pairs = QueryPairs(["xxx", "xx", "x"], ["a", "ccc", "bb"], [3, 5, 4], "validation")
    encoder: Any = Written()
    found = calibrate(Path(), index, pairs, gallery, encoded, encoder)["cutoff"]
    assert encoder.texts == ["xxx", "xx"], "bb has no vector"
    assert found["pairs"] == 2
    assert found["min_score"] == pytest.approx(np.quantile([0.25, 0.5], 0.05), abs=1e-4)
