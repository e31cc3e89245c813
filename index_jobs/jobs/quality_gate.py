"""Is a rebuilt index as good as the one that is served? Texts whose picture is known are asked of both.

- Pairs are held-out validation pairs whose pictures lie in the gallery; without them, captions that only one picture of
  the gallery has. Those the new model may have been trained on, so validation pairs are the better judge.
- A pair's picture is known by the file that holds it, whatever links lead there. A gallery that is not on this machine
  has no such files: there, a picture is known by its name below the gallery, or by how its URL ends, if that is its
  alone.
- Each index answers with its own model, as it will be served, so what a coarser kind of index misses counts too.
- Only items that both indexes hold may be found: a gallery that grew makes every search harder, and no model worse.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.errors import DataError
from index_jobs.gallery.storage import WHOLE_FILE, is_url, join_location
from index_jobs.options import RebuildOptions
from index_jobs.store.artifact import Artifact

if TYPE_CHECKING:
    import pyarrow as pa

    from dcar_core import Encoder
    from dcar_core.images import ImageRoot
    from index_jobs.gallery.scan import Gallery

logger = logging.getLogger(__name__)

MOST_PAIRS = 1000
_RANKS = (1, 10)
_HERE = "file://"
_SEVERAL = -1  # in place of a row

_Key = str | tuple[str, int]  # a name, or a file and where a picture begins in it


@dataclass(frozen=True)
class Pairs:
    """Texts, the ids of their pictures, and where they come from: "validation" or "captions"."""

    texts: list[str]
    ids: list[str]
    source: str


@dataclass(frozen=True)
class Verdict:
    """What a comparison found. recall_at_1 and recall_at_10 of both; `compared` is false where nothing could be."""

    passed: bool
    compared: bool
    reason: str
    margin: float
    pairs: int = 0
    source: str = ""
    serving: dict[str, float] | None = None
    rebuilt: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pairs_of(gallery: "Gallery", validation: Path | None) -> Pairs | None:
    """The pairs to compare with; None when there are no validation pairs and no captions.

    Args:
        validation: a data set with a val split, as `dcar train --data` takes it.

    Raises:
        DataError: the validation pairs cannot be read, or none of their pictures is in the gallery.
    """
    return _validation(gallery, validation) if validation else _captions(gallery)


def _validation(gallery: "Gallery", data: Path) -> Pairs:
    from dcar_core.data import MISSING_IMAGES, load_split

    split, report = load_split(data, "val", image_policy="present")  # a product that is gone takes its picture along
    if missing := report.names.get(MISSING_IMAGES):
        logger.warning("%d validation pictures of %s are missing, such as %s", len(missing), data, missing[0])
    real = _resolver()
    found = [(sample.caption, _known_by(split.root, sample.image, real)) for sample in split.samples]
    rows = _rows_of(gallery, {key for _, keys in found for key in keys}, real)
    first = ((text, next((rows[key] for key in keys if key in rows), None)) for text, keys in found)
    kept = [(text, row) for text, row in first if row is not None]
    if not kept:
        raise DataError(
            f"none of the {len(found):,} validation pairs of {data} has its picture in the gallery {gallery.source}, "
            f"so the indexes cannot be compared: a picture there is known by {_known(gallery)}; leave --validation out "
            f"to compare by the gallery's captions"
        )
    if len(kept) < len(found):
        logger.info("%d of %d validation pairs have their picture in the gallery", len(kept), len(found))
    kept = kept[:: -(-len(kept) // MOST_PAIRS)]
    return Pairs([text for text, _ in kept], _cells(gallery.table["id"], [row for _, row in kept]), "validation")


def _known(gallery: "Gallery") -> str:
    return "its name below it, as in its items' file_name" if is_url(gallery.root) else "its file, or how its URL ends"


def _known_by(root: "ImageRoot", name: str, real: Callable[[str], str]) -> list[_Key]:
    """What the picture of a pair may be known by in a gallery: where it lies, then its names."""
    path, offset = root.locate(name)
    place = (real(str(path)), WHOLE_FILE if offset is None else offset)
    return [place, name] if offset is None else [place, f"{path.name}/{name}", name]


def _rows_of(gallery: "Gallery", wanted: set[_Key], real: Callable[[str], str]) -> dict[_Key, int]:
    """The rows of pictures: on this machine by the file that holds them and where they begin in it, elsewhere by name.

    A name that several pictures have is nobody's; a whole name goes before the end of one.
    """
    depths = sorted({key.count("/") for key in wanted if isinstance(key, str)}, reverse=True)
    places, names, ends = dict[_Key, int](), dict[_Key, int](), dict[_Key, int]()
    row = 0
    for batch in gallery.table.select(["location", "offset", "name"]).to_batches():
        for location, offset, name in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            path = join_location(gallery.root, location).removeprefix(_HERE)
            if not is_url(path):
                if (key := (real(path), offset)) in wanted:
                    places[key] = row
            elif not is_url(name):
                _note(names, name, row, wanted)
            else:
                parts = name.partition("?")[0].split("/")
                for end in ("/".join(parts[-depth - 1 :]) for depth in depths):
                    _note(ends, end, row, wanted)
            row += 1
    by_name = {key: row for key, row in (ends | names).items() if row != _SEVERAL}
    return by_name | places


def _note(known: dict[_Key, int], name: str, row: int, wanted: set[_Key]) -> None:
    if name in wanted:
        known[name] = _SEVERAL if name in known else row


def _resolver() -> Callable[[str], str]:
    """Paths without symbolic links. Folders are looked up once, since a gallery has few of them and many pictures."""
    folder = cache(os.path.realpath)

    def real(path: str) -> str:
        above, name = os.path.split(path)
        place = os.path.join(folder(above), name)  # noqa: PTH118  a million times over
        return os.path.realpath(place) if os.path.islink(place) else place  # noqa: PTH114

    return real


def _cells(column: "pa.ChunkedArray", rows: list[int]) -> list[str]:
    """A few cells, one by one: `take` joins the chunks of text first, which takes long and fails at 2 GiB."""
    return [column[row].as_py() for row in rows]


def _captions(gallery: "Gallery") -> Pairs | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    captions = gallery.table["caption"].cast(pa.large_string())  # all that differ, in one array, may exceed 2 GiB
    counts = pc.value_counts(captions)
    once = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    rows = np.flatnonzero(pc.and_(pc.is_in(captions, once), pc.not_equal(captions, "")).to_numpy())
    if not len(rows):
        return None
    chosen = rows[:: -(-len(rows) // MOST_PAIRS)].tolist()
    return Pairs(_cells(captions, chosen), _cells(gallery.table["id"], chosen), "captions")


def uncompared(reason: str, margin: float) -> Verdict:
    """The verdict where nothing can be asked, which keeps nothing from being published."""
    return Verdict(True, False, reason, margin)


def compare(
    serving: Artifact,
    old: "Encoder",
    rebuilt: Artifact,
    new: "Encoder",
    pairs: Pairs | None,
    margin: float = RebuildOptions.margin,
) -> Verdict:
    """Ask both indexes; the rebuilt one passes when neither recall is lower by more than the margin.

    Args:
        old, new: the encoders of the two.
        margin: in recall, 0.02 are two points of a hundred.
    """
    if pairs is None:
        return uncompared("there are no captions and no validation pairs to compare by", margin)
    both = [
        (text, item_id)
        for text, item_id in zip(pairs.texts, pairs.ids, strict=True)
        if serving.row_of(item_id) is not None and rebuilt.row_of(item_id) is not None
    ]
    if not both:
        return uncompared("no picture of the pairs is in both indexes", margin)
    texts, ids = [text for text, _ in both], [item_id for _, item_id in both]
    served = _recalls(serving, old.encode_text(texts), ids, _shared(serving, rebuilt))
    found = _recalls(rebuilt, new.encode_text(texts), ids, _shared(rebuilt, serving))
    worse = falls(served, found, margin)
    told = ", ".join(f"{name} {served[name]:.3f} -> {found[name]:.3f}" for name in served)
    reason = f"{told} over {len(both):,} pairs, margin {margin:g}"
    return Verdict(not worse, True, reason, margin, len(both), pairs.source, served, found)


def _shared(artifact: Artifact, other: Artifact) -> NDArray[np.bool_] | None:
    """Which rows of an artifact are items of the other one too; None for all."""
    import pyarrow.compute as pc

    theirs = other.column("id").filter(other.live)
    mask: NDArray[np.bool_] = pc.is_in(artifact.column("id"), theirs).to_numpy() & artifact.live
    return None if mask.all() else mask


def _recalls(
    artifact: Artifact, vectors: NDArray[np.float32], ids: list[str], allowed: NDArray[np.bool_] | None
) -> dict[str, float]:
    rows = artifact.search(vectors, max(_RANKS), allowed)[1]
    wanted = np.array([artifact.row_of(item_id) for item_id in ids])
    hits = rows == wanted[:, None]
    return {f"recall_at_{k}": round(float(hits[:, :k].any(1).mean()), 4) for k in _RANKS}


def falls(served: Mapping[str, float], found: Mapping[str, float], margin: float) -> list[str]:
    """The recalls that are lower by more than the margin; 0.14 - 0.12 is 0.02 and a bit to a computer."""
    return [name for name in served if round(served[name] - found[name] - margin, 9) > 0]
