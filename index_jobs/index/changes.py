"""Changes of items' metadata: a version that shares the vectors of the one before.

- Fields are merged into those of an item, and None removes one. `caption` and `category` are changed like the others.
- Only the files of changed items are written, and of the lexical index what belongs to changed words.
- No model is needed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.errors import DataError
from dcar_core.util.files import canonical_json
from index_jobs.checks import MAX_METADATA_BYTES, MAX_METADATA_LEVELS, is_too_deep
from index_jobs.index import versions
from index_jobs.index.index_version import IndexVersion, write_rows
from index_jobs.index.items import Items, fit_one_field, type_of
from index_jobs.index.lexical.lexical_index import item_texts, replace_texts
from index_jobs.index.manifest import CHANGED, ITEMS, LEXICAL, Manifest, counted
from index_jobs.index.versions import open_current
from index_jobs.spec import BuildOptions


@dataclass(frozen=True)
class ChangeSummary:
    """Result of a change of metadata. unknown: ids that the index lacks. rebuild: as of `Manifest`."""

    version: int
    changed: int
    new_fields: list[str]
    unknown: list[str]
    rebuild: str


class Draft:
    """The items of a version with changed fields."""

    def __init__(self, artifact: IndexVersion) -> None:
        self._artifact = artifact
        self._types = dict(artifact.fields)
        self._given = set[str]()
        self.records: dict[int, dict[str, Any]] = {}  # all fields of the changed rows

    @property
    def new_fields(self) -> list[str]:
        """Names that no item had."""
        return sorted(self._types.keys() - self._artifact.fields.keys())

    def merge(self, rows: Iterable[int], fields: Mapping[str, Any]) -> int:
        """Merge fields into items, and return how many changed.

        Raises:
            DataError: a value has another type than its field or too many levels, or an item would become too large;
                none is changed.
        """
        if is_too_deep(fields):
            raise DataError(f"the fields have more than {MAX_METADATA_LEVELS} nested levels; flatten them")
        types = {name: str(type_of(value)) for name, value in fields.items() if value is not None}
        for name, given in types.items():
            if not fit_one_field(current := self._types.get(name, given), given):
                raise DataError(f"the field {name!r} is {current} in the index, not {given}; give values of that type")
        merged = {}
        for row in rows:
            before = self.records.get(row) or self._record(row)
            after = {name: value for name, value in {**before, **fields}.items() if fields.get(name, "") is not None}
            if after != before:
                merged[row] = after
                if len(canonical_json(after)) > MAX_METADATA_BYTES:
                    name = self._artifact.item(row).id
                    raise DataError(f"the fields of {name!r} would take more than {MAX_METADATA_BYTES // 2**10} KiB")
        if merged:
            self.records |= merged
            self._given |= fields.keys()
            self._types = types | self._types
        return len(merged)

    def _record(self, row: int) -> dict[str, Any]:
        item = self._artifact.item(row)
        texts = {"caption": item.caption, "category": item.category}
        return item.metadata | {name: text for name, text in texts.items() if text}

    def publish(self, new: versions.NewVersion, change: str, *, keep: int, origin: str = "") -> Manifest:
        """Publish a version with the changes."""
        current, manifest = self._artifact, self._artifact.manifest
        names = [ITEMS, *(f"{addition.folder}/{ITEMS}" for addition in manifest.additions)]
        start, texts = 0, dict[int, str]()
        new.link(current)
        for name, items in zip(names, (part.items for part in current.parts), strict=True):
            rows = np.array([row for row in sorted(self.records) if start <= row < start + len(items)], np.int64)
            if len(rows):
                records = {row - start: self.records[row] for row in rows.tolist()}
                items.write_changed(new.folder / name, records, self._given)
                before, after = (
                    item_texts(each.table(rows - start), manifest.spec.text_fields)
                    for each in (items, Items(new.folder / name))
                )
                texts |= {row: new for row, old, new in zip(rows.tolist(), before, after, strict=True) if new != old}
            start += len(items)
        if not manifest.spec.is_local:  # the engine keeps the fields as they were
            write_rows(new.folder / CHANGED, np.union1d(current.changed, [*self.records]))
        if texts:
            replace_texts(new.folder / LEXICAL, texts)
        change, changed = f"{change} {origin}".rstrip(), manifest.changed + len(self.records)
        manifest = replace(manifest, changed=changed, change=change, origin=origin)
        return new.publish(manifest, keep=keep)


def change_metadata(
    index: Path,
    changes: Iterable[tuple[str, Mapping[str, Any]]],
    source: str,
    *,
    strict: bool = False,
    keep: int = BuildOptions.keep,
) -> ChangeSummary:
    """Publish a version with changed fields of items, unless nothing changes.

    Args:
        changes: ids and the fields to merge.
        source: where they come from, for the history.
        strict: refuse names that no item has as a field.

    Raises:
        DataError: no id is in the index, a value does not fit its field, or `strict` refuses a name.
        ArtifactError: nothing is published.
        LockedError: another job is writing.
    """
    with versions.report_os_errors(index), versions.new_version(index) as new:
        current = open_current(index)
        draft, unknown, known = Draft(current), list[str](), 0
        for item_id, fields in changes:
            row = current.row_of(item_id)
            if row is None:
                unknown.append(item_id)
                continue
            known += 1
            draft.merge([row], fields)
        if not known and not unknown:
            raise DataError(f"{source} has no rows")
        if not known:
            raise DataError(f"none of the {len(unknown):,} ids of {source} is in the index, such as {unknown[0]!r}")
        if strict and draft.new_fields:
            raise DataError(f"no item has the field {' or '.join(map(repr, draft.new_fields))}; nothing is changed")
        manifest, count = current.manifest, len(draft.records)
        if count:
            change = f"metadata of {source}: {counted(count, 'item')} changed"
            manifest = draft.publish(new, change, keep=keep)
    return ChangeSummary(manifest.version, count, draft.new_fields, unknown, manifest.rebuild)
