"""The words of the items for hybrid search: ids, captions, categories and metadata
fields, in a tantivy directory.

- A document is one row with each of its terms once, since captions, file names and ids
  repeat each other. Terms come from `index_terms`; tantivy only splits them at spaces.
- A score is the share of a query that an item contains: BM25 divided by the sum of the
  query's inverse document frequencies. It is about 1 for an item of average length that
  contains every term, less than 1.7 for the shortest.
- A term that no item contains matches terms one edit away, at half the score, so
  "gohst" finds a ghost.
- A hybrid rank score is cosine + bonus * text score. The bonus follows from the weight
  w of the words and from the spread of the query's cosines over the gallery: 3 standard
  deviations * w / (1 - w).
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tantivy

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, is_panic
from dcar_core.util.files import apply_umask

_ACCENTS = re.compile(
    # Latin, Hebrew, Arabic
    "[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u0652\u0670]"
)
# those above U+FDFF choose the form of an emoji, or are of scripts that are rare
_MARKS = "".join(
    mark
    for mark in map(chr, range(0x370, 0xFE00))
    if unicodedata.category(mark) in {"Mn", "Mc"}
)
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CJK_START = re.compile(f"[{_CJK}]")
_WORD = rf"[^\W_{_CJK}]+(?:[{_MARKS}][^\W_{_CJK}]*)*"
_CHUNK = re.compile(rf"[{_CJK}]+|{_WORD}(?:[-./_]{_WORD})*")
_PART = re.compile(rf"[^\W\d_]+(?:[{_MARKS}][^\W\d_]*)*|\d+")
_STOP_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "it",
        "of",
        "on",
        "or",
        "that",
        "the",
        "to",
        "with",
    }
)
_MAX_TERM = 64  # characters
_MAX_QUERY_TERMS = 64

_ROW = "row"
_TERMS = "terms"
_ANALYZER = "terms"
_HEAP_BYTES = 128_000_000  # of the writer; a segment is written when it is full
_FUZZY_FROM = 4  # characters of a term that may match others one edit away
_FUZZY_SCORE = 0.5
_REPLACED = {"meta.json", ".managed.json"}  # by every commit
_MARGIN = 1.2  # times as many rows as needed if the allowed ones were spread evenly
_FEW_ROWS = 1000  # looked up one by one in less time than a search takes

# of the words in hybrid searches; chosen on short queries of the bundled example
DEFAULT_WEIGHT = 0.7
# standard deviations of cosines that a full match is worth at equal weights
_SPREADS = 3.0
# in place of 1 - w for a weight of 1; cosines then order equal matches only
_LEAST_REST = 1e-4
_SAMPLE = 256  # rows that tell how widely cosines spread


def index_terms(text: str) -> list[str]:
    """Return the terms of a text, in order, with repetitions; the same for items and
    for queries.

    - Case, width and accents are folded: "Éclair" and "eclair" are one term. So are
      Arabic and Hebrew words with and without their vowel points. The vowel signs of
      other scripts are part of the word.
    - A code gives its parts and the whole: "WX-300", "WX 300" and "wx300" share terms.
    - Chinese, Japanese and Korean text gives characters and pairs of neighbours, since
      it has no spaces.
    - English plurals lose their ending by Harman's three rules, which also leave codes
      and other languages readable.
    """
    return [term for parts, code in _chunks(text) for term in (*parts, *code)]


def _chunks(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the terms of the parts of each chunk, and that of the whole if it is a
    code.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    if not folded.isascii():
        folded = unicodedata.normalize(
            "NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", folded))
        )
    for match in _CHUNK.finditer(folded):
        chunk = match.group()
        if _CJK_START.match(chunk):
            yield [*chunk, *(chunk[i : i + 2] for i in range(len(chunk) - 1))], []
            continue
        parts = _PART.findall(chunk)
        is_code = len(parts) > 1 and any(part.isdecimal() for part in parts)
        yield (
            [_singular(part)[:_MAX_TERM] for part in parts],
            ["".join(parts)[:_MAX_TERM]] if is_code else [],
        )


def query_terms(text: str, is_known: Callable[[str], bool]) -> list[str]:
    """Return the distinct terms of a query, without stop words unless it has no others.

    A code that no item has in one piece is left out if items have its parts: the file
    IMG_0010.jpg is not "img0010".
    """
    terms = dict[str, None]()
    for parts, code in _chunks(text):
        terms |= dict.fromkeys(parts)
        if code and (any(map(is_known, code)) or not all(map(is_known, parts))):
            terms |= dict.fromkeys(code)
    return ([term for term in terms if term not in _STOP_WORDS] or list(terms))[
        :_MAX_QUERY_TERMS
    ]


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s"):
        return word
    if word.endswith("ies") and word[-4] not in "ae":
        return word[:-3] + "y"
    if word.endswith(("xes", "zes", "ches", "shes", "sses")):
        return word[:-2]
    if word.endswith("es") and word[-3] not in "aeo":
        return word[:-1]
    return word if word.endswith(("us", "ss", "es")) else word[:-1]


def item_texts(table: pa.Table, fields: Collection[str] | None) -> Iterator[str]:
    """Return the text of each row of a table of items: id, caption, category and
    metadata fields, None for all.
    """
    for batch in table.select(["id", "caption", "category", "metadata"]).to_batches():
        for item_id, caption, category, metadata in zip(
            *(column.to_pylist() for column in batch.columns), strict=True
        ):
            values = [item_id, caption, category]
            for name, value in json.loads(metadata).items():
                if fields is None or name in fields:
                    values += value if isinstance(value, list) else [value]
            yield "\n".join(value for value in values if isinstance(value, str))


def write_lexical(
    path: Path,
    texts: Iterable[str] | Mapping[int, str],
    first_row: int = 0,
) -> None:
    """Write the texts of the rows from `first_row` on, or of some rows, in place of
    those that the directory has.

    The files of an existing index may be links to blobs: tantivy writes new files and
    never changes one.

    Raise ArtifactError if the index cannot be read, and OSError if the disk is full or
    cannot be written.
    """
    is_new = not (path / "meta.json").exists()
    some = isinstance(texts, Mapping)
    path.mkdir(exist_ok=True)
    try:
        if is_new:
            index = _prepare(tantivy.Index(_schema(), path=str(path)))
        else:
            index = _open(path, str(path))
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        kind = tantivy.FieldType.Unsigned
        later = tantivy.Query.range_query(
            index.schema,
            _ROW,
            kind,
            lower_bound=first_row,
            upper_bound=2**62,
        )
        if some:
            replaced = tantivy.Query.term_set_query(index.schema, _ROW, [*texts])
        else:
            replaced = later
        writer.delete_documents_by_query(replaced)
        for row, text in (
            texts.items() if isinstance(texts, Mapping) else enumerate(texts, first_row)
        ):
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
    # tantivy writes them for this user only; the service may run as another
    for name in _REPLACED:
        (path / name).chmod(apply_umask(0o666))


def _schema() -> Any:
    builder = tantivy.SchemaBuilder().add_unsigned_field(_ROW, indexed=True, fast=True)
    return builder.add_text_field(
        _TERMS,
        tokenizer_name=_ANALYZER,
        index_option="freq",
    ).build()


class LexicalIndex:
    """An opened lexical index. Safe for concurrent readers; its files may be removed
    while it is open.

    Every method raises ArtifactError for damage that was not found when the index was
    opened.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """Open a directory that `write_lexical` wrote. Raise ArtifactError, with a
        name, if it cannot be read.

        tantivy locks a directory by writing to it, so an index that may be mounted
        read-only is opened through links.
        """
        self.name = name or str(path)
        index = _open(path, self.name)
        self._searcher = index.searcher()
        self._schema = index.schema

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def search(
        self,
        text: str,
        k: int,
        allowed: Mask | None = None,
    ) -> tuple[Floats, Rows]:
        """Return scores float32 (m,) and rows int64 (m,) of the k best among allowed
        rows, bool (rows,), None for all.

        Rows without any term are left out.
        """
        parts, best, _ = self._parse(text)
        if allowed is None:
            return self._hits(_any_of(parts), k, best)
        few = np.flatnonzero(allowed)
        if len(few) <= _FEW_ROWS:
            scores = self.score(text, few)
            order = np.argsort(-scores, kind="stable")[
                : min(k, np.count_nonzero(scores))
            ]
            return scores[order], few[order]
        # one search is then mostly enough
        width = int(_MARGIN * k * len(allowed) / len(few))
        while True:
            scores, rows = self._hits(_any_of(parts), width, best)
            inside = allowed[rows]
            if len(rows) < width or np.count_nonzero(inside) >= k:
                return scores[inside][:k], rows[inside][:k]
            width *= 4

    def score(self, text: str, rows: Rows) -> Floats:
        """Return the score of each of these distinct rows, float32 (m,); 0 for rows
        without any term.
        """
        scores, (parts, best, _) = np.zeros(len(rows), np.float32), self._parse(text)
        if parts and len(rows):
            chosen = _any_of(
                [
                    tantivy.Query.term_query(self._schema, _ROW, row, "basic")
                    for row in rows.tolist()
                ]
            )
            query = tantivy.Query.const_score_query(chosen, 0.0)
            # nested, since tantivy reads a union of them from end to end
            for part in parts:
                query = tantivy.Query.boolean_query(
                    [(tantivy.Occur.Must, query), (tantivy.Occur.Should, part)]
                )
            hit_scores, hit_rows = self._hits(query, len(rows), best)
            order = np.argsort(rows)
            scores[order[np.searchsorted(rows, hit_rows, sorter=order)]] = hit_scores
        return scores

    def count_matches(self, text: str) -> int:
        """Return an upper bound of the number of rows that contain a term of a
        query.
        """
        return self._parse(text)[2]

    def known_share(self, text: str) -> float:
        """Return the share of a query's terms that some item contains; 1 for a query
        without terms.
        """
        terms = query_terms(text, self._is_known)
        return sum(map(self._is_known, terms)) / len(terms) if terms else 1.0

    def _is_known(self, term: str) -> bool:
        return bool(self._frequency(term))

    def _frequency(self, term: str) -> int:
        with _readable(self.name):
            return int(self._searcher.doc_freq(_TERMS, term))

    def _parse(self, text: str) -> tuple[list[Any], float, int]:
        """Return tantivy's query for each term that items may contain, the best score,
        and `count_matches`.

        The best score is that of an item of average length with every term.
        """
        count = len(self)
        best = 0.0
        matches = 0
        parts = list[Any]()
        for term in query_terms(text, self._is_known):
            frequency = self._frequency(term)
            best += math.log1p((count - frequency + 0.5) / (frequency + 0.5))
            if frequency:
                parts.append(
                    tantivy.Query.term_query(self._schema, _TERMS, term, "freq")
                )
                matches += frequency
            elif len(term) >= _FUZZY_FROM and not term.isdecimal():
                fuzzy = tantivy.Query.fuzzy_term_query(
                    self._schema,
                    _TERMS,
                    term,
                    distance=1,
                )
                parts.append(
                    tantivy.Query.const_score_query(
                        fuzzy, _FUZZY_SCORE * math.log1p(count)
                    )
                )
                matches = count
        return parts, best, min(matches, count)

    def _hits(self, query: Any, limit: int, best: float) -> tuple[Floats, Rows]:
        with _readable(self.name):
            hits = self._searcher.search(query, limit, count=False).hits
            scores, addresses = zip(*hits, strict=True) if hits else ((), ())
            rows = np.array(
                self._searcher.fast_field_values(_ROW, list(addresses)), np.int64
            )
        return np.array(scores, np.float32) / np.float32(best or 1), rows


