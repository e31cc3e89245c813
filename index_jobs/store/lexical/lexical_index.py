"""The lexical index of a version: BM25 over the terms of its items, in a tantivy directory.

- A document is one row with each of its terms once, since captions, file names and ids repeat each other. Terms come
  from `analysis`; tantivy only splits them at spaces.
- A score is the share of a query that an item contains: BM25 divided by the sum of the query's inverse document
  frequencies. It is about 1 for an item of average length that contains every term, less than 1.7 for the shortest.
- A term that no item contains matches terms one edit away, at half the score, so "gohst" finds a ghost.
- The best rows come from tantivy, the scores of chosen rows from lists of the terms of each row: `terms.npy`, uint32,
  the CRC-32 of each term, and `term_starts.npy`, int64 (rows + 1,), where those of a row begin. A row scores too high
  if one of its terms has the CRC of another term of the query, by a chance of one in some hundred millions.
- For a query that matches terms one edit away, tantivy scores chosen rows too, which takes longer.
- Readers open the files through links in a temporary directory, because tantivy locks a directory by writing to it, and
  versions may be mounted read-only.
"""

import json
import math
import sys
import tempfile
import weakref
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import tantivy
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, is_panic
from dcar_core.util.files import apply_umask, atomic_writer
from index_jobs.checks import require_rows
from index_jobs.store.lexical.analysis import index_terms, query_terms

_ROW, _TERMS = "row", "terms"
_ANALYZER = "terms"
_HEAP_BYTES = 128_000_000  # of the writer; a segment is written when it is full
_FUZZY_FROM = 4  # characters of a term that may match others one edit away
_FUZZY_SCORE = 0.5
_COMMON_SHARE = 0.05  # of the items, from which on a term is common
_CACHED_QUERIES = 1000
_REPLACED = {"meta.json", ".managed.json"}  # by every commit
_MARGIN = 1.2  # times as many rows as needed if the allowed ones were spread evenly
_SET_ROWS = 20_000  # selected rows up to which the search itself is restricted to them
TERMS, STARTS = "terms.npy", "term_starts.npy"
_K1, _B = 1.2, 0.75  # tantivy's
# Numbers of terms that tantivy tells apart, which it calls field norms.
_LENGTHS = np.array([*range(40), *(24 + (m << e) for e in range(1, 28) for m in range(8, 16))])


def item_texts(table: pa.Table, fields: Collection[str] | None) -> Iterator[str]:
    """Return the text of each row of a table of items: id, caption, category and metadata fields, None for all."""
    for batch in table.select(["id", "caption", "category", "metadata"]).to_batches():
        for item_id, caption, category, metadata in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            values = [item_id, caption, category]
            for name, value in json.loads(metadata).items():
                if fields is None or name in fields:
                    values += value if isinstance(value, list) else [value]
            yield "\n".join(value for value in values if isinstance(value, str))


def write_lexical(path: Path, texts: Iterable[str], first_row: int = 0) -> set[str]:
    """Write the texts of the rows from `first_row` on, which replace those that the directory has.

    The files of an existing index may be hard links to those of another version: tantivy writes new files and never
    changes one, so the other version stays as it is. Returns the names of the files that were replaced by others of the
    same name, relative to the version.

    Raise ArtifactError if the index cannot be read, and OSError if the disk is full or cannot be written.
    """

    def later(schema: Any) -> Any:
        unsigned = tantivy.FieldType.Unsigned
        return tantivy.Query.range_query(schema, _ROW, unsigned, lower_bound=first_row, upper_bound=2**62)

    return _write(path, enumerate(texts, first_row), later, first_row)


def replace_texts(path: Path, texts: Mapping[int, str]) -> set[str]:
    """Write the texts of some rows of an existing index again, as `write_lexical` does."""
    return _write(
        path, sorted(texts.items()), lambda schema: tantivy.Query.term_set_query(schema, _ROW, [*texts]), sys.maxsize
    )


