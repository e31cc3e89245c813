"""Recall of text searches with and without `rerank`, and the forward passes that it costs.

    make demo    # once, for data/index/twemoji and openmoji; stop it when it serves
    python benchmarks/rerank.py data/index/twemoji --validation examples/emoji/twemoji
    python benchmarks/rerank.py data/index/twemoji --validation examples/emoji/twemoji --pool validation --depth 408

- Every validation text searches the whole index, or with `--pool validation` the validation images alone. Its first
  `--depth` results are scored again with the exact token weights of the text for each result, by the code of the
  service. A hit is the text's own image.
- The test split is not read.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.serving.multi_encoder_batch import TextRow, encode_text_rows
from dcar_core.serving.second_scores import PairWeights
from index_jobs.gallery.scan import scan
from index_jobs.jobs import gate
from index_jobs.store.artifact import Artifact
from index_jobs.store.versions import open_current

RANKS = (1, 5, 10)


def rerank(
    encoder: Encoder, pairs: PairWeights, artifact: Artifact, text: str, rows: NDArray[np.int64],
    image_features: dict[int, NDArray[np.float32]],
) -> NDArray[np.int64]:  # fmt: skip
    """Sort rows (C,) by their scores under the exact pair weights, best first.

    image_features: frozen features by row, filled on demand.
    """
    for row in rows:
        if row not in image_features:
            pixels = encoder.preprocess(artifact.image_bytes(int(row)))
            image_features[row] = pairs.image_features(pixels[None])[0]
    factors = pairs.factors(text, np.stack([image_features[row] for row in rows]))  # [C, n]
    texts = encode_text_rows([TextRow(encoder, text, each) for each in factors])  # [C, E]
    scores = np.einsum("ce,ce->c", texts, artifact.vectors(rows))
    return rows[np.argsort(-scores, kind="stable")]


def main() -> None:
    """Print recall with and without re-ranking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="a published index")
    parser.add_argument("--validation", type=Path, required=True, help="data set; its validation pairs are the queries")
    parser.add_argument("--pool", choices=("gallery", "validation"), default="gallery", help="default: %(default)s")
    parser.add_argument("--depth", type=int, default=20, help="results to re-rank (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifact = open_current(args.index)
    encoder = Encoder.load(artifact.checkpoint, device="cpu")
    if encoder.state.reranks_by != "weights":
        parser.error(f"the model of {args.index} was trained without token weights, so it cannot re-rank")
    pair_weights = PairWeights(encoder)
    pairs = gate.find_pairs(scan(artifact.manifest.spec.gallery), args.validation)
    assert pairs is not None  # --validation is required
    queries = list(zip(pairs.texts, map(artifact.row_of, pairs.ids), strict=True))
    depth, allowed = max(args.depth, *RANKS), None
    if args.pool == "validation":
        allowed = np.zeros(artifact.rows, bool)
        allowed[[row for _, row in queries]] = True
    plain_hits, reranked_hits = np.zeros(len(RANKS)), np.zeros(len(RANKS))
    image_features: dict[int, NDArray[np.float32]] = {}
    for text, row in queries:
        rows = artifact.search(encoder.encode_text([text]), depth, allowed)[1][0]
        rows = rows[rows >= 0]
        reranked = np.concatenate(
            [rerank(encoder, pair_weights, artifact, text, rows[: args.depth], image_features), rows[args.depth :]]
        )
        plain_hits += [row in rows[:k] for k in RANKS]
        reranked_hits += [row in reranked[:k] for k in RANKS]
    count = artifact.manifest.count if allowed is None else int(allowed.sum())
    print(f"{args.index}: {len(queries)} validation texts among {count:,} items, percent")
    for name, hits in (("not re-ranked", plain_hits), (f"first {args.depth} re-ranked", reranked_hits)):
        print(
            f"  {name:22}" + "".join(f"  R@{k} {100 * n / len(queries):5.1f}" for k, n in zip(RANKS, hits, strict=True))
        )
    print(
        f"  each query encodes {min(args.depth, count)} more texts, and each image once by the frozen encoder: "
        f"{len(image_features):,} in total"
    )


if __name__ == "__main__":
    main()
