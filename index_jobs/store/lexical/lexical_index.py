"""The lexical index of a version: BM25 over the terms of its items, in a tantivy directory.

- A document is one row with each of its terms once, since captions, file names and ids repeat each other. Terms come
  from `analysis`; tantivy only splits them at spaces.
- A score is the share of a query that an item contains: BM25 divided by the sum of the query's inverse document
  frequencies. It is about 1 for an item of average length that contains every term, less than 1.7 for the shortest.
- A term that no item contains matches terms one edit away, at half the score, so "gohst" finds a ghost.
- The best rows come from tantivy, the scores of chosen rows from `term_lists`. For a query that matches terms one edit
  away, and in versions older than the lists, tantivy scores chosen rows too, which takes longer.
- Readers open the files through links in a temporary directory, because tantivy locks a directory by writing to it, and
  versions may be mounted read-only.
"""

import json
import math
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tantivy

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, is_panic
from dcar_core.util.files import apply_umask
from index_jobs.store.lexical.analysis import index_terms, query_terms
from index_jobs.store.lexical.term_lists import TermLists, TermListsWriter

_ROW, _TERMS = "row", "terms"
_ANALYZER = "terms"
_HEAP_BYTES = 128_000_000  # of the writer; a segment is written when it is full
_FUZZY_FROM = 4  # characters of a term that may match others one edit away
_FUZZY_SCORE = 0.5
_COMMON_SHARE = 0.05  # of the items, from which on a term is common
_CACHED_QUERIES = 1000  # with their results, about 6 kB each
_REPLACED = {"meta.json", ".managed.json"}  # by every commit
_SET_ROWS = 20_000  # selected rows up to which the search itself is restricted to them


def item_texts(table: pa.Table, fields: Collection[str] | None) -> Iterator[str]:
    """Return the text of each row of a table of items: id, caption, category and metadata fields, None for all."""
    for batch in table.select(["id", "caption", "category", "metadata"]).to_batches():
        for item_id, caption, category, metadata in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            values = [item_id, caption, category]
            for name, value in json.loads(metadata).items():
                if fields is None or name in fields:
                    values += value if isinstance(value, list) else [value]
            yield "\n".join(value for value in values if isinstance(value, str))