def _write(path: Path, texts: Iterable[tuple[int, str]], replaced: Callable[[Any], Any], kept: int) -> set[str]:
    """Write the texts of rows, which ascend.

    Args:
        replaced: returns the query of the documents that they replace.
        kept: the first row that the index loses unless it has a new text.
    """
    is_new = not (path / "meta.json").exists()
    path.mkdir(exist_ok=True)
    earlier = None if is_new else _TermLists.open(path)
    rows, lengths, crcs = array("q"), array("q"), array("I")
    try:
        index = _prepare(tantivy.Index(_schema(), path=str(path))) if is_new else _open(path)
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        writer.delete_documents_by_query(replaced(index.schema))
        for row, text in texts:
            terms = dict.fromkeys(index_terms(text))
            crcs.extend(crc32(term.encode()) for term in terms)
            rows.append(row)
            lengths.append(len(terms))
            document = tantivy.Document()
            document.add_unsigned(_ROW, row)
            document.add_text(_TERMS, " ".join(terms))
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
    except ValueError as error:
        raise OSError(f"the lexical index {path} cannot be written: {error}") from error
    for lock in path.glob(".tantivy-*.lock"):
        lock.unlink()
    for name in _REPLACED:  # tantivy writes them for this user only; the service may run as another
        (path / name).chmod(apply_umask(0o666))
    new_rows, new_lengths = np.array(rows, np.int64), np.array(lengths, np.int64)
    starts, all_terms = _spliced(earlier, kept, new_rows, new_lengths, np.array(crcs, np.uint32))
    for name, values in ((STARTS, starts), (TERMS, all_terms)):
        with atomic_writer(path / name) as file:
            np.save(file, values, allow_pickle=False)
    return {f"{path.name}/{name}" for name in (*_REPLACED, STARTS, TERMS)}


def _spliced(
    earlier: "_TermLists | None", kept: int, rows: Rows, lengths: Rows, terms: NDArray[np.uint32]
) -> tuple[Rows, NDArray[np.uint32]]:
    """Return the starts and the terms of all rows: earlier ones before row `kept`, with the new ones in their place."""
    if earlier is None:
        return np.concatenate([[0], np.cumsum(lengths)]), terms
    before = np.diff(earlier.starts)[:kept]
    after = np.zeros(max(len(before), rows.max(initial=-1) + 1), np.int64)
    after[: len(before)] = before
    after[rows] = lengths
    is_new = np.zeros(len(after), np.bool_)
    is_new[rows] = True
    spliced, from_new = np.empty(after.sum(), np.uint32), np.repeat(is_new, after)
    spliced[from_new] = terms
    spliced[~from_new] = earlier.terms[: before.sum()][np.repeat(~is_new[: len(before)], before)]
    return np.concatenate([[0], np.cumsum(after)]), spliced


def _schema() -> Any:
    builder = tantivy.SchemaBuilder().add_unsigned_field(_ROW, indexed=True, fast=True)
    return builder.add_text_field(_TERMS, tokenizer_name=_ANALYZER, index_option="freq").build()


@dataclass(frozen=True, slots=True)
class _ParsedQuery:
    """A query.

    whole: None if no item can match. rare: `whole` without common terms; None if it has no others. best_score: of an
    item of average length with every term. weights: inverse document frequencies of the terms that items contain.
    matches: upper bound of the number of rows that contain a term. has_similar: True if a term matches others.
    """

    whole: Any
    rare: Any
    best_score: float
    weights: list[tuple[str, float]]
    matches: int
    has_similar: bool


