"""The lexical index of a version: BM25 over the terms of its items, in a tantivy directory.

- A document is one row with each of its terms once, since captions, file names and ids repeat each other. Terms come
  from `analysis`; tantivy only splits them at spaces.
- A score is the share of a query that an item contains: BM25 divided by the sum of the query's inverse document
  frequencies. It is about 1 for an item of average length that contains every term, less than 1.7 for the shortest.
- A term that no item contains matches terms one edit away, at half the score, so "gohst" finds a ghost.
- tantivy locks a directory by writing to it, so readers open one of links, since an index may be mounted read-only.
"""

import json
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from index_jobs.checks import require_rows
from index_jobs.index.lexical.analysis import index_terms, query_terms

_ROW, _TERMS = "row", "terms"
_ANALYZER = "terms"
_HEAP_BYTES = 128_000_000  # of the writer; a segment is written when it is full
_FUZZY_FROM = 4  # characters of a term that may match others one edit away
_FUZZY_SCORE = 0.5
_CACHED_QUERIES = 1000
_REPLACED = {"meta.json", ".managed.json"}  # by every commit
_MARGIN = 1.2  # times as many rows as needed if the allowed ones were spread evenly
_ROW_COST = 4  # of restricting a search to one row, in results of a search among all
_FEW_ROWS = 1000  # looked up one by one in less time than as a set


def item_texts(table: pa.Table, fields: Collection[str] | None) -> Iterator[str]:
    """Return the text of each row of a table of items: id, caption, category and metadata fields, None for all."""
    for batch in table.select(["id", "caption", "category", "metadata"]).to_batches():
        for item_id, caption, category, metadata in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            values = [item_id, caption, category]
            for name, value in json.loads(metadata).items():
                if fields is None or name in fields:
                    values += value if isinstance(value, list) else [value]
            yield "\n".join(value for value in values if isinstance(value, str))


def write_lexical(path: Path, texts: Iterable[str], first_row: int = 0) -> None:
    """Write the texts of the rows from `first_row` on, which replace those that the directory has.

    The files of an existing index may be links to blobs: tantivy writes new files and never changes one.

    Raise ArtifactError if the index cannot be read, and OSError if the disk is full or cannot be written.
    """

    def later(schema: Any) -> Any:
        unsigned = tantivy.FieldType.Unsigned
        return tantivy.Query.range_query(schema, _ROW, unsigned, lower_bound=first_row, upper_bound=2**62)

    _write(path, enumerate(texts, first_row), later)


def replace_texts(path: Path, texts: Mapping[int, str]) -> None:
    """Write the texts of some rows of an existing index again, as `write_lexical` does."""
    _write(path, texts.items(), lambda schema: tantivy.Query.term_set_query(schema, _ROW, [*texts]))


def _write(path: Path, texts: Iterable[tuple[int, str]], replaced: Callable[[Any], Any]) -> None:
    """Write the texts of rows. replaced: returns the query of the documents that they replace."""
    is_new = not (path / "meta.json").exists()
    path.mkdir(exist_ok=True)
    try:
        index = _prepare(tantivy.Index(_schema(), path=str(path))) if is_new else _open(path, str(path))
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        writer.delete_documents_by_query(replaced(index.schema))
        for row, text in texts:
            document = tantivy.Document()
            document.add_unsigned(_ROW, row)
            document.add_text(_TERMS, " ".join(dict.fromkeys(index_terms(text))))
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
    except ValueError as error:
        raise OSError(f"the lexical index {path} cannot be written: {error}") from error
    for lock in path.glob(".tantivy-*.lock"):
        lock.unlink()
    for name in _REPLACED:  # tantivy writes them for this user only; the service may run as another
        (path / name).chmod(apply_umask(0o666))


def _schema() -> Any:
    builder = tantivy.SchemaBuilder().add_unsigned_field(_ROW, indexed=True, fast=True)
    return builder.add_text_field(_TERMS, tokenizer_name=_ANALYZER, index_option="freq").build()


@dataclass(frozen=True, slots=True)
class _ParsedQuery:
    """A query.

    parts: of tantivy, one for each term that items may contain. best_score: of an item of average length with every
    term. matches: upper bound of the number of rows that contain a term.
    """

    parts: list[Any]
    best_score: float
    matches: int


