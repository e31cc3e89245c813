"""The weight of the words: ranks under a weight, and which weight validation texts choose."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from dcar_core.util.arrays import Floats
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.index.lexical import fusion
from index_jobs.index.lexical.fusion import DEFAULT_WEIGHT, choose_weight, hybrid_gains, text_bonus
from index_jobs.index.lexical.lexical_index import LexicalIndex, write_lexical
from index_jobs.index.versions import open_current
from tests.support.versions import Build

Parts = tuple[FaissIndex, LexicalIndex, Floats]
COUNT = 120


def unit(*shape: int) -> Floats:
    vectors = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Items of random vectors; each has a code of its own and one of three colours."""
    path = tmp_path_factory.mktemp("lexical") / "lexical"
    write_lexical(path, [f"{['red', 'green', 'blue'][row % 3]} code{row}" for row in range(COUNT)])
    vectors = unit(COUNT, 16)
    index: Any = faiss.IndexFlatIP(16)
    index.add(vectors)
    return FaissIndex(index), LexicalIndex(path), vectors


def test_gains_equal_ranks_among_all_rows(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    index, lexical, vectors = parts
    monkeypatch.setattr(fusion, "DEPTH", COUNT)
    queries = [("red", unit(7, 16)[0], 3), ("code8 green", unit(8, 16)[0], 8), ("nothing", unit(9, 16)[0], 50)]
    gains = hybrid_gains(index, lexical, vectors, queries, [0.3, 0.9])
    for (text, vector, target), found in zip(queries, gains.tolist(), strict=True):
        for weight, gain in zip((0.3, 0.9), found, strict=True):
            bonus = text_bonus(vectors, vector, weight)
            scores = vectors @ vector + bonus * lexical.score(text, np.arange(COUNT))
            assert gain == pytest.approx(1 / np.log2(2 + np.count_nonzero(scores > scores[target])))


@pytest.mark.parametrize("words_tell", [True, False])
def test_the_weight_follows_what_tells_the_items_apart(parts: Parts, words_tell: bool) -> None:
    index, lexical, vectors = parts
    noise = unit(COUNT + 1, 16)
    queries = [
        (f"code{row}", noise[row], row) if words_tell else (f"code{row + 1}", vectors[row], row)
        for row in range(COUNT - 1)
    ]
    chosen = choose_weight(index, lexical, vectors, queries)
    assert chosen >= DEFAULT_WEIGHT if words_tell else chosen < DEFAULT_WEIGHT


@pytest.mark.slow
def test_a_build_chooses_the_weight_by_texts_that_are_no_captions_of_the_gallery(
    build: Build, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index_jobs.jobs.gate.MIN_TEXTS", 4)
    index, validation = tmp_path / "index", tmp_path / "validation"
    validation.mkdir()
    for path in tiny_data.iterdir():
        (validation / path.name).symlink_to(path)
    build(tiny_data, validation=tiny_data)
    manifest = open_current(index).manifest
    assert (manifest.hybrid_weight, manifest.words_weight) == (None, DEFAULT_WEIGHT)
    content = json.loads((validation / "val.json").read_text())
    for each in content.values():
        each["positive"] = "picture of " + each["positive"]
    (validation / "val.json").unlink()
    (validation / "val.json").write_text(json.dumps(content))
    for _ in range(2):
        summary = build(tiny_data, validation=validation, force=True, margin=1)
    manifest = open_current(index).manifest
    assert manifest.hybrid_weight == manifest.words_weight
    assert manifest.hybrid_weight in fusion.WEIGHTS
    assert summary.gate is not None
    assert summary.gate["serving"]["hybrid_recall_at_1"] == summary.gate["rebuilt"]["hybrid_recall_at_1"]
