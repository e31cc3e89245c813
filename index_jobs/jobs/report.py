"""What is wrong with a gallery: near-duplicates, misfit captions, overlapping categories, and pictures far from all.

- Everything is computed from the vectors of the published version, a block at a time; only captions take a model.
- Neighbours are those that the index finds.
- The page shows the worst cases with thumbnails. A Parquet file beside it has every item, for embedding-atlas.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.images import sniff_format
from dcar_core.images.decoding import make_thumbnail
from dcar_core.images.workers import DecodeWorker
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import atomic_writer, write_bytes
from dcar_core.util.html import html_page
from index_jobs.encoding.decode import LIMITS
from index_jobs.jobs.update import live_gallery
from index_jobs.store.artifact import Artifact
from index_jobs.store.versions import open_current

_NEIGHBOURS = 10
_BLOCK = 2048
_SHOWN, _LEAST, _PICTURES = 24, 6, 6  # most and least cases of a kind, and pictures of a case
_SIDE = 128
_MIN_CATEGORY = 5  # items, below which a category's neighbours are chance
_OVERLAP = 0.3  # share of a category's neighbours in another one from which on they overlap
_FIT = 1.0  # least fit of a caption, whatever the others have
_FAR = 3.0  # robust standard deviations below the median
_STYLE = """
section { margin: 2.5rem 0; } .cases { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; }
.cases figure { flex-direction: column; align-items: flex-start; margin: 0; max-width: 100%; }
.cases div { display: flex; flex-wrap: wrap; gap: .3rem; }
.cases img { width: 112px; height: 112px; border-radius: 8px; }
figcaption { max-width: 15rem; overflow-wrap: anywhere; } h2 small { font-weight: 400; opacity: .7; }
"""


@dataclass(frozen=True)
class Finding:
    """One kind of fault, and its worst cases: the rows of their pictures, and a text."""

    title: str
    note: str
    total: int
    cases: list[tuple[list[int], str]]


class _Gallery:
    """The items of a version that can be found, numbered from 0, and what their vectors say of them.

    Scores are NaN where there is nothing to compare.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.rows = artifact, np.flatnonzero(artifact.live)
        table = live_gallery(artifact).table
        columns = {"id": "id", "caption": "caption", "category": "category", "path": "location"}
        self.columns = {name: table[column].to_pylist() for name, column in columns.items()}
        names, self.categories = np.unique(np.array(self.columns["category"], object).astype(str), return_inverse=True)
        self.names: list[str] = names.tolist()
        self.sizes = np.bincount(self.categories, minlength=len(names))
        self.sizes[names == ""] = 0
        self.k = min(_NEIGHBOURS, len(self.rows) - 1)
        self.near, self.cosines = self._neighbours()

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, label: str = "") -> Iterator[tuple[slice, Floats]]:
        """Yield the vectors, float32 (m, E) at a time; label: of a progress bar."""
        with progress_bar(len(self), label, " images", is_shown=bool(label)) as bar:
            for start in range(0, len(self), _BLOCK):
                rows = self.rows[start : start + _BLOCK]
                yield slice(start, start + len(rows)), self.artifact.vectors(rows)
                bar.update(len(rows))

    def _neighbours(self) -> tuple[Rows, Floats]:
        """Return the nearest items of each, int64 (n, k), -1 where fewer are found, and their cosines, else NaN."""
        near, cosines = np.empty((len(self), self.k), np.int64), np.empty((len(self), self.k), np.float32)
        for part, vectors in self.blocks("neighbours"):
            scores, rows = self.artifact.search(vectors, self.k + 1)
            others = np.argsort(rows == self.rows[part, None], axis=1, kind="stable")[:, : self.k]
            rows, scores = np.take_along_axis(rows, others, 1), np.take_along_axis(scores, others, 1)
            near[part] = np.where(rows < 0, -1, np.searchsorted(self.rows, rows))
            cosines[part] = np.where(rows < 0, np.nan, scores)
        return near, cosines

    @cached_property
    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean (E,) and covariance (E, E) of the vectors."""
        dim = self.artifact.manifest.dim
        total, products = np.zeros(dim), np.zeros((dim, dim))
        for _, vectors in self.blocks():
            total += vectors.sum(0, dtype=np.float64)
            products += vectors.T @ vectors
        mean = total / len(self)
        return mean, products / len(self) - np.outer(mean, mean)

    @cached_property
    def far(self) -> Floats:
        """Mean cosine of each item to its neighbours."""
        counts = np.maximum((self.near >= 0).sum(1), 1)
        means: Floats = (np.nansum(self.cosines, axis=1) / counts).astype(np.float32)
        return means

    @cached_property
    def strangers(self) -> Floats:
        """Share of the neighbours of each item that have another category."""
        known = (self.near >= 0) & (self.sizes[self.categories] > 0)[:, None]
        other = known & (self.categories[self.near] != self.categories[:, None])
        share = other.sum(1) / np.maximum(known.sum(1), 1)
        return np.where(known.any(1), share, np.nan).astype(np.float32)

    def duplicate_groups(self, threshold: float) -> Rows:
        """Return the number of each item's group, its first item; items that are near one item are in one group."""
        first, column = np.nonzero(self.cosines >= threshold)
        second, groups = self.near[first, column], np.arange(len(self))
        while True:
            before, lower = groups.copy(), np.minimum(groups[first], groups[second])
            np.minimum.at(groups, first, lower)
            np.minimum.at(groups, second, lower)
            groups = groups[groups]
            if (groups == before).all():
                return groups

    def fit_captions(self, encoder: Encoder | None) -> tuple[Floats, Floats]:
        """Return the cosine of each caption and its picture, and its distance above the mean in deviations."""
        cosines, fits = np.full((2, len(self)), np.nan, np.float32)
        if encoder is None:
            return cosines, fits
        mean, covariance = self.moments
        captions = self.columns["caption"]
        for part, vectors in self.blocks("captions"):
            with_caption = [i for i in range(part.start, part.stop) if captions[i]]
            if not with_caption:
                continue
            texts = encoder.encode_text([captions[i] for i in with_caption])
            cosines[with_caption] = (texts * vectors[np.array(with_caption) - part.start]).sum(1)
            spread = np.sqrt(np.maximum(((texts @ covariance) * texts).sum(1), 1e-12))
            fits[with_caption] = (cosines[with_caption] - texts @ mean) / spread
        return cosines, fits

    def name(self, position: int) -> str:
        """Return the name of an item's file in its gallery, or else its id."""
        item = self.artifact.item(int(self.rows[position]))
        return str(item.metadata.get("file_name") or item.id)


