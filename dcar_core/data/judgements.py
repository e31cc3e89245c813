"""Judged lists: how well items answer queries, in grades from 0 (does not fit) to 3.

A table (.csv, .jsonl, .parquet) has columns query, item_id and grade, and may have
query_id. A row with an empty grade does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dcar_core.data.records import label_text, read_records
from dcar_core.util.errors import DataError

_SHOWN = 20  # faults of a list


@dataclass(frozen=True)
class JudgedList:
    """Queries by their ids; one without an id has its text as id.

    texts: of the queries. grades: of items by their ids.
    """

    texts: dict[str, str] = field(default_factory=dict)
    grades: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Add a judgement. Raise DataError, which names the field, if it cannot be
        used.
        """
        if "grade" in row and not label_text(row, where, "grade"):
            return
        for name in (
            name
            for name in ("query", "item_id", "grade")
            if not label_text(row, where, name)
        ):
            has = (
                ", ".join(key for key, cell in row.items() if cell not in (None, ""))
                or "nothing"
            )
            raise DataError(
                f"{where}: field {name!r} is missing or empty; the row has {has}"
            )
        text, item, grade = (
            label_text(row, where, name) for name in ("query", "item_id", "grade")
        )
        query_id = label_text(row, where, "query_id") or text
        grade = grade.removesuffix(".0")
        if grade not in ("0", "1", "2", "3"):
            raise DataError(
                f"{where}: field 'grade' must be 0, 1, 2 or 3, not {grade[:40]!r};"
                " correct or remove it"
            )
        if (known := self.texts.setdefault(query_id, text)) != text:
            raise DataError(
                f"{where}: query_id {query_id!r} is of {text!r} here, of {known!r}"
                " before; rename one"
            )
        if (
            graded := self.grades.setdefault(query_id, {}).setdefault(item, int(grade))
        ) != int(grade):
            raise DataError(
                f"{where}: field 'grade' is {grade}, but {item!r} had {graded} for this"
                " query; remove one"
            )


def read_judgements(files: Sequence[Path]) -> JudgedList:
    """Return the judgements of all tables.

    Raises:
        DataError: a row cannot be used, or there is none. The message has a line for
            each such row, up to 20.
    """
    faults = list[DataError]()
    judged = JudgedList()
    for file in files:
        unit = "row" if file.suffix.lower() == ".parquet" else "line"
        for number, row in read_records(
            str(file),
            partial(_open, file),
            on_bad_line=faults.append,
        ):
            try:
                judged.add(row, f"{file}, {unit} {number}")
            except DataError as error:
                faults.append(error)
    if faults:
        if len(faults) > _SHOWN:
            rest = f"\n{len(faults) - _SHOWN:,} more rows cannot be used"
        else:
            rest = ""
        raise DataError("\n".join(map(str, faults[:_SHOWN])) + rest)
    if not judged.texts:
        raise DataError(
            f"{', '.join(map(str, files))} has no judgement: give rows of query,"
            " item_id and grade"
        )
    return judged


def _open(file: Path) -> BinaryIO:
    return file.open("rb")