class LexicalIndex:
    """An opened lexical index. Safe for concurrent readers; its files may be removed while it is open.

    Every method raises ArtifactError for damage that was not found when the index was opened.
    """

    def __init__(self, path: Path) -> None:
        """Open a directory that `write_lexical` wrote. Raise ArtifactError if the index cannot be read."""
        # Errors are ignored since tantivy may create a lock file during the removal.
        with tempfile.TemporaryDirectory(prefix="dcar-lexical-", ignore_cleanup_errors=True) as links:
            for file in path.iterdir() if path.is_dir() else ():
                (Path(links) / file.name).symlink_to(file.resolve())
            index = _open(Path(links), shown=path)
        self._searcher = index.searcher()
        self.path, self._schema, last = path, index.schema, len(self) - 1
        with _readable(path):  # a million row numbers take some 10 ms
            found = self._searcher.aggregate(tantivy.Query.all_query(), {"rows": {"stats": {"field": _ROW}}})["rows"]
            if last >= 0 and (found["count"], found["min"], found["max"]) != (last + 1, 0, last):
                raise ValueError(f"its row numbers are not those from 0 to {last}")
        proxy: LexicalIndex = weakref.proxy(self)  # a cycle of references would keep an older version's files open
        self._parse = lru_cache(_CACHED_QUERIES)(lambda text: proxy._parse_new(text))
        self._lists = _TermLists.open(path)
        if len(self._lists) != len(self):
            raise ArtifactError(f"{path} cannot be read: it has terms of {len(self._lists):,} of {len(self):,} rows")

    def __len__(self) -> int:
        count: int = self._searcher.num_docs
        return count

    def search(
        self, text: str, k: int, allowed: Mask | None = None, *, by_rare_terms: bool = False
    ) -> tuple[Floats, Rows]:
        """Return the k rows with the highest scores among the allowed ones; rows without any term are left out.

        Args:
            allowed: bool (rows,); None for all rows.
            by_rare_terms: find the rows by the terms that at most a twentieth of the items contain, if there are some.
                That takes a tenth of the time; a row that only contains common terms is missed.

        Returns:
            scores float32 (m,), best first, and rows int64 (m,), with m at most k.
        """
        query = self._parse(text)
        if query.whole is None:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        is_partial, width = by_rare_terms and query.rare is not None, k
        if allowed is not None:
            if (count := np.count_nonzero(allowed)) <= _SET_ROWS:
                rows = np.flatnonzero(allowed)
                return _best(self._score(query, rows), rows, k)
            width = int(_MARGIN * k * len(allowed) / count)  # one search is then mostly enough
        while True:
            scores, rows = self._hits(query.rare if is_partial else query.whole, width, query.best_score)
            inside = np.ones(len(rows), np.bool_) if allowed is None else allowed[rows]
            if len(rows) < width or np.count_nonzero(inside) >= k:
                scores, rows = scores[inside][:k], rows[inside][:k]
                return _best(self._score(query, rows), rows, k) if is_partial else (scores, rows)
            width *= 4

    def score(self, text: str, rows: Rows) -> Floats:
        """Return the score of each of these distinct rows, float32 (m,); 0 for rows without any term."""
        return self._score(self._parse(text), rows)

    def count_matches(self, text: str) -> int:
        """Return an upper bound of the number of rows that contain a term of a query."""
        return self._parse(text).matches

    def known_share(self, text: str) -> float:
        """Return the share of a query's terms that some item contains; 1 for a query without terms."""
        terms = query_terms(text, self._is_known)
        return sum(map(self._is_known, terms)) / len(terms) if terms else 1.0

    def _is_known(self, term: str) -> bool:
        return bool(self._frequency(term))

    def _frequency(self, term: str) -> int:
        with _readable(self.path):
            frequency: int = self._searcher.doc_freq(_TERMS, term)
        return frequency

    def _parse_new(self, text: str) -> _ParsedQuery:
        def any_of(parts: list[Any]) -> Any:
            return tantivy.Query.boolean_query([(tantivy.Occur.Should, part) for part in parts]) if parts else None

        count, best, matches, weights = len(self), 0.0, 0, list[tuple[str, float]]()
        similar, common, rare = list[Any](), list[Any](), list[Any]()
        for term in query_terms(text, self._is_known):
            frequency = self._frequency(term)
            best += (weight := math.log1p((count - frequency + 0.5) / (frequency + 0.5)))
            if frequency:
                part = tantivy.Query.term_query(self._schema, _TERMS, term, "freq")
                (rare if frequency <= _COMMON_SHARE * count else common).append(part)
                weights.append((term, weight))
                matches += frequency
            elif len(term) >= _FUZZY_FROM and not term.isdecimal():
                fuzzy = tantivy.Query.fuzzy_term_query(self._schema, _TERMS, term, distance=1)
                similar.append(tantivy.Query.const_score_query(fuzzy, _FUZZY_SCORE * math.log1p(count)))
        return _ParsedQuery(
            any_of(common + rare + similar), any_of(rare) if common and not similar else None, best, weights,
            count if similar else min(matches, count), bool(similar),
        )  # fmt: skip

    def _score(self, query: _ParsedQuery, rows: Rows) -> Floats:
        if not query.has_similar:
            return self._lists.score(query.weights, rows) / np.float32(query.best_score or 1)
        scores = np.zeros(len(rows), np.float32)
        if query.whole is not None and len(rows):
            chosen = tantivy.Query.term_set_query(self._schema, _ROW, rows.tolist())
            parts = (tantivy.Query.const_score_query(chosen, 0.0), query.whole)
            among = tantivy.Query.boolean_query([(tantivy.Occur.Must, part) for part in parts])
            found_scores, found_rows = self._hits(among, len(rows), query.best_score)
            order = np.argsort(rows)
            scores[order[np.searchsorted(rows, found_rows, sorter=order)]] = found_scores
        return scores

    def _hits(self, query: Any, limit: int, best: float) -> tuple[Floats, Rows]:
        with _readable(self.path):
            hits = self._searcher.search(query, limit, count=False).hits
            scores, addresses = zip(*hits, strict=True) if hits else ((), ())
            rows = np.array(self._searcher.fast_field_values(_ROW, list(addresses)), np.int64)
            require_rows(rows, len(self))
        return np.array(scores, np.float32) / np.float32(best), rows


