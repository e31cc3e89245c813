"""From which score on a search by words has found something: a cut-off from validation pairs.

Two kinds of score are set against each other for each validation caption:

    present   the best of its own pictures
    absent    the best of all other pictures, which is what a search would find if its own were not in the gallery

The cut-off is where the share of `present` kept plus the share of `absent` refused is highest. In a gallery much larger
than the validation split strangers come closer, so there it lets more through than it says.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.checkpoint import read_config, write_config
from dcar_core.data import Dataset
from dcar_core.encoder import Encoder
from dcar_core.errors import DataError

KEY = "cutoff"  # in the checkpoint's config.json; not part of the fingerprint

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cutoff:
    """min_score, the shares (0 to 1) that it keeps and refuses on the validation split, and the number of its pairs."""

    min_score: float
    kept: float
    refused: float
    pairs: int

    @classmethod
    def of(cls, checkpoint: Path) -> "Cutoff | None":
        """What a checkpoint says; None when it was never calibrated."""
        found: dict[str, Any] | None = read_config(checkpoint).get(KEY)
        return None if found is None else cls(**found)


def cutoff(present: Floats, absent: Floats) -> Cutoff:
    """The best cut-off between the scores (N,) of what is there and (N,) of the best that is not meant."""
    candidates = np.unique(np.concatenate([present, absent]))  # ascending
    kept = 1 - np.searchsorted(np.sort(present), candidates, "left") / len(present)
    refused = np.searchsorted(np.sort(absent), candidates, "left") / len(absent)
    best = int(np.argmax(kept + refused))
    return Cutoff(float(candidates[best]), float(kept[best]), float(refused[best]), len(present))


def calibrate(encoder: Encoder, validation: Dataset, checkpoint: Path) -> Cutoff:
    """Find the cut-off and write it into the checkpoint's config.json.

    Raises:
        DataError: fewer than two different captions.
    """
    found = cutoff(*_scores(encoder, validation))
    content = read_config(checkpoint)
    content[KEY] = asdict(found)
    write_config(checkpoint, content)
    return found


def _scores(encoder: Encoder, data: Dataset) -> tuple[Floats, Floats]:
    samples = data.samples
    names = list(dict.fromkeys(sample.image for sample in samples))
    own: dict[str, set[int]] = {}  # pictures of each caption, by its form
    for sample in samples:
        own.setdefault(sample.caption.casefold(), set()).add(names.index(sample.image))
    if len(own) < 2:
        raise DataError(f"the {data.split} split has {len(own)} different captions, but a cut-off needs two or more")
    first = {sample.image: sample for sample in reversed(samples)}
    pictures = encoder.encode_images([data.read(first[name]) for name in names])
    similar = encoder.encode_text([sample.caption for sample in samples]) @ pictures.T  # [N, I]
    mine = np.zeros(similar.shape, np.bool_)
    for row, sample in enumerate(samples):
        mine[row, list(own[sample.caption.casefold()])] = True
    present = np.where(mine, similar, -np.inf).max(1)
    absent = np.where(mine, -np.inf, similar).max(1)
    return present.astype(np.float32), absent.astype(np.float32)
