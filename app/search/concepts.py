"""What the taught names of an index mean in one version of it.

- A name is written `@name` at the start of a word. It stands for the direction (E,) in
  which its examples differ from the gallery: the weights of a linear discriminant whose
  covariance is shrunk, as in Wang et al., "A Hard-to-Beat Baseline for Training-free
  CLIP-based Adaptation" (2024), but against the gallery instead of other classes
  [ours].
- An item is a member of a name if it is an example, or if it is like the examples:
  after whitening by the gallery's covariance, shrunk far less, its cosine to their mean
  is high. That admits fewer strangers than the direction.
- All of it follows from the ids, so another version or model needs no teaching. It is
  computed when first needed.
"""

import difflib
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import takewhile
from threading import Lock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.search.errors import InvalidQueryError, ItemNotFoundError
from dcar_core.encoder.state import normalize
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import ArtifactError, DataError, shorten
from index_jobs.index.concepts import Concept, drop_concept, put_concept, read_concepts
from index_jobs.index.index_version import IndexVersion
from index_jobs.row_filter import NO_ROWS

logger = logging.getLogger(__name__)

FIELD = "concept"  # the field of lists of names
MAX_NAME = 64
MAX_IDS = 200
_TOKEN = re.compile(r"(?<!\S)@(\S+)")
# rows that are searched for members before all are compared; a large search takes
# longer than that
_NEAREST = 1024
_SAMPLE = 4096  # rows that show what the gallery is like
# of the way from the gallery's median to 1, below which the direction finds no members
_SHARE = 0.45
# cosine at which members begin; the second is added, divided by the examples
_LIKENESS = 0.69
_ONE_EXAMPLE = 0.1
# of what sets examples apart from the gallery; below it they are all that there is
_MIN_LENGTH = 1e-3
_DIGITS = 6  # of scores, as in responses


class TaughtConcept(TypedDict):
    """A taught name. examples: count of `ids` in the index. cutoff: score that as many
    items reach as are members.
    """

    name: str
    kind: str
    examples: int
    members: int
    cutoff: float
    ids: list[str]
    not_ids: list[str]


@dataclass(frozen=True, eq=False)
class Learned:
    """A name in one version. examples: number of rows. direction: of unit length, (E,).
    members: rows, ascending.
    """

    concept: Concept
    examples: int
    direction: Floats
    cutoff: float
    members: Rows

    def describe(self) -> TaughtConcept:
        own = self.concept
        return {
            "name": own.name,
            "kind": own.kind,
            "examples": self.examples,
            "members": len(self.members),
            "cutoff": self.cutoff,
            "ids": [*own.ids],
            "not_ids": [*own.not_ids],
        }