class _TermLists:
    """The opened lists of a version, memory-mapped."""

    def __init__(self, starts: Rows, terms: NDArray[np.uint32]) -> None:
        self.starts, self.terms = starts, terms
        self._mean_length = len(terms) / max(len(starts) - 1, 1)

    @classmethod
    def open(cls, path: Path) -> "_TermLists":
        """Open the lists of a lexical index. Raise ArtifactError if they cannot be read."""
        try:
            starts, terms = (np.load(path / name, mmap_mode="r", allow_pickle=False) for name in (STARTS, TERMS))
        except Exception as error:  # NumPy raises many types for a header that it did not write
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        kinds = (starts.dtype, starts.ndim, terms.dtype, terms.ndim)
        if (
            kinds != (np.int64, 1, np.uint32, 1)
            or not len(starts)
            or (starts[0], starts[-1]) != (0, len(terms))
            or (np.diff(starts) < 0).any()
        ):
            raise ArtifactError(f"{path} cannot be read: its lists of terms do not fit together")
        return cls(np.asarray(starts), np.asarray(terms))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def score(self, weights: Iterable[tuple[str, float]], rows: Rows) -> Floats:
        """Return the BM25 of each of these rows as tantivy computes it, float32 (m,).

        Args:
            weights: distinct terms with their inverse document frequencies.
        """
        starts = self.starts[rows]
        lengths = self.starts[rows + 1] - starts
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
        terms, owners = self.terms[positions], np.repeat(np.arange(len(rows)), lengths)
        sums = np.zeros(len(rows), np.float32)
        for term, weight in weights:
            sums[owners[terms == crc32(term.encode())]] += np.float32(weight)
        rounded = _LENGTHS[np.searchsorted(_LENGTHS, lengths, side="right") - 1]
        scores = sums * (1 + _K1) / (1 + _K1 * (1 - _B + _B * rounded / self._mean_length))
        return scores.astype(np.float32)


def _best(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    """Return the k best rows with a score above 0."""
    order = np.argsort(-scores, kind="stable")[: min(k, np.count_nonzero(scores))]
    return scores[order], rows[order]


def _open(path: Path, shown: Path | None = None) -> Any:
    with _readable(shown or path):
        return _prepare(tantivy.Index.open(str(path)))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise ArtifactError for what tantivy raises for damaged files: also a panic, which is not an Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError | TypeError) or is_panic(error):
            reason = str(error).partition("\n")[0]
            raise ArtifactError(f"{path} cannot be read: {reason}; roll back, or rebuild the index") from error
        raise


def _prepare(index: Any) -> Any:
    index.register_tokenizer(_ANALYZER, tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build())
    index.config_reader("manual")  # a reader that follows commits would lock the directory again after the last one
    return index
