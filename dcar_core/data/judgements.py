"""Judged lists: how well items answer queries, in grades from 0 (does not fit) to 3.

- A table (.csv, .jsonl, .parquet) has columns query, item_id and grade, and may have query_id and class. A row with an
  empty grade does not count.
- TREC qrels have "query_id 0 item_id grade" a line, and a file of "query_id<tab>text" their queries. An id there has no
  white space: `trec_id` writes it as %20.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from dcar_core.data.entries import label_text, read_text
from dcar_core.data.readers import split_lines
from dcar_core.data.records import RECORD_SUFFIXES, Record, read_records
from dcar_core.util.errors import DataError

_SHOWN = 20  # faults of a list


@dataclass(frozen=True)
class JudgedList:
    """Queries by their ids; one without an id has its text as id.

    texts: of the queries. grades: of items by their ids. classes: of the queries that have one.
    """

    texts: dict[str, str] = field(default_factory=dict)
    grades: dict[str, dict[str, int]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Add a judgement. Raise DataError, which names the field, if it cannot be used."""
        if "grade" in row and not label_text(row, where, "grade"):
            return
        for name in (name for name in ("query", "item_id", "grade") if not label_text(row, where, name)):
            has = ", ".join(key for key, cell in row.items() if cell not in (None, "")) or "nothing"
            hint = "; texts of qrels are in --queries FILE" * (name == "query")
            raise DataError(f"{where}: field {name!r} is missing or empty; the row has {has}{hint}")
        text, item, grade = (label_text(row, where, name) for name in ("query", "item_id", "grade"))
        query_id, grade = label_text(row, where, "query_id") or text, grade.removesuffix(".0")
        if grade not in ("0", "1", "2", "3"):
            raise DataError(f"{where}: field 'grade' must be 0, 1, 2 or 3, not {grade[:40]!r}; correct or remove it")
        if (known := self.texts.setdefault(query_id, text)) != text:
            raise DataError(f"{where}: query_id {query_id!r} is of {text!r} here, of {known!r} before; rename one")
        if (graded := self.grades.setdefault(query_id, {}).setdefault(item, int(grade))) != int(grade):
            raise DataError(f"{where}: field 'grade' is {grade}, but {item!r} had {graded} for this query; remove one")
        if label := label_text(row, where, "class"):
            self.classes.setdefault(query_id, label)

    def to_qrels(self) -> str:
        return "".join(
            f"{trec_id(query_id)} 0 {trec_id(item)} {grade}\n"
            for query_id, graded in self.grades.items()
            for item, grade in graded.items()
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
    faults = list[str]()
    parts = [] if queries is None else [line.partition("\t") for _, line in _lines(queries)]
    texts = {unquote(query_id.strip()): text.strip() for query_id, _, text in parts}
    judged = JudgedList()
    for file in files:
        for number, row in _read_rows(file, texts, faults):
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


def _read_rows(file: Path, texts: Mapping[str, str], faults: list[str]) -> Iterator[tuple[int, Record]]:
    if file.suffix.lower() in RECORD_SUFFIXES:
        yield from read_records(str(file), lambda: file.open("rb"), on_bad_line=lambda error: faults.append(str(error)))
        return
    for number, line in _lines(file):
        query_id, _, item, grade = (*line.split(None, 3), "", "", "")[:4]  # a cell too much makes the grade a wrong one
        row = {"query_id": unquote(query_id), "query": texts.get(unquote(query_id), ""), "item_id": unquote(item)}
        yield number, row | ({"grade": grade.strip()} if grade else {})


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers and texts of the lines that are not blank."""
    return ((number, line) for number, line in enumerate(split_lines(read_text(file)), 1) if line.strip())
