"""Measure the calibrated cut-off (`min_score: "auto"`): the share of true queries kept, and of nonsense cut.

    python benchmarks/cutoff.py data/index/twemoji --validation examples/emoji/twemoji

- True queries are the validation texts. One half sets a cut-off and the other half is judged by it, and vice versa.
  Kept: the share of queries whose own image reaches the cut-off.
- Nonsense queries are texts about things that no emoji shows, and strings of random letters. Cut: the share for which
  nothing in the index reaches the cut-off, so the result is empty.
- Results left: the number of items that reach the cut-off for the validation texts, median and 90th percentile.
- The test split plays no part. PyTorch encodes on one thread.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch

from dcar_core import Encoder
from dcar_core.serving.score_cutoff import cutoff
from index_jobs.gallery.scan import scan
from index_jobs.jobs import quality_gate
from index_jobs.store.versions import open_current

ELSEWHERE = (
    "quarterly tax report", "how do I reset my password", "stainless steel hex bolt M8", "kernel panic stack trace",
    "two people signing a contract", "lorem ipsum dolor sit amet", "refund policy for annual subscription",
    "python list comprehension", "concrete mixer rental price", "portrait of a baroque nobleman",
    "satellite image of a harbour", "mri scan of a human knee", "circuit board close up", "beige vintage wallpaper",
    "terms and conditions apply", "gothic cathedral interior", "second derivative of a function", "kitchen tap part",
    "minutes of the board meeting", "proof of residence document", "scratched hardwood floor", "a pump's wiring plan",
    "mortgage interest rates", "aerial view of farmland", "electron microscope picture of pollen",
)  # fmt: skip
LETTERS = 200


def random_words(count: int) -> list[str]:
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(4, 9)))

    return [f"{word()} {word()}" for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="a published index")
    parser.add_argument("--validation", type=Path, required=True, help="the data set with the val pairs to query")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifact = open_current(args.index)
    encoder = Encoder.load(artifact.checkpoint, device="cpu")
    pairs = quality_gate.pairs_of(scan(artifact.manifest.source), args.validation)
    assert pairs is not None  # --validation is given
    both = [(text, artifact.row_of(item_id)) for text, item_id in zip(pairs.texts, pairs.ids, strict=True)]
    rows = np.array([row for _, row in both if row is not None])
    texts = encoder.encode_text([text for text, row in both if row is not None])  # [N, E]
    found = cutoff(np.einsum("ne,ne->n", texts, artifact.vectors(rows)))
    print(f"{args.index}: cut-off {found.min_score:.3f} from {found.pairs} validation pairs")
    print(f"  kept of true queries, by halves   {100 * (found.kept or 0):.1f} %")
    for name, queries in (("things that it does not hold", ELSEWHERE), ("random letters", random_words(LETTERS))):
        best, _ = artifact.search(encoder.encode_text(list(queries)), 1)
        print(f"  cut of {len(queries)} queries: {name:30}{100 * float((best[:, 0] < found.min_score).mean()):.1f} %")
    scores, _ = artifact.search(texts, artifact.manifest.count)
    left = (scores >= found.min_score).sum(1)
    print(
        f"  results left, of {artifact.manifest.count}: median {np.median(left):.0f}, p90 {np.quantile(left, 0.9):.0f}"
    )


if __name__ == "__main__":
    main()
