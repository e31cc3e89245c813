"""Changes of items' metadata: a version that shares the vectors of the one before. No
model is needed.

- Fields are merged into those of an item, and None removes one. `caption` and
  `category` are changed like the others.
- The item table of a part with a changed item is written anew, and of the lexical index
  what belongs to changed words.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.errors import DataError
from dcar_core.util.files import canonical_json
from index_jobs.checks import MAX_METADATA_BYTES, MAX_METADATA_LEVELS, is_too_deep
from index_jobs.index.index_version import IndexVersion, write_rows
from index_jobs.index.items import Items, fit_one_field, type_of
from index_jobs.index.lexical import item_texts, write_lexical
from index_jobs.index.manifest import CHANGED, ITEMS, LEXICAL, Manifest, quantity
from index_jobs.index.versions import (
    NewVersion,
    new_version,
    open_current,
    report_os_errors,
)
from index_jobs.spec import BuildOptions


@dataclass(frozen=True)
class ChangeSummary:
    """Result of a change of metadata. unknown: ids, or values of another field, that
    the index lacks.

    rebuild: as of `Manifest`.
    """

    version: int
    changed: int
    new_fields: list[str]
    unknown: list[str]
    rebuild: str


class FieldChanges:
    """Changed fields of items of a version. records: all fields of the changed rows."""

    def __init__(self, version: IndexVersion) -> None:
        self._version = version
        self._types = dict(version.fields)
        self._names = set[str]()
        self.records: dict[int, dict[str, Any]] = {}

    @property
    def new_fields(self) -> list[str]:
        """Names that no item had."""
        return sorted(self._types.keys() - self._version.fields.keys())

    def merge(self, changes: Iterable[tuple[Sequence[int], Mapping[str, Any]]]) -> int:
        """Merge fields into items, the rows of each change, and return how many
        changed.

        Raise DataError, and change none, for a value of another type than its field, or
        too many levels or bytes.
        """
        merged = dict[int, dict[str, Any]]()
        types = dict[str, str]()
        names = set[str]()
        for rows, fields in changes:
            if not rows:
                continue
            self._check(fields, types)
            names |= fields.keys()
            for row in rows:
                before = merged.get(row) or self.records.get(row) or self._record(row)
                after = {
                    key: value
                    for key, value in {**before, **fields}.items()
                    if fields.get(key, "") is not None
                }
                if after != before:
                    merged[row] = after
                    if len(canonical_json(after)) > MAX_METADATA_BYTES:
                        kib = MAX_METADATA_BYTES // 2**10
                        raise DataError(
                            f"the fields of {self._version.item(row).id!r} would take"
                            f" more than {kib} KiB"
                        )
        if merged:
            self.records |= merged
            self._names |= names
            self._types = types | self._types
        return len(merged)

    def _check(self, fields: Mapping[str, Any], types: dict[str, str]) -> None:
        """Raise DataError for fields that do not fit. types: of new fields, which get
        those of these ones.
        """
        if is_too_deep(fields):
            raise DataError(
                f"the fields have more than {MAX_METADATA_LEVELS} nested levels;"
                " flatten them"
            )
        for name, new in (
            (name, str(type_of(value)))
            for name, value in fields.items()
            if value is not None
        ):
            if not fit_one_field(
                current := self._types.get(name) or types.setdefault(name, new), new
            ):
                raise DataError(
                    f"the field {name!r} is {current} in the index, not {new}; give"
                    " values of that type"
                )

    def _record(self, row: int) -> dict[str, Any]:
        item = self._version.item(row)
        texts = {"caption": item.caption, "category": item.category}
        return item.metadata | {name: text for name, text in texts.items() if text}

    def publish(
        self,
        new: NewVersion,
        change: str,
        *,
        keep: int,
        origin: str = "",
    ) -> Manifest:
        """Publish a version with the changes."""
        version = self._version
        manifest = self._version.manifest
        texts = dict[int, str]()
        new.link(version)
        prefixes = ["", *(f"{addition.folder}/" for addition in manifest.additions)]
        for prefix, part in zip(prefixes, version.parts, strict=True):
            rows = [row for row in sorted(self.records) if row in part.rows]
            start = part.rows.start
            if not rows:
                continue
            path = new.folder / f"{prefix}{ITEMS}"
            positions = np.array(rows) - start
            part.items.write_changed(
                path,
                {row - start: self.records[row] for row in rows},
                self._names,
            )
            before, after = (
                item_texts(items.table(positions), manifest.spec.text_fields)
                for items in (part.items, Items(path))
            )
            texts |= {
                row: new
                for row, old, new in zip(rows, before, after, strict=True)
                if new != old
            }
        if not manifest.spec.is_local:  # the engine keeps the fields as they were
            write_rows(
                new.folder / CHANGED, np.union1d(version.changed, [*self.records])
            )
        if texts:
            write_lexical(new.folder / LEXICAL, texts)
        change = f"{change} {origin}".rstrip()
        changed = manifest.changed + len(self.records)
        return new.publish(
            replace(manifest, changed=changed, change=change, origin=origin), keep=keep
        )


def rows_with(
    version: IndexVersion,
    by: str,
    values: Iterable[str],
) -> dict[str, list[int]]:
    """Return the rows of the items that have each value in a field, as text; [] for
    unknown ones.

    Raise DataError if no item has the field.
    """
    rows: dict[str, list[int]] = {value: [] for value in values}
    if by == "id":
        return {
            value: [] if (row := version.row_of(value)) is None else [row]
            for value in rows
        }
    column = version.column(by).to_pylist()
    ending = ".0" if version.fields[by] == "double" else ""
    same = {value.removesuffix(ending): chosen for value, chosen in rows.items()}
    for row in np.flatnonzero(version.live).tolist():
        if column[row] is not None:
            same.get(str(column[row]).removesuffix(ending), []).append(row)
    return rows


def change_metadata(
    index: Path,
    changes: Iterable[tuple[str, Mapping[str, Any]]],
    source: str,
    *,
    by: str = "id",
    keep: int = BuildOptions.keep,
) -> ChangeSummary:
    """Publish a version with changed fields of items, unless nothing changes.

    changes: ids, or values of the field `by`, and the fields to merge into their items.
    source: where they come from, for the history. Raise DataError if no id is in the
    index, or a value does not fit its field; other errors as of `update.remove`.
    """
    with report_os_errors(index), new_version(index) as new:
        current = open_current(index)
        changes = [*changes]
        merged = FieldChanges(current)
        rows = rows_with(current, by, (value for value, _ in changes))
        unknown = [value for value in rows if not rows[value]]
        if len(unknown) == len(rows):
            example = f", such as {unknown[0]!r}" if unknown else ""
            raise DataError(
                f"none of the {len(unknown):,} {by}s of {source} is in the"
                f" index{example}"
            )
        merged.merge((rows[value], fields) for value, fields in changes)
        manifest = current.manifest
        count = len(merged.records)
        if count:
            manifest = merged.publish(
                new,
                f"metadata of {source}: {quantity(count, 'item')} changed",
                keep=keep,
            )
    return ChangeSummary(
        manifest.version,
        count,
        merged.new_fields,
        unknown,
        manifest.rebuild,
    )