def _any_of(parts: list[Any]) -> Any:
    return tantivy.Query.boolean_query([(tantivy.Occur.Should, part) for part in parts])


def _open(path: Path, name: str) -> Any:
    with _readable(name):
        return _prepare(tantivy.Index.open(str(path)))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raise ArtifactError for what tantivy raises for damaged files: also a panic,
    which is not an Exception.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError | TypeError) or is_panic(error):
            reason = str(error).partition("\n")[0]
            raise ArtifactError(
                f"{name} cannot be read: {reason}; roll back, or rebuild the index"
            ) from error
        raise


def _prepare(index: Any) -> Any:
    index.register_tokenizer(
        _ANALYZER, tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build()
    )
    # a reader that follows commits would lock the directory again after the last one
    index.config_reader("manual")
    return index


def text_bonus(sample_vectors: Floats, vector: Floats, weight: float) -> float:
    """Return the rank score of a text score of 1. sample_vectors: of evenly spread
    items, (m, E).
    """
    return (
        _SPREADS
        * weight
        / max(1 - weight, _LEAST_REST)
        * float(np.std(sample_vectors @ vector))
    )


def spread_rows(count: int) -> Rows:
    """Return evenly spread rows of so many, whose vectors are `sample_vectors`."""
    return np.arange(0, count, max(1, count // _SAMPLE))[:_SAMPLE]