def write_lexical(path: Path, texts: Iterable[str]) -> None:
    """Write the index of texts, one for each row from 0 on, into an empty or missing directory.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    path.mkdir(exist_ok=True)
    schema = (
        tantivy.SchemaBuilder()
        .add_unsigned_field(_ROW, indexed=True, fast=True)
        .add_text_field(_TERMS, tokenizer_name=_ANALYZER, index_option="freq")
        .build()
    )
    lists = _write(lambda: _prepare(tantivy.Index(schema, path=str(path))), path, texts, 0, TermListsWriter())
    lists.write(path)


def update_lexical(path: Path, texts: Iterable[str], first_row: int) -> set[str]:
    """Replace the rows from `first_row` on, in a directory whose files may be hard links to those of another version.

    tantivy writes new files and never changes one, so the other version stays as it is. Returns the names of the files
    that were replaced by others of the same name, relative to the version.

    Raise ArtifactError if the index cannot be read, and OSError if the disk is full or cannot be written.
    """
    earlier = TermLists.open(path)
    lists = _write(lambda: _open(path), path, texts, first_row, TermListsWriter(earlier, first_row))
    written = _REPLACED | (set() if earlier is None else lists.write(path))
    return {f"{path.name}/{name}" for name in written}


def _write(
    opened: Callable[[], Any], path: Path, texts: Iterable[str], first_row: int, lists: TermListsWriter
) -> TermListsWriter:
    """Replace the rows from `first_row` on in tantivy's index, and append their terms to the lists."""
    try:
        index = opened()
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        replaced = tantivy.Query.range_query(
            index.schema, _ROW, tantivy.FieldType.Unsigned, lower_bound=first_row, upper_bound=2**62
        )
        writer.delete_documents_by_query(replaced)
        for row, text in enumerate(texts, first_row):
            terms = dict.fromkeys(index_terms(text))
            lists.append(terms)
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
    return lists


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
        self.path = path
        self._check()
        self._schema = index.schema
        proxy: LexicalIndex = weakref.proxy(self)  # a cycle of references would keep an older version's files open
        self._parse = lru_cache(_CACHED_QUERIES)(lambda text: proxy._parse_new(text))
        self._search_cached = lru_cache(_CACHED_QUERIES)(lambda text, k, by_rare: proxy._search(text, k, by_rare))
        self._lists = TermLists.open(path)
        if self._lists is not None and len(self._lists) != len(self):
            raise ArtifactError(f"{path} cannot be read: it has terms of {len(self._lists):,} of {len(self):,} rows")

    def _check(self) -> None:
        """Require the row numbers from 0 on. A million take some 10 ms."""
        statistics, last = {"rows": {"stats": {"field": _ROW}}}, len(self) - 1
        with _readable(self.path):
            rows = self._searcher.aggregate(tantivy.Query.all_query(), statistics)["rows"]
            if last >= 0 and (rows["count"], rows["min"], rows["max"]) != (last + 1, 0, last):
                raise ValueError(f"its row numbers are not those from 0 to {last}")

    def __len__(self) -> int:
        count: int = self._searcher.num_docs
        return count

    def search(
        self, text: str, k: int, allowed: Mask | None = None, *, by_rare_terms: bool = False
    ) -> tuple[Floats, Rows]:
        """Return the k rows with the highest scores among the allowed ones; rows without any term are left out.

        Args:
            by_rare_terms: find the rows by the terms that at most a twentieth of the items contain, if there are some.
                That takes a tenth of the time; a row that only contains common terms is missed.

        Returns:
            scores float32 (m,), best first, and rows int64 (m,), with m at most k. Without `allowed` they are cached:
            do not change them.
        """
        if allowed is None:
            return self._search_cached(text, k, by_rare_terms)
        return self._search(text, k, by_rare_terms, allowed)

    def _search(self, text: str, k: int, by_rare_terms: bool, allowed: Mask | None = None) -> tuple[Floats, Rows]:
        query = self._parse(text)
        if query.whole is None:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        if allowed is not None and np.count_nonzero(allowed) <= _SET_ROWS:
            rows = np.flatnonzero(allowed)
            return _best(self._score(query, rows), rows, k)
        is_partial, width = by_rare_terms and query.rare is not None, k
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
        is_scored_by_lists = self._lists is not None and not similar
        return _ParsedQuery(
            any_of(common + rare + similar), any_of(rare) if common and is_scored_by_lists else None, best, weights,
            count if similar else min(matches, count), bool(similar),
        )  # fmt: skip

    def _score(self, query: _ParsedQuery, rows: Rows) -> Floats:
        if self._lists is not None and not query.has_similar:
            return self._lists.score(query.weights, rows) / np.float32(query.best_score or 1)
        scores = np.zeros(len(rows), np.float32)
        if query.whole is not None and len(rows):
            among = self._among(query.whole, rows)
            found_scores, found_rows = self._hits(among, len(rows), query.best_score)
            order = np.argsort(rows)
            scores[order[np.searchsorted(rows, found_rows, sorter=order)]] = found_scores
        return scores

    def _among(self, query: Any, rows: Rows) -> Any:
        chosen = tantivy.Query.term_set_query(self._schema, _ROW, rows.tolist())
        must = tantivy.Occur.Must
        return tantivy.Query.boolean_query([(must, tantivy.Query.const_score_query(chosen, 0.0)), (must, query)])

    def _hits(self, query: Any, limit: int, best: float) -> tuple[Floats, Rows]:
        with _readable(self.path):
            hits = self._searcher.search(query, limit, count=False).hits
            scores, addresses = zip(*hits, strict=True) if hits else ((), ())
            rows = np.array(self._searcher.fast_field_values(_ROW, list(addresses)), np.int64)
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
                raise ValueError(f"a row number is not in 0..{len(self) - 1}")
        return np.array(scores, np.float32) / np.float32(best), rows


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
