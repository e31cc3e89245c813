"""Judged lists: how well items answer queries, in grades from 0 (does not fit) to 3.

- A table (.csv, .jsonl, .parquet) has columns query, item_id and grade, and may have query_id and class.
- TREC qrels have "query_id 0 item_id grade" a line; a file with "query_id<tab>text" a line has their queries.
- TREC files have no white space in an id: `trec_id` writes it as %20.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from dcar_core.data.entries import label_text, read_text
from dcar_core.data.records import RECORD_SUFFIXES, Record, read_records
from dcar_core.data.tables import split_lines
from dcar_core.util.errors import DataError

GRADES = ("0", "1", "2", "3")
COLUMNS = ("query_id", "query", "item_id", "grade", "class")
_SHOWN = 20  # faults of a list


@dataclass(frozen=True)
class JudgedList:
    """Queries by their ids. A query without an id has its text as id.

    texts: of the queries. grades: of items by their ids. classes: of the queries that have one.
    """

    texts: dict[str, str] = field(default_factory=dict)
    grades: dict[str, dict[str, int]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Add a judgement. Raise DataError, which names the field, if it cannot be used."""
        text, item, grade = (_filled(row, where, name) for name in ("query", "item_id", "grade"))
        query_id = label_text(row, where, "query_id") or text
        if grade.removesuffix(".0") not in GRADES:
            raise DataError(f"{where}: field 'grade' must be 0, 1, 2 or 3, not {grade[:40]!r}; correct or remove it")
        if (known := self.texts.setdefault(query_id, text)) != text:
            raise DataError(
                f"{where}: field 'query_id' {query_id!r} is of {text!r} here, of {known!r} before; rename one"
            )
        value = int(grade.removesuffix(".0"))
        if (graded := self.grades.setdefault(query_id, {}).setdefault(item, value)) != value:
            raise DataError(f"{where}: field 'grade' is {value}, but {item!r} had {graded} for this query; remove one")
        if label := label_text(row, where, "class"):
            self.classes.setdefault(query_id, label)

    def rows(self) -> Iterator[Record]:
        """Yield the judgements as rows of a table."""
        for query_id, graded in self.grades.items():
            for item, grade in graded.items():
                cells = query_id, self.texts[query_id], item, grade, self.classes.get(query_id, "")
                yield dict(zip(COLUMNS, cells, strict=True))

    def to_csv(self) -> str:
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return table.getvalue()

    def to_qrels(self) -> str:
        return "".join(
            f"{trec_id(row['query_id'])} 0 {trec_id(row['item_id'])} {row['grade']}\n" for row in self.rows()
        )


def trec_id(name: str) -> str:
    """Return an id without white space, which `unquote` turns back."""
    return re.sub(r"[%\s]", lambda found: quote(found[0]), name)


def read_judgements(files: Sequence[Path], queries: Path | None = None) -> JudgedList:
    """Return the judgements of all files.

    Args:
        queries: the texts of the queries of qrels.

    Raises:
        DataError: a row cannot be used, or there is none. The message has a line for each such row, up to 20.
    """
    faults, judged = list[str](), JudgedList()
    texts = {} if queries is None else _read_texts(queries, faults)
    for file in files:
        is_table = file.suffix.lower() in RECORD_SUFFIXES
        for number, row in _read_table(file, faults) if is_table else _read_qrels(file, texts, faults):
            try:
                judged.add(row, f"{file}, {'row' if file.suffix == '.parquet' else 'line'} {number}")
            except DataError as error:
                faults.append(str(error))
    if faults:
        rest = [f"{len(faults) - _SHOWN:,} more rows cannot be used"] * (len(faults) > _SHOWN)
        raise DataError("\n".join([*faults[:_SHOWN], *rest]))
    if not judged.texts:
        raise DataError(f"{', '.join(map(str, files))} has no judgement: give rows of query, item_id and grade")
    return judged


def _filled(row: Mapping[str, Any], where: str, name: str) -> str:
    value = label_text(row, where, name)
    if not value:
        has = ", ".join(key for key, cell in row.items() if cell not in (None, "")) or "nothing"
        raise DataError(f"{where}: field {name!r} is missing or empty; the row has {has}")
    return value


def _read_table(file: Path, faults: list[str]) -> Iterator[tuple[int, Record]]:
    return read_records(str(file), lambda: file.open("rb"), on_bad_line=lambda error: faults.append(str(error)))


def _read_texts(file: Path, faults: list[str]) -> dict[str, str]:
    texts = dict[str, str]()
    for number, line in _lines(file):
        query_id, tab, text = line.partition("\t")
        if not tab or not text.strip():
            faults.append(f"{file}, line {number}: must be the id of a query, a tab and its text")
        texts[unquote(query_id.strip())] = text.strip()
    return texts


def _read_qrels(file: Path, texts: Mapping[str, str], faults: list[str]) -> Iterator[tuple[int, Record]]:
    if not texts:
        raise DataError(f"{file} is read as TREC qrels, which lack the queries' texts: give them by --queries FILE")
    for number, line in _lines(file):
        cells = line.split()
        if len(cells) != 4:
            faults.append(f"{file}, line {number}: must be 'query_id 0 item_id grade', not {len(cells)} cells")
            continue
        query_id = unquote(cells[0])
        if query_id not in texts:
            faults.append(f"{file}, line {number}: field 'query_id' {query_id!r} has no text; add it to --queries")
            continue
        yield number, {"query_id": query_id, "query": texts[query_id], "item_id": unquote(cells[2]), "grade": cells[3]}


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers and texts of the lines that are not blank."""
    return ((number, line) for number, line in enumerate(split_lines(read_text(file)), 1) if line.strip())