class Concepts:
    """The taught names in a version. Several threads may use it at once. vectors:
    returns those of rows.
    """

    def __init__(
        self,
        version: IndexVersion,
        vectors: Callable[[Rows], Floats],
    ) -> None:
        self.version = version
        self.revision = 0
        self._vectors = vectors
        self._lock = Lock()
        self._known = dict[str, Concept]()
        self._learned = dict[Concept, Learned]()

    def refresh(self) -> None:
        """Follow what was taught meanwhile, by this process or another one."""
        with self._lock:
            try:
                known = {
                    concept.name: concept
                    for concept in read_concepts(self.version.index)
                }
            except ArtifactError as error:
                logger.warning("the taught names cannot be read: %s", error)
                return
            if known != self._known:
                self._learned = {
                    own: learned
                    for own, learned in self._learned.items()
                    if own in known.values()
                }
                is_shown = known and FIELD not in self.version.stored_fields
                self.version.computed = (
                    {FIELD: cache(partial(self._column, [*known.values()]))}
                    if is_shown
                    else {}
                )
                self._known = known
                self.revision = self.revision + 1

    def teach(
        self,
        name: str,
        ids: Sequence[str],
        kind: str = "",
        not_ids: Sequence[str] = (),
    ) -> TaughtConcept:
        """Let a name stand for items like these, 1 to 200, in place of what it stood
        for, and return what it means.

        Args:
            kind: what it is, up to 64 characters; takes the place of the name in the
                text of a query.
            not_ids: items that are none, up to 200; members score higher than they.

        Raises:
            SearchError: a wrong argument, an unknown id, or an index without vectors.
            OSError: the disk is full.
        """
        name = unicodedata.normalize("NFC", name)
        kind = " ".join(kind.split())
        if not name or len(name) > MAX_NAME or _leading_name(name) != name:
            raise InvalidQueryError(
                "name", f"must be 1 to {MAX_NAME} letters, digits, '-' and '_'"
            )
        if len(kind) > MAX_NAME:
            raise InvalidQueryError(
                "kind", f"at most {MAX_NAME} characters, not {len(kind)}"
            )
        for field, chosen in (("ids", ids), ("not_ids", not_ids)):
            if len(chosen) > MAX_IDS or (field == "ids" and not chosen):
                raise InvalidQueryError(field, f"takes 1 to {MAX_IDS} ids")
            for item_id in chosen:
                if self.version.row_of(item_id) is None:
                    raise ItemNotFoundError(item_id, field)
        if both := {*ids} & {*not_ids}:
            raise InvalidQueryError("not_ids", f"{min(both)!r} is in ids as well")
        concept = Concept(
            name,
            kind,
            tuple(dict.fromkeys(ids)),
            tuple(dict.fromkeys(not_ids)),
        )
        learned = self._learn(concept)
        try:
            put_concept(self.version.index, concept)
        except DataError as error:
            raise InvalidQueryError("name", str(error)) from None
        self.refresh()
        self._learned[concept] = learned
        return learned.describe()

    def forget(self, name: str) -> bool:
        """Forget a name. Return False if it is unknown."""
        is_known = drop_concept(self.version.index, unicodedata.normalize("NFC", name))
        self.refresh()
        return is_known

    def describe(self, name: str | None = None) -> list[TaughtConcept]:
        """Return the taught names, or the one of this name, as they are now."""
        self.refresh()
        name = name and unicodedata.normalize("NFC", name)
        return [
            self._find(known).describe()
            for known in self._known.values()
            if name in (None, known.name)
        ]

    def split(self, text: str, field: str) -> tuple[str, list[Learned]]:
        """Return a text with the kinds of its names in their place, "" if it is names
        alone; and the names.

        Before anything is taught, "@" is text. Raise InvalidQueryError, which names
        `field`, for a name that is unknown, or that has lost its examples.
        """
        known = self._known
        taught = dict[str, Learned]()
        if not known:
            return text, []

        def kind_of(token: re.Match[str]) -> str:
            name = _leading_name(token[1])
            if not 0 < len(name) <= MAX_NAME:
                return token[0]
            if name not in known:
                similar = difflib.get_close_matches(
                    name,
                    known,
                    n=5,
                    cutoff=0.4,
                ) or sorted(known)
                names = shorten([f"@{other}" for other in similar])
                raise InvalidQueryError(
                    field, f"no name @{name} was taught; there are: {names}"
                )
            taught[name] = self._find(known[name])
            if not taught[name].examples:
                raise InvalidQueryError(
                    field,
                    f"the items of @{name} are gone; teach it again, or forget it",
                )
            return known[name].kind + token[1][len(name) :]

        words = " ".join(_TOKEN.sub(kind_of, text).split())
        return words if _TOKEN.sub("", text).strip() or not taught else "", [
            *taught.values()
        ]

    def _find(self, concept: Concept) -> Learned:
        if (learned := self._learned.get(concept)) is None:
            learned = self._learned[concept] = self._learn(concept)
        return learned

    def _learn(self, concept: Concept) -> Learned:
        version = self.version
        rows = self._rows(concept.ids)
        others = self._rows(concept.not_ids)
        if not len(rows):
            return Learned(
                concept,
                0,
                np.zeros(version.manifest.dim, np.float32),
                1.0,
                NO_ROWS,
            )
        gallery, centre, spread, _ = self._gallery
        examples = self._vectors(rows)
        mean = examples.mean(0)
        away = mean - centre
        direction = np.linalg.solve(
            spread, away if np.linalg.norm(away) > _MIN_LENGTH else mean
        )
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)
        middle = float(np.median(gallery @ direction))
        least = middle + _SHARE * (1 - middle)
        near, scores = self._reaching(direction, least)
        own = normalize(self._whitened(examples).mean(0, keepdims=True))[0]
        likeness, foreign = (
            self._compared(some, lambda v: self._whitened(v) @ own)
            for some in (near, others)
        )
        cutoffs = np.append(np.sort(scores)[::-1], least)
        is_member = likeness >= _LIKENESS + _ONE_EXAMPLE / len(rows)
        if len(others):
            is_member &= likeness > foreign.max()
            cutoffs = np.maximum(
                cutoffs,
                self._compared(others, lambda v: v @ direction).max() + 10**-_DIGITS,
            )
        members = np.setdiff1d(np.union1d(rows, near[is_member]), others)
        cutoff = float(cutoffs[: len(members)][-1].round(_DIGITS))
        return Learned(concept, len(rows), direction, cutoff, members)

    def _reaching(
        self,
        direction: Floats,
        least: float,
    ) -> tuple[Rows, NDArray[np.float64]]:
        """Return rows whose cosines are high enough, of the nearest that the engine
        finds, or of all if these are.
        """
        width = min(_NEAREST, self.version.rows)
        scores, rows = (
            nearest[0] for nearest in self.version.search(direction[None], width)
        )
        if rows[-1] >= 0 and scores[-1] >= least:
            rows = np.flatnonzero(self.version.live)
            scores = self._compared(rows, lambda v: v @ direction)
        is_near = (scores >= least) & (rows >= 0)
        return rows[is_near], scores[is_near].astype(np.float64)

    def _compared(
        self,
        rows: Rows,
        compare: Callable[[Floats], Floats],
    ) -> NDArray[np.float64]:
        """Compare the vectors of rows part by part; rounded, so equal vectors are
        equally like.
        """
        parts = np.array_split(rows, 1 + len(rows) // _NEAREST)
        return (
            np.concatenate([compare(self._vectors(part)) for part in parts])
            .astype(np.float64)
            .round(_DIGITS)
        )

    def _whitened(self, vectors: Floats) -> Floats:
        """(n, E) -> (n, E), of unit length."""
        _, centre, _, whitening = self._gallery
        return normalize((vectors - centre.astype(np.float32)) @ whitening)

    @cached_property
    def _gallery(
        self,
    ) -> tuple[Floats, NDArray[np.float64], NDArray[np.float64], Floats]:
        """Vectors of evenly spread rows (m, E), their mean (E,), shrunk covariance (E,
        E), and whitening matrix (E, E).

        The fewer rows, the more they are shrunk: in a small gallery the examples' own
        class is a large part of it.
        """
        live = np.flatnonzero(self.version.live)
        vectors = self._vectors(live[:: -(-len(live) // _SAMPLE)])
        centre = vectors.mean(0, np.float64)
        covariance = (vectors - centre).T @ (vectors - centre) / len(vectors)
        variance = covariance.diagonal().mean() * np.eye(len(centre))
        share = len(centre) / len(vectors)
        tiny = np.finfo(float).eps * np.eye(len(centre))
        lower = np.linalg.cholesky(
            covariance + max(0.3, 80 * share**2) * variance + tiny
        )
        spread = covariance + 3 * (1 + 10 * share) * variance + tiny
        return vectors, centre, spread, np.linalg.inv(lower).T.astype(np.float32)

    def _column(self, concepts: Sequence[Concept]) -> pa.ChunkedArray:
        """Return the names of each row, a column of lists; null without any."""
        learned = [self._find(concept) for concept in concepts]
        rows = np.concatenate([NO_ROWS, *(name.members for name in learned)])
        names = np.repeat(
            [name.concept.name for name in learned],
            [len(name.members) for name in learned],
        )
        counts = np.bincount(rows, minlength=self.version.rows)
        offsets = pa.array(np.concatenate(([0], counts.cumsum())), pa.int32())
        ordered = pa.array(names[rows.argsort(kind="stable")], pa.string())
        return pa.chunked_array(
            [pa.ListArray.from_arrays(offsets, ordered, mask=pa.array(counts == 0))]
        )

    def _rows(self, ids: Sequence[str]) -> Rows:
        rows = (self.version.row_of(item_id) for item_id in ids)
        return np.array([row for row in rows if row is not None], np.int64)


def _leading_name(text: str) -> str:
    """Return the characters that a name may have: letters with their marks, digits of
    any script, "-" and "_".
    """
    return "".join(
        takewhile(
            lambda char: char in "-_" or unicodedata.category(char)[0] in "LMN", text
        )
    )
