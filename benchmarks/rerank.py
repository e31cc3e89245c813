"""Measure the gain and cost of `rerank`: recall with and without it, and the forward passes that it takes.

    python benchmarks/rerank.py data/index/twemoji --validation examples/emoji/twemoji

Every validation text searches the whole index. Its first `--depth` results are scored again with the exact weights of
the text for each of them, all treated alike, by the code of the service. A hit is the text's own image. The test split
plays no part.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.serving.multi_adapter_batch import TextRow, encode_text_rows
from dcar_core.serving.pair_weights import PairWeights
from index_jobs.gallery.scan import scan
from index_jobs.jobs import quality_gate
from index_jobs.store.artifact import Artifact
from index_jobs.store.versions import open_current

RANKS = (1, 5, 10)


def reranked(
    encoder: Encoder, pairs: PairWeights, artifact: Artifact, text: str, rows: NDArray[np.int64],
    frozen: dict[int, NDArray[np.float32]],
) -> NDArray[np.int64]:  # fmt: skip
    """Return the rows (C,) sorted by the exact weights. `frozen` caches image features by row."""
    for row in rows:
        if row not in frozen:
            pixels = encoder.preprocess(artifact.image_bytes(int(row)))
            frozen[row] = pairs.image_features(pixels[None])[0]
    factors = pairs.factors(text, np.stack([frozen[row] for row in rows]))  # [C, n]
    texts = encode_text_rows([TextRow(encoder, text, each) for each in factors])  # [C, E]
    scores = np.einsum("ce,ce->c", texts, artifact.vectors(rows))
    return rows[np.argsort(-scores, kind="stable")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="a published index")
    parser.add_argument("--validation", type=Path, required=True, help="the data set with the val pairs to query")
    parser.add_argument("--depth", type=int, default=20, help="results to score again (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="number of queries (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifact = open_current(args.index)
    encoder = Encoder.load(artifact.checkpoint, device="cpu")
    weigher = PairWeights(encoder)
    pairs = quality_gate.pairs_of(scan(artifact.manifest.source), args.validation)
    assert pairs is not None  # --validation is given
    asked = list(zip(pairs.texts, map(artifact.row_of, pairs.ids), strict=True))[: args.limit]
    depth = max(args.depth, *RANKS)
    plain, again = np.zeros(len(RANKS)), np.zeros(len(RANKS))
    frozen: dict[int, NDArray[np.float32]] = {}
    for text, row in asked:
        rows = artifact.search(encoder.encode_text([text]), depth)[1][0]
        better = np.concatenate(
            [reranked(encoder, weigher, artifact, text, rows[: args.depth], frozen), rows[args.depth :]]
        )
        plain += [row in rows[:k] for k in RANKS]
        again += [row in better[:k] for k in RANKS]
    print(f"{args.index}: {len(asked)} validation texts among {artifact.manifest.count:,} items, percent")
    for name, hits in (("as found", plain), (f"first {args.depth} re-ranked", again)):
        print(
            f"  {name:22}" + "".join(f"  R@{k} {100 * n / len(asked):5.1f}" for k, n in zip(RANKS, hits, strict=True))
        )
    print(
        f"  a query then encodes {args.depth} texts more, and each picture once through the frozen encoder: "
        f"{len(frozen):,} for all of these"
    )


if __name__ == "__main__":
    main()
