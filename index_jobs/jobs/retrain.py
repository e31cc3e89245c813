"""Retraining on pairs of texts and items, such as clicks: `dcar retrain`.

- Only the adapter of text features is tuned [ours], so the vectors of the items stay,
  and the new version shares all files with the served one except its checkpoint.
- A hash divides the texts: eight tenths are learned from, and two choose how far to go
  from the served adapter (WiSE-FT). Each tenth is compared at the share that the other
  one chose [ours], so none judges its own choice.
- Pairs with a relevance are clicks. Those without one, such as captions, stand for the
  words that nobody has clicked yet; together they weigh as much as the clicks [ours].
  If no pair has a relevance, all are alike.
- Only what was shown can have been clicked, so held-out clicks compare two models by
  the place of each item among those that were skipped for its text (Sakai's condensed
  lists). Others are compared with the first ten of the served model.
- A candidate is refused if it does not order the held-out pairs better, or if it loses
  more than the margin on the clicks among them, or on the anchors: validation pairs, or
  without any the captions of the items.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dcar_core.data.records import (
    IMAGE_COLUMNS,
    RECORD_SUFFIXES,
    label_text,
    read_records,
    required_text,
    texts_of,
)
from dcar_core.data.samples import fold_text
from dcar_core.encoder.encoder import (
    Encoder,
    add_portable_export,
    has_started_portable,
    load_exact,
)
from dcar_core.encoder.exports import copy_portable
from dcar_core.encoder.graphs import adapter_arrays
from dcar_core.encoder.runtimes import PROBE_TEXTS
from dcar_core.model.checkpoint import (
    PORTABLE,
    Trainables,
    read_config,
    read_trainables,
    write_checkpoint,
)
from dcar_core.model.config import ModelConfig
from dcar_core.model.dcar import FeatureAdapter
from dcar_core.training.hard_negatives import NEAREST, interpolate, learn
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import DataError, GateError
from dcar_core.util.files import hash_json, write_json
from dcar_core.util.metrics import TIE_TOLERANCE
from index_jobs.gallery.locations import WHOLE_FILE, open_location
from index_jobs.gallery.scan import Gallery
from index_jobs.index import versions
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.manifest import CHECKPOINT, quantity
from index_jobs.index.versions import open_current
from index_jobs.jobs import gate
from index_jobs.jobs.update import live_gallery
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

REPORT = "retrain.json"
MIN_HELD_OUT = 20  # texts with clicks in each held-out tenth
EPOCHS = 10
# evenly spread; each brings the vectors of its negatives into memory
MAX_PAIRS = 20_000
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the change; the first wins a tie
# a text, the row of its item, and its relevance, if any
_Pair = tuple[str, int, float | None]
_SEED = 0
_ADAPTER = "text_adapter."  # before the names of its weights in a checkpoint
_SHOWN = 10  # items of a page of results
_MOST_SKIPPED = 50  # items of a text, whose vectors are in memory


@dataclass(frozen=True)
class ItemPairs:
    """Texts, the rows of their items, int64 (N,), and what they count, float32 (N,).

    skipped: by folded text, the rows of wrong items.
    """

    texts: list[str]
    rows: Rows
    weights: Floats
    skipped: Mapping[str, set[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Sequence[_Pair], skipped: Mapping[str, set[int]]) -> "ItemPairs":
        weights = np.array(
            [1 if weight is None else weight for _, _, weight in pairs], np.float32
        )
        return cls(
            [text for text, _, _ in pairs],
            np.array([row for _, row, _ in pairs], np.int64),
            weights,
            skipped,
        )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: Rows) -> "ItemPairs":
        texts = [self.texts[position] for position in positions.tolist()]
        return ItemPairs(
            texts,
            self.rows[positions],
            self.weights[positions],
            self.skipped,
        )

    def comparable(self) -> "ItemPairs":
        """Return the pairs of texts with skipped items, if any text has some."""
        known = [
            not self.skipped or fold_text(text) in self.skipped for text in self.texts
        ]
        return self.take(np.flatnonzero(known))

    def with_captions(self, captions: "ItemPairs") -> "ItemPairs":
        """Return these pairs with captions of the same total weight."""
        weight = self.weights.sum() / max(len(captions), 1)
        weights = np.concatenate(
            [self.weights, np.full(len(captions), weight, np.float32)]
        )
        rows = np.concatenate([self.rows, captions.rows])
        return ItemPairs(self.texts + captions.texts, rows, weights, self.skipped)

    def divide(self) -> tuple["ItemPairs", "ItemPairs", "ItemPairs"]:
        """Return the pairs to learn from, and two tenths that are held out, by a hash
        of the text.
        """
        digests = (
            hashlib.sha256(fold_text(text).encode()).digest() for text in self.texts
        )
        tenths = np.array(
            [int.from_bytes(digest[:4]) % 10 for digest in digests], np.int64
        )
        learned, one, other = (
            self.take(np.flatnonzero(chosen))
            for chosen in (tenths > 1, tenths == 0, tenths == 1)
        )
        return learned, one, other


@dataclass(frozen=True, kw_only=True)
class RetrainSummary:
    """Result of a retraining, as in `retrain.json`."""

    version: int  # the new one, or the one that stays published
    published: bool = False
    reason: str
    pairs: int  # learned from
    # learned from as well: pairs without a relevance, beside others with one
    captions: int = 0
    unknown: int  # pairs whose item is not in the index
    share: float = 0.0  # of the change
    # `GateVerdict`s on held-out pairs and on anchors
    gate: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_text(self) -> str:
        """Return the summary as a few lines for people."""
        lines = [
            (
                f"version {self.version} {'' if self.published else 'stays '}published:"
                f" {self.reason}"
            ),
            (
                f"learned from {self.pairs:,} pairs and {self.captions:,} captions,"
                f" {self.share:.0%} of the change taken"
            ),
            f"left out: {self.unknown:,} pairs whose item is not in the index",
            *(
                f"compared by {name}: {verdict['reason']}"
                for name, verdict in self.gate.items()
            ),
            f"after {self.seconds:.1f} s",
        ]
        return "\n".join(lines)


def retrain(
    index: Path,
    files: Sequence[Path],
    *,
    validation: Path | None = None,
    margin: float = BuildOptions.margin,
    device: str = "auto",
) -> RetrainSummary:
    """Tune the served model on pairs, and publish a version with it if it ranks better.

    Args:
        files: tables with the columns caption and id or image, or directories with
            pairs.jsonl.
        validation, margin: as in `BuildOptions`. device: auto, cpu, cuda, cuda:1 or
            mps.

    Raises:
        DataError: a file cannot be read, and the message names line and field; or there
            are too few pairs.
        GateError: the candidate is not published; `retrain.json` in the index has its
            figures.
    """
    start = time.perf_counter()
    with versions.report_os_errors(index), versions.new_version(index) as new:
        run = Retraining(index, open_current(index), device)
        summary = run.compare(files, validation, margin)
        if summary.published:
            summary = replace(summary, version=run.publish(new, summary))
        summary = replace(summary, seconds=round(time.perf_counter() - start, 1))
        if summary.gate:
            write_json(index / REPORT, asdict(summary))
    if summary.gate and not summary.published:
        raise GateError(
            f"not published: {summary.reason}; {index / REPORT} has the figures"
        )
    return summary


def read_pairs(
    files: Sequence[Path],
    served: IndexVersion,
    gallery: Gallery,
) -> tuple[ItemPairs, ItemPairs, int]:
    """Return the distinct pairs of items in the index, the captions, and the number of
    pairs of other items.

    Captions are pairs without a relevance, if others have one.
    An item is known by its id, or by its image's location or name in the gallery.
    """
    names, locations, offsets = (
        gallery.table[name].to_pylist() for name in ("name", "location", "offset")
    )
    live_rows = np.flatnonzero(served.live).tolist()
    by_name = dict(zip(names, live_rows, strict=True))
    items = zip(locations, offsets, live_rows, strict=True)
    by_name |= {
        location: row for location, offset, row in items if offset == WHOLE_FILE
    }
    pairs = dict[tuple[str, int], _Pair]()
    skipped = dict[str, set[int]]()
    unknown = 0
    for file in [path / "pairs.jsonl" if path.is_dir() else path for path in files]:
        if not file.is_file() or file.suffix.lower() not in RECORD_SUFFIXES:
            kinds = ", ".join(sorted(RECORD_SUFFIXES))
            raise DataError(
                f"{file} is not a table of pairs ({kinds}); `dcar feedback export`"
                " writes pairs.jsonl"
            )
        for line, row in read_records(str(file), partial(open_location, str(file))):
            where = f"{file}, line {line}"
            text = required_text(row, where, "caption")
            item_id = label_text(row, where, "id")
            weight = _weight(row, where)
            image = next((name for name in IMAGE_COLUMNS if row.get(name)), "image")
            if item_id:
                number = served.row_of(item_id)
            else:
                number = by_name.get(required_text(row, where, image))
            if number is None:
                unknown += 1
                continue
            for wrong in texts_of(row, where, "negatives"):
                skipped.setdefault(fold_text(wrong), set()).add(number)
            pairs.setdefault((fold_text(text), number), (text, number, weight))
    clicked = {text for (text, _), pair in pairs.items() if pair[2] is not None}
    skipped = {text: rows for text, rows in skipped.items() if text in clicked}
    kept = [*pairs.values()][:: -(-len(pairs) // MAX_PAIRS) or 1]
    clicks, captions = (
        [pair for pair in kept if (pair[2] is None) == is_caption]
        for is_caption in (False, True)
    )
    if not clicks:
        clicks, captions = captions, clicks
    return ItemPairs.of(clicks, skipped), ItemPairs.of(captions, skipped), unknown


def _weight(row: Mapping[str, Any], where: str) -> float | None:
    if (value := row.get("relevance")) in (None, ""):
        return None
    with suppress(TypeError, ValueError):
        if 0 < float(value) <= 1:
            return float(value)
    raise DataError(
        f"{where}: field 'relevance' must be a number above 0 and at most 1, not"
        f" {value!r}"
    )


@dataclass(frozen=True)
class _Texts:
    """Encodes texts by their features before the adapter, and an adapter."""

    features: Callable[[Sequence[str]], torch.Tensor]
    adapter: FeatureAdapter

    def encode_text(self, texts: Sequence[str], /) -> Floats:
        with torch.inference_mode():
            vectors: Floats = self.adapter(self.features(texts)).numpy()
        return vectors


class Retraining:
    """One retraining of a served version: `compare`, then `publish`."""

    def __init__(self, index: Path, served: IndexVersion, device: str) -> None:
        self.index = index
        self.served = served
        self.live = np.flatnonzero(served.live)
        self.encoder = load_exact(served.checkpoint, device)
        served.require(self.encoder.fingerprint)
        self.notes = dict(read_config(served.checkpoint).get("training", {}))
        self.trainables = read_trainables(served.checkpoint)
        adapter = _text_adapter(self.trainables, self.encoder.dim)
        self.before, self.after = (
            _Texts(self._features, own) for own in (deepcopy(adapter), adapter)
        )
        bare = replace(self.encoder.state, text_adapter=None)
        self._bare = Encoder(bare, None, self.encoder.runtime)
        self._known = dict[str, Floats]()
        self.cutoff = served.manifest.cutoff

    def _features(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the features of texts before the adapter, (n, E). Each text is encoded
        once.
        """
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known.update(zip(new, self._bare.encode_text(new), strict=True))
        return torch.from_numpy(np.stack([self._known[text] for text in texts]))

    def compare(
        self,
        files: Sequence[Path],
        validation: Path | None,
        margin: float,
    ) -> RetrainSummary:
        """Learn, and compare with the served model; the summary says whether to
        publish.
        """
        served = self.served
        gallery = live_gallery(self.served)
        pairs, captions, unknown = read_pairs(files, served, gallery)
        (clicked, *compared), (captions, *held_captions) = (
            pairs.divide(),
            captions.divide(),
        )
        compared = [tenth.comparable() for tenth in compared]
        if (few := min(len({*tenth.texts}) for tenth in compared)) < MIN_HELD_OUT:
            wanted = "click on an item" + (
                " after skipped ones" if pairs.skipped else ""
            )
            raise DataError(
                f"{', '.join(map(str, files))}: {len({*pairs.comparable().texts}):,}"
                f" texts with a {wanted} of the index are too few; collect about"
                f" {10 * (MIN_HELD_OUT - few):,} more: two tenths compare the models,"
                f" and each needs {MIN_HELD_OUT}, not {few}"
            )
        learned = clicked.with_captions(captions)
        held = [
            tenth.with_captions(others)
            for tenth, others in zip(compared, held_captions, strict=True)
        ]
        signature = hash_json(
            [
                [part.texts, part.rows.tolist(), part.weights.tolist()]
                for part in (pairs, learned)
            ]
        )
        summary = RetrainSummary(
            version=served.manifest.version,
            reason="its model has learned from these pairs",
            pairs=len(clicked),
            captions=len(captions),
            unknown=unknown,
        )
        if self.notes.get("retrained", {}).get("pairs") == signature:
            return summary
        anchors = gate.find_pairs(gallery, validation)
        rows = self.live[anchors.rows] if anchors else np.empty(0, np.int64)
        anchored = ItemPairs(
            anchors.texts if anchors else [],
            rows,
            np.ones(len(rows), np.float32),
        )
        self._features(
            [text for part in (learned, *held, anchored) for text in part.texts]
        )
        self._learn(learned)
        share, verdict = self.choose(held, anchored, margin)
        verdicts = {"held-out pairs": verdict}
        before, after = (
            (served, encoder.encode_text) for encoder in (self.before, self.after)
        )
        if anchors:
            verdicts[anchors.source] = gate.compare(before, after, anchors, margin)
        if validation and "pairs" in self.cutoff:
            self.cutoff = gate.cutoff_of_pairs(
                served,
                self.after.encode_text(anchored.texts),
                rows,
            )
        elif self.cutoff:
            calibration = gate.calibrate_by_words(
                served.parts[0].vectors, self.after.encode_text
            )
            self.cutoff = calibration.get("cutoff", self.cutoff)
        failed = next(
            (name for name, verdict in verdicts.items() if not verdict.passed),
            "held-out pairs",
        )
        lineage = [
            *self.notes.get("retrained", {}).get("from", ()),
            self.encoder.fingerprint,
        ]
        self.notes["retrained"] = {"pairs": signature, "from": lineage, "share": share}
        return replace(
            summary,
            published=all(verdict.passed for verdict in verdicts.values()),
            share=share,
            reason=f"by {failed}, {verdicts[failed].reason}",
            gate={name: asdict(verdict) for name, verdict in verdicts.items()},
        )

    def _learn(self, learned: ItemPairs) -> None:
        features = self._features(learned.texts)
        adapter = self.after.adapter
        shown, places = np.unique(
            np.concatenate([learned.rows[:, None], self._nearest_wrong(learned)], 1),
            return_inverse=True,
        )
        rows, images, weights = (
            torch.from_numpy(array)
            for array in (
                places.reshape(len(learned), -1),
                self.served.vectors(shown),
                learned.weights,
            )
        )
        threads = torch.get_num_threads()
        # for small products, where several would mostly wait for each other
        torch.set_num_threads(1)
        learn(
            (adapter, nn.Identity()),
            (features, images),
            rows[:, 0],
            rows[:, 1:],
            self.encoder.state.scale,
            _SEED,
            weights=weights / weights.mean(),
            epochs=EPOCHS,
        )
        torch.set_num_threads(threads)

    def choose(
        self,
        held: Sequence[ItemPairs],
        anchors: ItemPairs,
        margin: float,
    ) -> tuple[float, gate.GateVerdict]:
        """Keep a share of the change, and return it with the comparison by the held-out
        pairs.

        Allowed are shares with which the anchors lose no more than the margin.
        """
        adapter = self.after.adapter
        tuned = deepcopy(self.after.adapter)
        measures = [self.measure(pairs) for pairs in (*held, anchors) if len(pairs)]
        # of each held-out tenth, and of the anchors
        gains = dict[float, list[Floats]]()
        for share in SHARES:
            interpolate((adapter,), (self.before.adapter,), (tuned,), share)
            gains[share] = [measure(self.after) for measure in measures]
        least = [gain.mean() - margin for gain in gains[0.0][2:]]
        kept = [
            share
            for share in SHARES
            if least <= [gain.mean() for gain in gains[share][2:]]
        ]

        def total(tenths: Sequence[int]) -> Callable[[float], float]:
            return lambda share: sum(
                float(gains[share][tenth] @ held[tenth].weights) for tenth in tenths
            )

        share, one, other = (
            max(kept, key=total(tenths)) for tenths in ((0, 1), (0,), (1,))
        )
        interpolate((adapter,), (self.before.adapter,), (tuned,), share)
        before = np.concatenate(gains[0.0][:2])
        after = np.concatenate([gains[other][0], gains[one][1]])
        verdict = self.compare_held_out(held, before, after, margin)
        return share, replace(verdict, passed=verdict.passed and share > 0)

    def _nearest_wrong(self, pairs: ItemPairs) -> Rows:
        """Return the rows that the index ranks highest for each text, without those of
        its pairs: (N, m).
        """
        right = dict[str, set[int]]()
        for text, row in zip(pairs.texts, pairs.rows.tolist(), strict=True):
            right.setdefault(fold_text(text), set()).add(row)
        most = max(map(len, right.values()))
        count = min(NEAREST, len(self.live) - most)
        if count < 1:
            raise DataError(
                "a text has every item of the index; there is nothing to tell apart"
            )
        nearest = self.served.search(
            self.before.encode_text(pairs.texts), count + most
        )[1].tolist()
        wrong = [
            [row for row in rows if row >= 0 and row not in right[fold_text(text)]][
                :count
            ]
            for text, rows in zip(pairs.texts, nearest, strict=True)
        ]
        # a filtered graph may find fewer
        return np.array([(rows * count)[:count] for rows in wrong], np.int64)

    def measure(self, pairs: ItemPairs) -> Callable[[_Texts], Floats]:
        """Return a function of encoders: the nDCG of each pair's item, (N,), among it
        and the items to compare.
        """
        first = self.served.search(self.before.encode_text(pairs.texts), _SHOWN)[
            1
        ].tolist()
        skipped = [
            sorted(pairs.skipped.get(fold_text(text), ()))[:_MOST_SKIPPED]
            for text in pairs.texts
        ]
        others = [own or rows for own, rows in zip(skipped, first, strict=True)]
        width = max(map(len, others))
        # [N, width]
        padded = np.array(
            [rows + [-1] * (width - len(rows)) for rows in others], np.int64
        )
        rows = np.where(padded < 0, pairs.rows[:, None], padded)
        shown, places = np.unique(
            np.concatenate([pairs.rows[:, None], rows], 1), return_inverse=True
        )
        items = self.served.vectors(shown)
        places = places.reshape(len(pairs), -1)

        def gains(texts: _Texts) -> Floats:
            scores = np.einsum(
                "ne,nke->nk",
                texts.encode_text(pairs.texts),
                items[places],
            )
            above = (scores[:, 1:] > scores[:, :1] + TIE_TOLERANCE).sum(1)
            values: Floats = (1 / np.log2(2 + above)).astype(np.float32)
            return values

        return gains

    @staticmethod
    def compare_held_out(
        held: Sequence[ItemPairs],
        before: Floats,
        after: Floats,
        margin: float,
    ) -> gate.GateVerdict:
        """Compare both models by held-out pairs; the new one passes if it is better."""
        texts = [fold_text(text) for tenth in held for text in tenth.texts]
        skipped = held[0].skipped
        is_click = np.array([not skipped or text in skipped for text in texts])
        weights = np.concatenate([tenth.weights for tenth in held])
        compared = gate.compare_gains(before, after, texts, weights)
        serving, rebuilt = (
            {"ndcg": round(float(np.average(gains, weights=weights)), 4)}
            for gains in (before, after)
        )
        of_clicks = float(
            np.average((after - before)[is_click], weights=weights[is_click])
        )
        if is_click.all():
            alone = ""
        else:
            alone = f"; of the {is_click.sum():,} clicks alone {100 * of_clicks:+.1f}"
        reason = (
            f"nDCG {100 * serving['ndcg']:.1f} -> {100 * rebuilt['ndcg']:.1f} over"
            f" {len(texts):,} pairs: {compared.gain.points()}{alone}"
        )
        verdict = gate.verdict_of(
            compared,
            reason,
            margin,
            pairs=len(texts),
            pool=_SHOWN,
            source="held-out pairs",
            serving=serving,
            rebuilt=rebuilt,
        )
        is_better = (verdict.difference or {})["value"] > 0
        return replace(verdict, passed=is_better and of_clicks >= -margin)

    def publish(self, new: versions.NewVersion, summary: RetrainSummary) -> int:
        """Publish the served version with the tuned model, and return its number."""
        served = self.served
        adapter = self.after.adapter
        made = new.folder / CHECKPOINT
        content = read_config(served.checkpoint)
        config = ModelConfig.from_dict(content["model"])
        config = replace(config, adapter=replace(config.adapter, text=True))
        trainables = self.trainables | {
            f"{_ADAPTER}{name}": p.numpy() for name, p in adapter.state_dict().items()
        }
        fingerprint = write_checkpoint(
            made,
            content["backbone"],
            config,
            trainables,
            self.notes,
        )
        if has_started_portable(self.encoder, served.checkpoint):
            state = replace(
                self.encoder.state,
                fingerprint=fingerprint,
                text_adapter=adapter_arrays(adapter),
            )
            copy_portable(
                served.checkpoint,
                made,
                state,
                self.after.encode_text(PROBE_TEXTS),
            )
        elif (served.checkpoint / PORTABLE).is_dir():
            add_portable_export(made, self.encoder.backbone)
        new.link(served, without=(f"{CHECKPOINT}/",))
        gain = 100 * summary.gate["held-out pairs"]["difference"]["value"]
        manifest = replace(
            served.manifest,
            spec=replace(served.manifest.spec, fingerprint=fingerprint),
            cutoff=self.cutoff,
            origin="",
            change=(
                f"model retrained on {quantity(summary.pairs, 'pair')}: nDCG of others"
                f" {gain:+.1f} points"
            ),
        )
        manifest = new.publish(manifest)
        return manifest.version


def _text_adapter(trainables: Trainables, width: int) -> FeatureAdapter:
    torch.manual_seed(_SEED)
    adapter = FeatureAdapter(width)
    own = {
        name.removeprefix(_ADAPTER): torch.from_numpy(tensor)
        for name, tensor in trainables.items()
    }
    adapter.load_state_dict(
        {name: own.get(name, tensor) for name, tensor in adapter.state_dict().items()}
    )
    return adapter.eval()