class LexicalIndex:
    """An opened lexical index. Safe for concurrent readers; its files may be removed while it is open.

    Every method raises ArtifactError for damage that was not found when the index was opened.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """Open a directory that `write_lexical` wrote. Raise ArtifactError, with a name, if it cannot be read."""
        self.name = name = name or str(path)
        index = _open(path, name)
        self._searcher = index.searcher()
        self._schema, last = index.schema, len(self) - 1
        with _readable(name):  # a million row numbers take some 10 ms
            found = self._searcher.aggregate(tantivy.Query.all_query(), {"rows": {"stats": {"field": _ROW}}})["rows"]
            if last >= 0 and (found["count"], found["min"], found["max"]) != (last + 1, 0, last):
                raise ValueError(f"its row numbers are not those from 0 to {last}")
        proxy: LexicalIndex = weakref.proxy(self)  # a cycle of references would keep an older version's files open
        self._parse = lru_cache(_CACHED_QUERIES)(lambda text: proxy._parse_new(text))

    def __len__(self) -> int:
        count: int = self._searcher.num_docs
        return count

    def search(self, text: str, k: int, allowed: Mask | None = None) -> tuple[Floats, Rows]:
        """Return the k rows with the highest scores among the allowed ones; rows without any term are left out.

        Args:
            allowed: bool (rows,); None for all rows.

        Returns:
            scores float32 (m,), best first, and rows int64 (m,), with m at most k.
        """
        query = self._parse(text)
        if allowed is None:
            return self._hits(_any_of(query.parts), k, query.best_score)
        rows = np.flatnonzero(allowed)
        width = int(_MARGIN * k * len(allowed) / max(len(rows), 1))  # one search is then mostly enough
        if _ROW_COST * len(rows) < min(width, query.matches):
            scores = self.score(text, rows)
            order = np.argsort(-scores, kind="stable")[: min(k, np.count_nonzero(scores))]
            return scores[order], rows[order]
        while True:
            scores, rows = self._hits(_any_of(query.parts), width, query.best_score)
            inside = allowed[rows]
            if len(rows) < width or np.count_nonzero(inside) >= k:
                return scores[inside][:k], rows[inside][:k]
            width *= 4

    def score(self, text: str, rows: Rows) -> Floats:
        """Return the score of each of these distinct rows, float32 (m,); 0 for rows without any term."""
        scores, query = np.zeros(len(rows), np.float32), self._parse(text)
        if query.parts and len(rows):
            found_scores, found_rows = self._hits(self._among(rows, query.parts), len(rows), query.best_score)
            order = np.argsort(rows)
            scores[order[np.searchsorted(rows, found_rows, sorter=order)]] = found_scores
        return scores

    def _among(self, rows: Rows, parts: list[Any]) -> Any:
        """Return the query of these rows. Its parts are nested, since tantivy reads a union of them from end to end."""
        if len(rows) <= _FEW_ROWS:
            chosen = _any_of([tantivy.Query.term_query(self._schema, _ROW, row, "basic") for row in rows.tolist()])
        else:
            chosen = tantivy.Query.term_set_query(self._schema, _ROW, rows.tolist())
        query = tantivy.Query.const_score_query(chosen, 0.0)
        for part in parts:
            query = tantivy.Query.boolean_query([(tantivy.Occur.Must, query), (tantivy.Occur.Should, part)])
        return query

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
        with _readable(self.name):
            frequency: int = self._searcher.doc_freq(_TERMS, term)
        return frequency

    def _parse_new(self, text: str) -> _ParsedQuery:
        count, best, matches, parts = len(self), 0.0, 0, list[Any]()
        for term in query_terms(text, self._is_known):
            frequency = self._frequency(term)
            best += math.log1p((count - frequency + 0.5) / (frequency + 0.5))
            if frequency:
                parts.append(tantivy.Query.term_query(self._schema, _TERMS, term, "freq"))
                matches += frequency
            elif len(term) >= _FUZZY_FROM and not term.isdecimal():
                fuzzy = tantivy.Query.fuzzy_term_query(self._schema, _TERMS, term, distance=1)
                parts.append(tantivy.Query.const_score_query(fuzzy, _FUZZY_SCORE * math.log1p(count)))
                matches = count
        return _ParsedQuery(parts, best, min(matches, count))

    def _hits(self, query: Any, limit: int, best: float) -> tuple[Floats, Rows]:
        with _readable(self.name):
            hits = self._searcher.search(query, limit, count=False).hits
            scores, addresses = zip(*hits, strict=True) if hits else ((), ())
            rows = np.array(self._searcher.fast_field_values(_ROW, list(addresses)), np.int64)
            require_rows(rows, len(self))
        return np.array(scores, np.float32) / np.float32(best or 1), rows


def _any_of(parts: list[Any]) -> Any:
    return tantivy.Query.boolean_query([(tantivy.Occur.Should, part) for part in parts])


def _open(path: Path, name: str) -> Any:
    with _readable(name):
        return _prepare(tantivy.Index.open(str(path)))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raise ArtifactError for what tantivy raises for damaged files: also a panic, which is not an Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError | TypeError) or is_panic(error):
            reason = str(error).partition("\n")[0]
            raise ArtifactError(f"{name} cannot be read: {reason}; roll back, or rebuild the index") from error
        raise


def _prepare(index: Any) -> Any:
    index.register_tokenizer(_ANALYZER, tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build())
    index.config_reader("manual")  # a reader that follows commits would lock the directory again after the last one
    return index