def write_report(index: Path, out: Path, *, threshold: float = 0.95, device: str = "auto") -> list[Finding]:
    """Write the page to `out`, and the Parquet file beside it, and return what was found.

    Args:
        threshold: cosine from which on two pictures are near-duplicates.
        device: of the encoder, for captions.

    Raises:
        ArtifactError: nothing is published, or its vectors cannot be read.
        DataError: the index has one picture only, or `out` does not end in .html.
    """
    if out.suffix != ".html":
        raise DataError(f"--out {out}: the page is HTML; give a name that ends in .html")
    artifact = open_current(index)
    if artifact.manifest.count < 2:
        raise DataError(f"{index} has one picture, and a report compares several")
    gallery = _Gallery(artifact)
    encoder = Encoder.load(artifact.checkpoint, device=device) if any(gallery.columns["caption"]) else None
    groups, (cosines, fits) = gallery.duplicate_groups(threshold), gallery.fit_captions(encoder)
    findings = [
        _duplicates(gallery, groups, threshold), _captions(gallery, cosines, fits), _overlaps(gallery), _far(gallery)
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_items(gallery, out.with_suffix(".parquet"), {
        "duplicate_group": groups, "nearest_cosine": gallery.cosines[:, 0], "neighbours_cosine": gallery.far,
        "other_category": gallery.strangers, "caption_cosine": cosines, "caption_fit": fits,
    })  # fmt: skip
    write_bytes(out, _page(gallery, findings).encode())
    return findings


def _duplicates(gallery: _Gallery, groups: Rows, threshold: float) -> Finding:
    sizes = np.bincount(groups, minlength=len(groups))
    nearest = np.nan_to_num(gallery.cosines[:, 0], nan=-1)
    order = sorted(np.flatnonzero(sizes > 1).tolist(), key=lambda group: -nearest[group])
    cases = []
    for group in order[:_SHOWN]:
        members = np.flatnonzero(groups == group).tolist()
        more = f", and {len(members) - 2:,} more" if len(members) > 2 else ""
        names = " and ".join(map(gallery.name, members[:2]))
        cases.append((members, f"{names}{more}: cosine {nearest[group]:.3f}"))
    note = f"Groups of pictures whose vectors have a cosine of at least {threshold:g}, the nearest first."
    return Finding("Near-duplicates", note, len(order), cases)


def _captions(gallery: _Gallery, cosines: Floats, fits: Floats) -> Finding:
    known = fits[np.isfinite(fits)]
    limit = max(_FIT, _low_limit(known)) if len(known) else _FIT
    total = int((known < limit).sum())
    order = np.argsort(fits)[: min(len(known), max(total, _LEAST))].tolist()
    cases = [
        (
            [i],
            f"“{gallery.columns['caption'][i][:200]}” of {gallery.name(i)}: fit {fits[i]:.1f}, cosine {cosines[i]:.3f}",
        )
        for i in order[:_SHOWN]
    ]
    note = (
        "The fit of a caption is how much nearer it is to its picture than to an average one, in standard deviations; "
        f"below {limit:.1f} it is far from that of the others. The lowest come first."
    )
    return Finding("Captions that do not fit", note, total, cases)


def _overlaps(gallery: _Gallery) -> Finding:
    sizes, count = gallery.sizes, len(gallery.names)
    pairs = gallery.categories[:, None] * count + gallery.categories[gallery.near]
    pairs[gallery.near < 0] = -1
    keys, found = np.unique(pairs[pairs >= 0], return_counts=True)
    ours, theirs = keys // count, keys % count
    share = found / np.maximum(gallery.k * sizes[ours], 1)
    is_case = (ours != theirs) & (sizes[ours] >= _MIN_CATEGORY) & (sizes[theirs] > 0) & (share >= _OVERLAP)
    order = np.flatnonzero(is_case)[np.argsort(-share[is_case], kind="stable")]
    cases = []
    for case in order[: _SHOWN // 2].tolist():
        hits = (pairs == keys[case]).sum(1)
        examples = np.argsort(-hits, kind="stable")[: _PICTURES // 2].tolist()
        near = [int(j) for i in examples for j in gallery.near[i] if gallery.categories[j] == theirs[case]]
        text = f"{gallery.names[ours[case]]}: {share[case]:.0%} of the neighbours are {gallery.names[theirs[case]]}"
        cases.append(([*examples, *dict.fromkeys(near)][:_PICTURES], text))
    note = (
        f"Categories whose nearest {gallery.k} pictures have one other category in at least {_OVERLAP:.0%} of cases: "
        "the two are one, hard to tell apart, or mixed up."
    )
    return Finding("Categories that overlap", note, len(order), cases)


def _far(gallery: _Gallery) -> Finding:
    far, limit = gallery.far, _low_limit(gallery.far)
    total = int((far < limit).sum())
    order = np.argsort(far)[: max(total, _LEAST)].tolist()
    cases = [([i], f"{gallery.name(i)}: mean cosine {far[i]:.3f}") for i in order[:_SHOWN]]
    note = f"Pictures whose mean cosine to their nearest {gallery.k} is below {limit:.3f}. The lowest come first."
    return Finding("Pictures far from all", note, total, cases)


def _low_limit(values: Floats) -> float:
    """Return the value below which a few are far from the others."""
    middle = np.median(values)
    return float(middle - _FAR * 1.4826 * np.median(np.abs(values - middle)))


def _write_items(gallery: _Gallery, path: Path, scores: dict[str, Floats | Rows]) -> None:
    """Write a row for each item, with a projection on the two main components."""
    mean, covariance = gallery.moments
    axes = np.linalg.eigh(covariance)[1][:, :-3:-1]
    writer = None
    with atomic_writer(path) as file:
        for part, vectors in gallery.blocks():
            x, y = ((vectors - mean) @ axes).T.astype(np.float32)
            flat = pa.array(vectors.reshape(-1), pa.float32())
            table = pa.table(
                {name: values[part] for name, values in gallery.columns.items()}
                | {name: pa.array(values[part], from_pandas=True) for name, values in scores.items()}
                | {"x": x, "y": y, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
            )
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _page(gallery: _Gallery, findings: list[Finding]) -> str:
    worker, parts = DecodeWorker(), list[str]()
    try:
        for finding in findings:
            figures = ""
            for positions, text in finding.cases:
                images = "".join(_image(gallery, worker, position) for position in positions[:_PICTURES])
                figures += f"<figure><div>{images}</div><figcaption>{escape(text)}</figcaption></figure>"
            title = f"{escape(finding.title)} <small>{finding.total:,}</small>"
            parts.append(
                f"<section><h2>{title}</h2><p>{escape(finding.note)}</p><div class=cases>{figures}</div></section>"
            )
    finally:
        worker.close()
    manifest = gallery.artifact.manifest
    about = f"<p>{len(gallery):,} pictures of version {manifest.version}, {escape(manifest.created)}.</p>"
    return html_page(f"Report on {Path(manifest.spec.gallery).name}", about + "".join(parts), _STYLE)


def _image(gallery: _Gallery, worker: DecodeWorker, position: int) -> str:
    """Return a thumbnail, or the name of an image that cannot be read."""
    name = escape(gallery.name(position))
    try:
        data = gallery.artifact.image_bytes(int(gallery.rows[position]))
        small = worker.run(partial(make_thumbnail, side=_SIDE, thumbnail_format="jpeg"), data, LIMITS).result
    except DcarError:  # gone since the build
        return f"<span>{name}</span>"
    source = f"data:image/{sniff_format(small)};base64,{base64.b64encode(small).decode()}"
    return f'<img src="{source}" alt="{name}" title="{name}" loading="lazy">'
